"""Fixtures that several folders use."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models lose by more threads, and threads that wait use a core

from forgetcast import Pool
from support.cli import RunCommand, run_command
from support.data import make_pool

# Where the tests are started in the background, Ctrl-C is ignored, which other processes would take over.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes is not tested, and a busy machine is no failure.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


LONG = ("test_ray.py", "test_docs.py", "test_processes.py", "test_sweep.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: the last file runs while the other worker has nothing to do."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def olmo() -> np.ndarray:
    """The authors' OLMo-7B matrix, 76 x 1,000; read where it lies, never copied."""
    folder = Path(os.environ.get("FORGETCAST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    file = folder / "olmo-7b-dolma.json"
    if not file.is_file():
        pytest.skip(f"{file} is not here; set FORGETCAST_DATA to the folder with the reference data")
    return np.array(json.loads(file.read_text())["arr"])


@pytest.fixture
def pool() -> Pool:
    return make_pool()


@pytest.fixture
def run() -> RunCommand:
    """Run a command in this process: its exit code, standard output and standard error."""
    return run_command
