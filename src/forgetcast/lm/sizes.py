"""Sizes in a model's configuration, checked against its weights before it is built.

A model is built layer by layer before its weights are read, so a forged number would take all time or memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from forgetcast.errors import DataError

MOST_UNKNOWN = 1000
"""So many layers or experts are built, even if the weights have fewer tensors: some models share them among layers."""

_LAYERS = re.compile(r"(num_hidden|num|n)_layers?")
_COUNTS = re.compile(r"(.*_)?(layers?|blocks?|experts?|depth)")
_WIDTHS = re.compile(r".*_(size|dim|heads|rank)|n_(embd|inner|head)|d_(model|ff|kv)")


def check_sizes(name: str, config: Mapping[str, Any]) -> None:
    """Check the numbers in config.json that say how much is built.

    Parameters
    ----------
    name : str
        Directory or hub id of the model. Only in a directory with safetensors it is known how large the weights are.
    config : mapping

    Raises
    ------
    DataError
        If there would be more layers or experts than tensors, a layer wider than all weights together, or no layer.
    """
    tensors, values = _weights(Path(name))
    for key, value in _numbers(config):
        where = f"{name}: {key} in config.json"
        if _LAYERS.fullmatch(key) and value < 1:
            raise DataError(f"{where} is {value}; a model has at least one layer: put back its own config.json")
        if _COUNTS.fullmatch(key):
            check_count(where, value, tensors)
        elif _WIDTHS.fullmatch(key) and 0 < values < value:
            raise DataError(f"{where} is {value}, but the weights are {values} numbers; put back its own config.json")


def check_count(where: str, count: int | float, tensors: int) -> None:
    """Raise DataError if there would be more layers or experts than the weights have tensors; 0: unknown."""
    if count > max(tensors, MOST_UNKNOWN):
        known = f"the weights have {tensors} tensors" if tensors else f"more than {MOST_UNKNOWN} are not built"
        raise DataError(f"{where} is {count}, but {known}; put back the number of its weights")


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Yield the numbers of a configuration and of those in it, as that of its text model."""
    for key, value in config.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value
        elif isinstance(value, Mapping) and key.endswith("_config") and key != "quantization_config":
            yield from _numbers(value)


def _weights(folder: Path) -> tuple[int, int]:
    """Return how many tensors and numbers the safetensors in a folder hold."""
    tensors = values = 0
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            tensors += len(names)
            values += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return tensors, values
