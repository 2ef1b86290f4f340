"""Recipes: how to fine-tune, as a small file that is checked before anything is loaded."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from forgetcast.errors import ConfigError

Settings = TypeVar("Settings", bound=BaseModel)


class Recipe(BaseModel):
    """How to fine-tune. An unknown key is an error.

    Attributes
    ----------
    method : 'full' or 'lora'
    steps : int
        Optimiser steps on new examples; replay comes on top.
    learning_rate : float
        Peak of the schedule.
    batch_size : int
        Examples an optimiser step.
    micro_batch_size : int or None
        Examples in a device's memory at once; divides batch_size. None: as many as there are for it.
    max_length : int
        Tokens an example is cut to; the model's context limits it too.
    seed : int
        Of the order of the new examples and of LoRA's start.
    schedule : 'linear', 'cosine' or 'constant'
    warmup_steps : int
    weight_decay : float
    gradient_checkpointing : bool
        Compute activations again in the backward pass: less memory, about a third more time, the same result.
    lora_rank, lora_alpha : int
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["full", "lora"] = "full"
    steps: int = Field(default=200, ge=1)
    learning_rate: float = Field(default=1e-5, gt=0)
    batch_size: int = Field(default=8, ge=1)
    micro_batch_size: int | None = Field(default=None, ge=1)
    max_length: int = Field(default=1024, ge=2)
    seed: int = 0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    gradient_checkpointing: bool = False
    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)

    @classmethod
    def load(cls, name: str | Path) -> Recipe:
        """Read a YAML file, or a recipe that ships with the package, by its name.

        Raises
        ------
        ConfigError
            If there is none, or names the field that is wrong.
        """
        shipped = files("forgetcast") / "recipes"
        names = sorted(file.name.removesuffix(".yaml") for file in shipped.iterdir())
        if str(name) in names and not Path(name).exists():
            return read_settings(Path(str(shipped / f"{name}.yaml")), cls)
        if not Path(name).exists():
            raise ConfigError(f"there is no recipe {name}: give a YAML file, or one of {', '.join(names)}")
        return read_settings(Path(name), cls)


def read_settings(path: Path, kind: type[Settings]) -> Settings:
    """Read a YAML (or JSON) file into a pydantic model; an error is one line that names the file and the field."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    return check_settings(content if content is not None else {}, kind, where=str(path), folder=path.parent)


def check_settings(content: Any, kind: type[Settings], *, where: str, folder: Path | None = None) -> Settings:
    """Validate settings, with paths relative to `folder`; an error is one line that names the place and the field."""
    try:
        return kind.model_validate(content, context=folder)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the content"
        raise ConfigError(f"{where}: {field}: {first['msg'].removeprefix('Value error, ')}") from None
