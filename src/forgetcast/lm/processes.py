"""Several devices: one process for each, as `accelerate launch` and torchrun start them, or this process alone."""

from __future__ import annotations

import os
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

T = TypeVar("T")


def count() -> int:
    """How many processes share the work."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def index() -> int:
    """Which of them this is, from 0."""
    return int(_join().process_index) if count() > 1 else 0


def from_first(value: T) -> T:
    """What the first process has; every process must call this."""
    if count() == 1:
        return value
    _join()
    shared: T = broadcast_object_list([value])[0]
    return shared


def from_all(value: T) -> list[T]:
    """What the processes have, in their order; every process must call this."""
    if count() == 1:
        return [value]
    _join()
    return list(gather_object([value]))


def _join() -> PartialState:
    """Meet the other processes, if that was not done yet; without this hint, Accelerate on a CPU stays alone."""
    return PartialState(cpu=not torch.accelerator.is_available())
