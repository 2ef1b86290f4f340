"""Recipes: the settings of a fine-tune, read from a small file and checked before anything is loaded."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from forgetcast.defaults import MOST_EXAMPLES
from forgetcast.errors import ConfigError
from forgetcast.files import neighbour
from forgetcast.settings import Seed, read_settings
from forgetcast.text import did_you_mean

OWN_FIELDS = ("kl_weight", "replay_weight", "easy_samples", "spacing")
"""Fields that no other trainer has."""

_FIELDS_OF_A_CONFIGURATION = {"model", "pool", "tasks", "atlas", "recipe"}
"""Fields by which a file of `collect` is told that is given as a recipe."""

_LATER_FIELDS = (*OWN_FIELDS, "precision", "fused_loss")
"""Fields that recipes of earlier versions lack."""


class Recipe(BaseModel):
    """Settings of a fine-tune. An unknown key is an error.

    Attributes
    ----------
    method : 'full' or 'lora'
    steps : int
        Optimiser steps on new examples; replay comes on top.
    learning_rate : float
        Peak of the schedule.
    batch_size : int
        Examples per optimiser step.
    micro_batch_size : int or None
        Examples in a device's memory at once; divides batch_size. None: the device's share of the batch.
    max_length : int
        Examples are cut to this number of tokens, or to the model's context if that is shorter.
    seed : int
        Seed of the order of the new examples and of LoRA's initial weights.
    schedule : 'linear', 'cosine' or 'constant'
    warmup_steps : int
    weight_decay : float
    precision : 'auto', 'float32' or 'bfloat16'
        What the passes compute in; weights and optimiser keep their type. auto: bfloat16 on a GPU that has it, else
        float32. It changes the result like another seed does.
    fused_loss : 'chunked', 'liger' or None
        Compute the loss without the logits of a whole batch: much less memory where the vocabulary is large, the same
        up to rounding. liger: by the kernel of the package liger-kernel, on a GPU.
    gradient_checkpointing : bool
        Recompute activations in the backward pass: less memory, about a third more time, the same result.
    lora_rank, lora_alpha : int
    kl_weight : float
        Of replayed batches: how much of their loss is the divergence from the model that the fine-tune started from,
        between 0 and 1; without replay it changes nothing.
    replay_weight : float
        Factor of the loss of replayed batches, an alternative to replaying more of them.
    easy_samples : bool
        Weight new examples by exp(-loss / median loss) of the model that the fine-tune starts from.
    spacing : 'even' or 'updates'
        Where replayed batches come: after as many steps each, or after as much of the learning rate.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["full", "lora"] = "full"
    steps: int = Field(default=200, ge=1, le=MOST_EXAMPLES)
    learning_rate: float = Field(default=1e-5, gt=0, allow_inf_nan=False)
    batch_size: int = Field(default=8, ge=1, le=MOST_EXAMPLES)
    micro_batch_size: int | None = Field(default=None, ge=1, le=MOST_EXAMPLES)
    max_length: int = Field(default=1024, ge=2, le=2**31 - 1)
    seed: Seed = 0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = Field(default=0, ge=0, le=MOST_EXAMPLES)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    fused_loss: Literal["chunked", "liger"] | None = None
    gradient_checkpointing: bool = False
    lora_rank: int = Field(default=16, ge=1, le=2**16)
    lora_alpha: int = Field(default=32, ge=1, le=2**31 - 1)
    kl_weight: float = Field(default=0.0, ge=0, le=1)
    replay_weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    easy_samples: bool = False
    spacing: Literal["even", "updates"] = "even"

    @model_validator(mode="before")
    @classmethod
    def _is_no_configuration(cls, content: Any, info: ValidationInfo) -> Any:
        if not isinstance(content, dict) or not content.keys() & _FIELDS_OF_A_CONFIGURATION:
            return content
        recipe = content.get("recipe")
        if isinstance(recipe, str):
            file = (info.context or Path()) / recipe
            named = f"give the one that it names, {file if file.exists() else recipe}"
        elif recipe is None:
            named = "it names none, so that it takes the defaults"
        else:
            named = "put what is below its field recipe into a file of its own"
        raise ValueError(f"this is a configuration of `collect`, and a recipe is needed: {named}")

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out fields of later versions at their defaults: what was stored before stays equal."""
        fields: dict[str, Any] = write(self)
        return {name: value for name, value in fields.items() if name not in _LATER_FIELDS or self.changes(name)}

    def changes(self, name: str) -> bool:
        """Whether a field has another value than its default."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    @property
    def has_own_loss(self) -> bool:
        """Whether it asks for another loss than the model's own."""
        return any(map(self.changes, ("kl_weight", "replay_weight", "easy_samples")))

    @model_validator(mode="after")
    def _countable(self) -> Self:
        if self.steps * self.batch_size > MOST_EXAMPLES:
            raise ValueError(
                f"{self.steps:,} steps of {self.batch_size:,} examples are more than {MOST_EXAMPLES:,} examples"
            )
        if self.fused_loss is not None and self.has_own_loss:
            raise ValueError("fused_loss: kl_weight, replay_weight and easy_samples need the logits; leave one out")
        return self

    @classmethod
    def load(cls, name: str | Path) -> Recipe:
        """Read a YAML file, or a recipe shipped with the package by its name.

        Raises
        ------
        ConfigError
            If there is none, or a field is invalid; the message names it.
        """
        shipped = files("forgetcast.data") / "recipes"
        names = sorted(file.name.removesuffix(".yaml") for file in shipped.iterdir())
        if str(name) in names and not Path(name).exists():
            return read_settings(Path(str(shipped / f"{name}.yaml")), cls)
        if not Path(name).exists():
            raise ConfigError(
                f"there is no recipe {name}: give a YAML file, or one of {', '.join(names)}"
                f"{did_you_mean(str(name), names) or neighbour(Path(name))}"
            )
        return read_settings(Path(name), cls)
