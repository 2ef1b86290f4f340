from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from forgetcast.interruption import Stop, stoppable


@pytest.fixture
def asked() -> Iterator[list[int]]:
    """Signals that reach the handler that was there before; SIGTERM has one too."""
    got: list[int] = []

    def handle(number: int, _: object) -> None:
        got.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    yield got
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_is_noted_and_the_second_acts(
    asked: list[int], capfd: pytest.CaptureFixture[str], number: int
) -> None:
    with stoppable("stopping after this step") as stop:
        assert not stop
        send(number)
        assert stop
        assert asked == []
        with pytest.raises(KeyboardInterrupt):
            send(number)
        assert asked == [number]
        stop.forget()
    said = capfd.readouterr().err
    assert said.count("stopping after this step") == 1
    assert ("press Ctrl-C again" in said) == (number == signal.SIGINT)


def test_what_nobody_looked_at_acts_at_the_end(asked: list[int]) -> None:
    with pytest.raises(KeyboardInterrupt), stoppable("stopping"):
        send(signal.SIGTERM)
    assert asked == [signal.SIGTERM]
    with stoppable("stopping") as stop:
        send()
        stop.forget()
    assert asked == [signal.SIGTERM]
    with pytest.raises(KeyboardInterrupt):  # the handlers are those from before
        send()


def test_a_block_in_a_block_shares_what_is_noted(asked: list[int]) -> None:
    with stoppable("outer") as outer:
        with stoppable("inner") as inner:
            send(signal.SIGTERM)
        assert inner is outer
        stopped = outer.interrupted("after step 3")
        assert (stopped.number, str(stopped), asked) == (signal.SIGTERM, "after step 3", [])
        with stoppable("inner"), pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)
        assert asked == [signal.SIGTERM]
        outer.forget()


def test_what_is_ignored_or_the_systems_stays_so() -> None:
    before = [signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, signal.SIG_DFL)]
    try:
        with stoppable("stopping") as stop:
            send()
            assert not stop
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def test_another_thread_gets_no_signals() -> None:
    found: list[Stop] = []

    def work() -> None:
        with stoppable("stopping") as stop:
            found.append(stop)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not found[0]
