"""Fine-tuning on the Hugging Face Trainer: one base model in memory, tuned again and again from the same weights."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import BaseModel, ConfigDict, Field
from transformers import Trainer, TrainerCallback, TrainingArguments

from forgetcast.errors import ConfigError, DataError
from forgetcast.lm.load import LanguageModel
from forgetcast.lm.replay import ReplayMixture
from forgetcast.pool import Pool
from forgetcast.replay import ReplayPlan


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
        Examples in memory at once; divides batch_size. None: all.
    max_length : int
        Tokens an example is cut to; the model's context limits it too.
    seed : int
        Of the order of the new examples and of LoRA's start.
    schedule : 'linear', 'cosine' or 'constant'
    warmup_steps : int
    weight_decay : float
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
    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model and what it cost.

    Attributes
    ----------
    language_model : LanguageModel
        Valid until its workbench tunes again.
    steps : int
        Optimiser steps, those on replayed batches included.
    replayed : tuple of str
        Ids of the upstream examples that were replayed, in order.
    seconds : float
        Wall time of the training.
    """

    language_model: LanguageModel
    steps: int
    replayed: tuple[str, ...]
    seconds: float

    def save(self, directory: str | Path) -> None:
        """Write the model (LoRA: the adapter) and the tokenizer in the Hugging Face format."""
        self.language_model.model.save_pretrained(directory)
        self.language_model.tokenizer.save_pretrained(directory)


class Workbench:
    """Keeps the base model's weights, so that a sweep reads them once.

    Parameters
    ----------
    base : LanguageModel
        Is changed by `tune` and put back by `restore`.

    Attributes
    ----------
    base_hash : str
        Hash of the base model's weights.
    """

    def __init__(self, base: LanguageModel) -> None:
        self.base = base
        self.base_hash = base.weights_hash
        self._weights = {name: tensor.detach().clone() for name, tensor in base.model.state_dict().items()}
        self._adapted: PeftModel | None = None

    def restore(self) -> LanguageModel:
        """Give the base model with the weights it had at first."""
        if self._adapted is not None:
            self._adapted.unload()
            self._adapted = None
        self.base.model.load_state_dict(self._weights)
        self.base.model.requires_grad_(True)
        return self.base

    def tune(
        self,
        task: Pool,
        recipe: Recipe,
        *,
        plan: ReplayPlan | None = None,
        pool: Pool | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tuned:
        """Fine-tune the base model on a task.

        Parameters
        ----------
        task : Pool
        recipe : Recipe
        plan, pool : optional
            What to replay, and the pool that it is taken from.
        on_step : callable, optional
            Called with the steps done and the steps in all.

        Raises
        ------
        DataError
            If the loss stops being finite.
        """
        language_model = self.restore()
        micro = recipe.micro_batch_size or recipe.batch_size
        if recipe.batch_size % micro:
            raise ConfigError(f"micro_batch_size {micro} does not divide batch_size {recipe.batch_size}")
        mixture = ReplayMixture(
            task,
            language_model.tokenizer,
            steps=recipe.steps,
            batch_size=recipe.batch_size,
            max_length=min(recipe.max_length, language_model.context),
            seed=recipe.seed,
            plan=plan,
            pool=pool,
        )
        model: Any = language_model.model
        torch.manual_seed(recipe.seed)
        if recipe.method == "lora":
            lora = LoraConfig(
                r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            model = self._adapted = get_peft_model(model, lora)
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            trainer = Trainer(
                model=model,
                args=_arguments(recipe, mixture, model.device, micro, scratch),
                train_dataset=mixture,
                data_collator=mixture.collate,
                callbacks=[_Progress(on_step)] if on_step is not None else [],
            )
            trainer.remove_callback(_printer())
            loss = trainer.train().training_loss
        if not loss < float("inf"):
            raise DataError(
                f"the training loss became {loss}; lower the recipe's learning_rate ({recipe.learning_rate:g})"
            )
        tuned = LanguageModel(model.eval(), language_model.tokenizer, f"{language_model.name}, fine-tuned")
        return Tuned(tuned, mixture.steps, mixture.replayed, time.monotonic() - started)


def _arguments(
    recipe: Recipe, mixture: ReplayMixture, device: torch.device, micro: int, scratch: str
) -> TrainingArguments:
    on_gpu = device.type == "cuda"
    return TrainingArguments(
        output_dir=scratch,
        max_steps=mixture.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=recipe.batch_size // micro,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule if recipe.schedule != "constant" else "constant_with_warmup",
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        seed=recipe.seed,
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=on_gpu,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,  # its default hides a loss that is not finite, which must be an error here
        report_to="none",
        disable_tqdm=True,
    )


def _printer() -> type[TrainerCallback]:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


class _Progress(TrainerCallback):
    """Hand the Trainer's steps to a function."""

    def __init__(self, on_step: Callable[[int, int], None]) -> None:
        self._on_step = on_step

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Is called by the Trainer, with arguments of these names."""
        self._on_step(state.global_step, state.max_steps)
