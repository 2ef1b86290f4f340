"""Work shared by several processes, one per device, started by `accelerate launch` or torchrun."""

from __future__ import annotations

import atexit
import os
from functools import cache
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object

T = TypeVar("T")


def count() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def index() -> int:
    """Return the rank of this process, from 0."""
    return int(_join().process_index) if count() > 1 else 0


def from_first(value: T) -> T:
    """Return the first process's value; every process must call this."""
    if count() == 1:
        return value
    _join()
    shared: T = broadcast_object_list([value])[0]
    return shared


def from_all(value: T) -> list[T]:
    """Return the values of all processes, by rank; every process must call this."""
    if count() == 1:
        return [value]
    _join()
    return list(gather_object([value]))


def let_shard() -> None:
    """Have Accelerate shard among the processes of a CPU as among GPUs, as tests need; by itself it would not.

    To be called after `TrainingArguments` are made, which join the processes again.
    """
    if PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


@cache
def _join() -> PartialState:
    """Join the process group; without `cpu=True`, Accelerate on a CPU stays a single process."""
    state = PartialState(cpu=not torch.accelerator.is_available())
    # Threads of a group that is still there when Python ends can abort the process.
    atexit.register(state.destroy_process_group)
    return state
