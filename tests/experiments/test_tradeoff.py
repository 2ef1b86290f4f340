"""Arms at equal new-task loss, on planted outcomes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetcast import Verification
from forgetcast.cli.tables import verification_tables
from forgetcast.replay import Run
from forgetcast.report import figures
from support.cli import RunCommand
from support.training import make_recipe, measured_atlas


def planted(
    places: dict[str, tuple[float, float]], *, tasks: int = 6, seeds: int = 1, noise: float = 0.002
) -> Verification:
    """Runs of arms whose new-task loss and forgetting differ from those without replay by what is given."""
    rng = np.random.default_rng(0)
    runs = []
    for task in range(tasks):
        for seed in range(seeds):
            level = 0.3 + 0.1 * rng.random()
            for arm, (loss, change) in places.items():
                mean = level + change + noise * rng.normal()
                new = 2.0 + task + loss + noise * rng.normal()
                cost = {"trained_tokens": 100, "generated_tokens": 0, "scored_tokens": 7}
                runs.append(Run(f"t{task}", arm, seed, mean, 2 * mean, new, 0, 4, 1.0, strategy=arm, **cost))
    return Verification(tuple(runs), judged=100, ratio=0.1)


PLACES = {"none": (0.0, 0.0), "interpolation": (0.0, -0.1), "random": (0.0, -0.1), "top": (0.0, -0.2)}


class TestPlaces:
    def test_they_are_paired_differences_to_no_replay(self) -> None:
        result = planted(PLACES)
        found = {each.arm: each for each in result.tradeoffs}
        assert list(found) == list(PLACES)
        value = {(run.task, run.seed, run.arm): run.mean for run in result.runs}
        by_hand = [value[f"t{t}", 0, "top"] - value[f"t{t}", 0, "none"] for t in range(6)]
        assert found["top"].mean.mean == pytest.approx(np.mean(by_hand))
        assert found["top"].mean.lower < -0.2 + 0.004 < found["top"].mean.upper + 0.01  # type: ignore[operator]
        assert found["none"].mean == (0, 0, 0)
        assert found["top"].cost == {"trained_tokens": 100, "generated_tokens": 0, "scored_tokens": 7, "seconds": 1}
        old = replace(result, runs=tuple(replace(run, trained_tokens=None) for run in result.runs))
        assert old.tradeoffs[0].cost["trained_tokens"] is None

    def test_equal_loss_must_be_shown(self) -> None:
        result = planted({**PLACES, "costly": (0.05, -0.3), "noisy": (0.0, -0.3)})
        rng = np.random.default_rng(1)
        runs = [
            replace(run, new_task_loss=run.new_task_loss + rng.normal()) if run.arm == "noisy" else run
            for run in result.runs
        ]
        equal = {each.arm: each.equal for each in replace(result, runs=tuple(runs)).tradeoffs}
        assert equal == {
            "none": True, "interpolation": True, "random": True, "top": True, "costly": False, "noisy": False
        }  # fmt: skip
        wide = {each.arm: each.equal for each in replace(result, margin=0.1).tradeoffs}
        assert wide["costly"] is True

    @given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=6, unique=True))
    def test_front_is_what_nothing_beats_in_both(self, places: list[tuple[float, float]]) -> None:
        """Oracle: a loop over all pairs."""
        named = {"none": (0.0, 0.0), **{f"a{i}": place for i, place in enumerate(places) if place != (0.0, 0.0)}}
        result = planted(named, tasks=1, seeds=1, noise=0)
        exact = {each.arm: (each.new_task_loss.mean, each.mean.mean) for each in result.tradeoffs}
        for each in result.tradeoffs:
            x, y = exact[each.arm]
            beaten = any(a <= x and b <= y and (a, b) != (x, y) for a, b in exact.values())
            assert each.on_front is not beaten


class TestAdvice:
    def test_best_arm_where_the_simpler_ones_are_shown_to_forget_more(self) -> None:
        advice = planted(PLACES).advice
        assert (advice.arm, advice.best) == ("top", "top")
        assert "simpler is shown to forget more (none, interpolation, random)" in advice.sentences[-1]

    def test_something_simpler_wins_where_no_difference_is_shown(self) -> None:
        advice = planted({**PLACES, "top": (0.0, -0.101)}, noise=0.01).advice
        assert advice.arm == "interpolation"
        assert "interpolation is simpler, and not shown to forget more: mean forgetting" in " ".join(advice.sentences)

    def test_an_arm_that_is_shown_to_lose_more_answers_is_not_advised(self) -> None:
        result = planted({**PLACES, "top": (0.0, -0.101)}, noise=0.01)
        lost = {"none": 15, "interpolation": 9, "random": 9, "top": 5}
        runs = [replace(r, right_to_wrong=lost[r.arm] + int(r.task[1]) % 2, right_before=20) for r in result.runs]
        answered = replace(result, runs=tuple(runs))
        assert (result.advice.arm, answered.advice.arm, answered.advice.best) == ("interpolation", "top", "top")
        found = {each.arm: each.lost_answers for each in answered.tradeoffs}
        assert found["top"] is not None
        assert found["top"].mean == pytest.approx(-10 / 20)
        assert all(each.lost_answers is None for each in result.tradeoffs)
        runs = [replace(run, right_to_wrong=5) for run in answered.runs]
        same = replace(answered, runs=tuple(runs)).advice
        assert same.arm == "interpolation"
        assert "share of answers lost +0.0000 (+0.0000 to +0.0000)" in " ".join(same.sentences)

    def test_arms_that_cost_new_task_loss_are_not_advised(self) -> None:
        advice = planted({**PLACES, "top": (0.05, -0.3)}).advice
        assert advice.arm == "interpolation"
        assert "Not shown: top." in advice.sentences[0]

    def test_ceilings_and_controls_are_not_advised(self) -> None:
        advice = planted({**PLACES, "top truth": (0.0, -0.3), "padding": (-0.1, -0.3)}).advice
        assert advice.arm == "top"

    def test_no_replay_where_nothing_helps(self) -> None:
        assert planted({"none": (0, 0), "random": (0, 0.1)}).advice.arm == "none"

    def test_no_replay_is_not_praised_where_nothing_else_is_shown_to_learn_as_well(self) -> None:
        advice = planted({"none": (0, 0), "random": (0.1, -0.2)}).advice
        assert advice.arm == "none"
        assert advice.sentences[-1] == ("Advice: no replay, because no arm is shown to learn the new task as well.")

    def test_one_run_of_each_shows_nothing(self) -> None:
        advice = planted(PLACES, tasks=1, seeds=1).advice
        assert advice.arm is None
        assert "shows nothing" in advice.sentences[0]

    @settings(max_examples=12)
    @given(st.lists(st.floats(-0.3, 0.3), min_size=2, max_size=3), st.floats(0.001, 0.2), st.integers(2, 6))
    def test_it_is_never_shown_to_be_worse_than_the_best_arm(
        self, changes: list[float], noise: float, tasks: int
    ) -> None:
        places = {"none": (0.0, 0.0), **{f"a{i}": (0.0, change) for i, change in enumerate(changes)}}
        result = planted(places, tasks=tasks, seeds=1, noise=noise)
        advice = result.advice
        assert advice.arm is not None
        assert advice.best is not None
        if advice.arm != advice.best:
            for metric in ("mean", "worst_tenth"):
                found = result.compare(advice.arm, advice.best, metric)
                assert found is not None
                assert found.difference.lower <= 0


def test_it_is_printed_plotted_stored_and_read_by_plan(tmp_path: Path, run: RunCommand) -> None:
    result = planted({**PLACES, "a [b] <i>": (0.05, -0.3)})
    sentences = [part for part in verification_tables(result) if isinstance(part, str)]
    assert sentences[-1] == result.advice.sentences[-1]
    drawn = figures.tradeoff(result)
    assert "<i>" not in drawn
    assert "not shown to be equal" in drawn
    stored = result.as_dict()
    assert stored["advice"]["arm"] == "top"
    assert stored["tradeoffs"][1]["new_task_loss"]["upper"] is not None
    result.save(tmp_path / "v.json")
    assert Verification.load(tmp_path / "v.json") == result
    atlas = measured_atlas(tmp_path, make_recipe())
    code, out, err = run("plan", atlas.path, "--advise", "--verification", tmp_path / "v.json")
    assert code == 0, err
    assert "Advice: top, which forgets least there" in " ".join(out.split())
    code, _, err = run("plan", atlas.path, "--verification", tmp_path / "v.json", "-o", tmp_path / "p.parquet")
    assert code == 2
    assert "--verification is for --advise" in err
