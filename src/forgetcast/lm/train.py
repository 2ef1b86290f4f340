"""Fine-tune with the Hugging Face Trainer: one base model in memory, tuned repeatedly from the same weights."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import ExportableState

from forgetcast import __version__
from forgetcast.data.pool import Pool
from forgetcast.data.recipe import Recipe
from forgetcast.errors import ConfigError, DataError, MismatchError
from forgetcast.files import atomic_path, read_json, write_json
from forgetcast.interruption import Stop, stoppable
from forgetcast.lm import adapters, processes
from forgetcast.lm.fused import fused_loss, keeping_forward
from forgetcast.lm.interpolate import Interpolation
from forgetcast.lm.load import LanguageModel, without_bars
from forgetcast.lm.loss import WeightedTrainer, easy_weights
from forgetcast.lm.mixture import ReplayCallback, ReplayMixture
from forgetcast.lm.score import score
from forgetcast.lm.selectors import ReplaySelector
from forgetcast.replay.plan import ReplayPlan
from forgetcast.text import markdown_text

SECONDS_BETWEEN_CHECKPOINTS = 300.0
"""Upper limit on lost work. A checkpoint is three times as large as the trained weights."""

STEPS_BETWEEN_LOSSES = 10
"""Steps whose mean loss is told at once: telling it waits for the device. So does asking several processes to stop."""

_TRAINED = "trained"
"""Name of the files in a folder of checkpoints that hold a finished fine-tune until its scores are stored."""

_ROUTERS = {"gate", "router", "shared_expert_gate", "wg"}
"""Names of modules that choose experts: their training is a subject of its own, and they stay frozen."""


_NAMES_OF_EXPERTS = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model and its cost.

    Attributes
    ----------
    language_model : LanguageModel
        Valid until the next fine-tune of the same base model.
    steps : int
        Optimiser steps, including those on replayed batches.
    replayed : tuple of str
        Ids of the replayed upstream examples, in order.
    seconds : float
        Wall time of the training.
    tokens : int
        Tokens that were trained on, without padding; those of an example count each time.
    plan : ReplayPlan or None
        What the examples were replayed by.
    run : mapping
        What the model depends on: hash of the base model, fingerprint of the task, recipe.
    precision : 'float32' or 'bfloat16'
        What the passes computed in.
    """

    language_model: LanguageModel
    steps: int
    replayed: tuple[str, ...]
    seconds: float
    tokens: int = 0
    plan: ReplayPlan | None = None
    run: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "float32"

    def __repr__(self) -> str:
        return f"Tuned(steps={self.steps}, replayed={len(self.replayed)}, seconds={self.seconds:.1f})"

    def save(self, directory: str | Path) -> None:
        """Write the model (LoRA: the adapter) and the tokenizer in Hugging Face format.

        An adapter is written merged into its base model if that has no directory or hub id of its own, as a model that
        was itself merged or came from a GGUF file. Beside it, `replayed.json` has the ids of the replayed examples in
        their order, and the fingerprints of their plan and pool; `README.md` says how the model was made.
        """
        model: Any = self.language_model.model
        if isinstance(model, PeftModel) and not model.get_base_model().name_or_path:
            model = copy.deepcopy(model).merge_and_unload()
        with without_bars():
            model.save_pretrained(directory)
        self.language_model.tokenizer.save_pretrained(directory)
        plan = self.plan
        facts = {
            "steps": self.steps,
            "precision": self.precision,
            "plan": None if plan is None else plan.fingerprint,
            "pool": None if plan is None else plan.pool_fingerprint,
            "replayed": list(self.replayed),
        }
        write_json(Path(directory) / "replayed.json", facts)
        (Path(directory) / "README.md").write_text(self._card(), encoding="utf-8")

    def _card(self) -> str:
        """Return what is known of how the model was made, as Markdown, in place of PEFT's form of questions."""
        recipe = "".join(f"    {name}: {value}\n" for name, value in self.run.get("recipe", {}).items())
        replay, name = "none", self.language_model.name.removesuffix(", fine-tuned")
        if self.plan is not None:
            strategy = markdown_text(self.plan.strategy)
            replay = (
                f"{len(self.replayed)} examples by {strategy}, ratio {self.plan.ratio:g}; `replayed.json` lists them"
            )
        facts = {
            "Base model": f"{markdown_text(name)} (SHA-256 of its weights {self.run.get('base')})",
            "Task": f"fingerprint {self.run.get('task')}",
            "Steps": f"{self.steps}, {self.tokens:,} tokens",
            "Replay": replay,
        }
        listed = "".join(f"- {name}: {value}\n" for name, value in facts.items())
        return f"# A model fine-tuned with forgetcast {__version__}\n\n{listed}- Recipe:\n\n{recipe}"


@dataclass(frozen=True, eq=False, repr=False)
class InitialState:
    """What earlier fine-tunes pass on to the next one.

    Attributes
    ----------
    weights : mapping of str to Tensor, optional
        Initial weights, from `FineTuner.weights`; default: the base model's.
    already_replayed : sequence of str
        Ids that earlier fine-tunes replayed: they are replayed again only after all others were replayed equally
        often, unless a selector decides otherwise.
    """

    weights: Mapping[str, torch.Tensor] | None = None
    already_replayed: Sequence[str] = ()

    def __repr__(self) -> str:
        start = "base" if self.weights is None else "other"
        return f"InitialState({start} weights, {len(self.already_replayed)} already replayed)"


class FineTuner:
    """Fine-tunes a base model repeatedly, with its weights kept in memory.

    Parameters
    ----------
    base : LanguageModel
        Changed by `tune` and reset by `restore`. An adapter is merged into its weights. A quantised model can be tuned
        with LoRA only.
    sharded : bool
        Whether several processes share the weights, gradients and optimiser of one fine-tune (FSDP2), instead of
        each having all of them. Weights that were loaded on the CPU are sharded onto the GPUs, if there are any.

    Attributes
    ----------
    base_hash : str
        Hash of the base model's weights, taken before an adapter is merged.

    Raises
    ------
    ConfigError
        If the base model has an adapter that cannot be merged, or cannot be sharded.
    """

    def __init__(self, base: LanguageModel, *, sharded: bool = False) -> None:
        if sharded:
            _check_shardable(base)
        self.base_hash, self.sharded = base.weights_hash, sharded
        self.base = base.merged()
        # LoRA leaves quantised weights as they are, and not all kinds of them can be copied into a model.
        kept = not (self.base.is_quantized or sharded)
        self._weights = _copy(self.base.model.state_dict()) if kept else {}
        self._adapted: PeftModel | None = None

    def __repr__(self) -> str:
        return f"FineTuner({self.base.name!r})"

    def restore(self, weights: Mapping[str, torch.Tensor] | None = None) -> LanguageModel:
        """Return the base model with its original weights, or with those that `weights` returned."""
        if self._adapted is not None:
            self._adapted.unload()
            self._adapted = None
        if self.sharded:
            if weights is not None or any(hasattr(value, "full_tensor") for value in self.base.model.parameters()):
                raise ConfigError("a sharded model is tuned once, from its own weights; load it again")
        elif not self.base.is_quantized:
            self.base.model.load_state_dict(self._weights if weights is None else weights)
            self.base.model.requires_grad_(True)
        if weights is None:
            return self.base
        self.check_weights()
        # A new object, because the base model's caches the hash of the base weights.
        return replace(self.base, name=f"{self.base.name}, fine-tuned")

    def check_weights(self) -> None:
        """Raise ConfigError if fine-tuned weights cannot be returned by `weights` and taken over by `restore`."""
        if self.base.is_quantized:
            raise ConfigError(
                f"{self.base.name} is quantised, so an adapter cannot be merged into it without loss, and no fine-tune "
                "can go on from another; use the unquantised model"
            )

    def weights(self) -> dict[str, torch.Tensor]:
        """Return a copy of the current weights, by the base model's names, with a LoRA adapter merged into them.

        Raises
        ------
        ConfigError
            If the base model is quantised.
        """
        self.check_weights()
        state = self.base.model.state_dict()
        if self._adapted is None:
            return _copy(state)
        merged = {adapters.unwrapped(name): value for name, value in _copy(state).items() if ".lora_" not in name}
        for name, layer in self.base.model.named_modules():
            if isinstance(layer, LoraLayer):
                lora: Any = layer
                weight: Any = merged[f"{adapters.unwrapped(name)}.{getattr(lora, 'parameter_name', 'weight')}"]
                for adapter in lora.active_adapters:
                    weight += lora.get_delta_weight(adapter).detach().to(weight.device)
        return merged

    def interpolation(self, tuned: Tuned) -> Interpolation:
        """Return the models between the base model and the last one that `tune` made; it is changed in place."""
        adapted = isinstance(tuned.language_model.model, PeftModel)
        return Interpolation(tuned.language_model, None if adapted else self._weights)

    def tune(
        self,
        task: Pool,
        recipe: Recipe,
        *,
        plan: ReplayPlan | None = None,
        pool: Pool | None = None,
        selector: ReplaySelector | None = None,
        initial: InitialState | None = None,
        checkpoints: Path | None = None,
        on_step: Callable[[int, int], None] | None = None,
        on_loss: Callable[[float], None] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> Tuned:
        """Fine-tune the base model on a task.

        Parameters
        ----------
        task : Pool
        recipe : Recipe
        plan, pool : optional
            What to replay, and its pool.
        selector : ReplaySelector, optional
            Selects during training which examples of the plan come next.
        initial : InitialState, optional
            Where earlier fine-tunes ended; default: the base model, with nothing replayed.
        checkpoints : path, optional
            Directory for the training state, saved every few minutes, and on Ctrl-C or SIGTERM. A run of the same
            model, task, plan and recipe resumes from it, with the same result as without the interruption. A
            sharded run saves none.
        on_step : callable, optional
            Called with the number of finished steps and their total.
        on_loss : callable, optional
            Called every few steps with their mean training loss.
        callbacks : sequence of TrainerCallback
            Callbacks of the Trainer, such as a `ForgettingMonitor`.

        Returns
        -------
        Tuned
            Of a sharded fine-tune, the model is on the CPU; only in the first process it has weights.

        Raises
        ------
        ConfigError
            If the recipe's batch sizes do not divide, the plan is incompatible with the selector, or the weights are
            quantised and the method is not LoRA, or the kind of quantisation cannot be trained; if the precision or the
            fused loss cannot be had, or a sharded model was tuned before.
        MismatchError
            If `checkpoints` holds another run.
        DataError
            If the loss stops being finite.
        Interrupted
            If Ctrl-C or SIGTERM came, with a checkpoint written. Without `checkpoints`, they act at once.
        """
        initial = initial or InitialState()
        if self.base.is_quantized:
            _check_trainable(self.base, recipe)
        if self.sharded and selector is not None:
            raise ConfigError("what is replayed cannot be selected during a sharded training; leave out one of the two")
        _check_launcher(sharded=self.sharded)
        language_model, already_replayed = self.restore(initial.weights), list(initial.already_replayed)
        devices = processes.count()
        micro = recipe.micro_batch_size or max(recipe.batch_size // devices, 1)
        if recipe.batch_size % (micro * devices):
            on = f" on each of {devices} devices" if devices > 1 else ""
            raise ConfigError(f"micro_batch_size {micro}{on} does not divide batch_size {recipe.batch_size}")
        mixture = ReplayMixture(
            task,
            language_model.tokenizer,
            steps=recipe.steps,
            batch_size=recipe.batch_size,
            max_length=min(recipe.max_length, language_model.context),
            seed=recipe.seed,
            plan=plan,
            pool=pool,
            rendering=language_model.rendering,
            weights=_easy_weights(language_model, task, recipe) if recipe.easy_samples else None,
            sizes=(lambda steps: _learning_rates(recipe, steps)) if recipe.spacing == "updates" else None,
        )
        if plan is not None and already_replayed and mixture.replayed:
            mixture.revise(0, plan.order(len(mixture.replayed), already_replayed=already_replayed))
        model: Any = language_model.model
        device = model.device
        if self.sharded and device.type == "cpu" and torch.cuda.is_available():
            device = torch.device("cuda")  # where its shards will be
        precision = _precision(recipe, device)
        if recipe.method == "full" and model.dtype != torch.float32:
            warnings.warn(
                f"the weights are in {str(model.dtype).removeprefix('torch.')}, which rounds small updates away; load "
                "them in float32, and let the recipe's precision save time and memory",
                stacklevel=2,
            )
        torch.manual_seed(recipe.seed)
        if recipe.method == "lora":
            model = self._adapted = _with_lora(model, recipe)
        run: dict[str, Any] = {
            "base": language_model.weights_hash,
            "text": language_model.text_settings,
            "task": task.fingerprint,
            "plan": [plan.fingerprint, plan.ratio, plan.seed] if plan is not None else None,
            "selector": selector.settings() if selector is not None else None,
            "recipe": recipe.model_dump(),
            "precision": precision,
        }
        further = {
            "already_replayed": already_replayed,
            "compiled": language_model.loading.get("compiled"),
            "sharded": self.sharded,
        }
        run |= {name: value for name, value in further.items() if value}
        hollow = _hollow(model) if self.sharded else None
        with (
            _checkpoints(checkpoints, run) as (directory, latest),
            _recomputing(self.base.model, recipe),
            keeping_forward(model),
            fused_loss(model, recipe.fused_loss, mixture.collate([mixture[0]])),
            without_bars(),
        ):
            progress = _Progress(on_step, on_loss, saves=checkpoints is not None and not self.sharded)
            steps = mixture.steps
            if not _take_trained(model, mixture, progress, Path(directory)):
                own: dict[str, Any] = {}
                if recipe.has_own_loss:
                    if self.sharded:
                        raise ConfigError("kl_weight, replay_weight and easy_samples are not for a sharded model")
                    # Of LoRA, the start is the model without its adapter.
                    start = None if recipe.method == "lora" else dict(initial.weights or self._weights)
                    own = {"mixture": mixture, "recipe": recipe, "start": start}
                arguments = _arguments(
                    recipe, mixture, device, micro, directory, precision, logs=on_loss is not None, sharded=self.sharded
                )
                if self.sharded:
                    processes.let_shard()
                trainer = (WeightedTrainer if own else Trainer)(
                    **own,
                    model=model,
                    args=arguments,
                    train_dataset=mixture,
                    data_collator=mixture.collate,
                    callbacks=[ReplayCallback(mixture, selector), progress, *callbacks],
                )
                trainer.remove_callback(_printer())
                _train(trainer, progress, directory, latest, recipe)
                steps = trainer.state.global_step  # a callback may have stopped it early
                if hollow is not None:
                    model = _filled(hollow, trainer.accelerator.get_state_dict(trainer.model_wrapped))
        tuned = replace(self.base, model=model.eval(), name=f"{self.base.name}, fine-tuned")
        tokens, replayed = mixture.tokens_before(steps), mixture.replayed_before(steps)
        return Tuned(tuned, steps, replayed, progress.seconds, tokens, plan, run, precision)

    def keep(self, tuned: Tuned, checkpoints: Path) -> None:
        """Keep a finished fine-tune, the latest of this tuner, where `tune` finds it instead of training again."""
        trained = {name: value for name, value in tuned.language_model.model.named_parameters() if value.requires_grad}
        # The folder may be new, or have what is left of another run.
        (checkpoints / f"{_TRAINED}.json").unlink(missing_ok=True)
        write_json(checkpoints / "run.json", tuned.run)
        save_weights(_copy(trained), checkpoints / f"{_TRAINED}.safetensors")
        # Last, so that the weights are complete where it is.
        write_json(checkpoints / f"{_TRAINED}.json", {"replayed": list(tuned.replayed), "seconds": tuned.seconds})


def _train(trainer: Trainer, progress: _Progress, directory: str, latest: str | None, recipe: Recipe) -> None:
    """Train from the latest checkpoint on; raise Interrupted after a signal, DataError where the loss is not finite."""
    # The Trainer ends with a garbage collection, which need not search all modules.
    gc.freeze()
    try:
        if progress.saves:
            with stoppable("stopping after this step") as progress.stop:
                loss = trainer.train(resume_from_checkpoint=latest).training_loss
                if progress.stopped:
                    raise progress.stop.interrupted(
                        f"after step {trainer.state.global_step} of {trainer.state.max_steps}"
                    )
        else:
            loss = trainer.train().training_loss
    except (pickle.UnpicklingError, SafetensorError, EOFError, RuntimeError) as error:
        _raise_for_checkpoint(error, directory, latest)
        raise
    finally:
        gc.unfreeze()
    if not loss < float("inf"):
        raise DataError(f"the training loss became {loss}; lower the recipe's learning_rate ({recipe.learning_rate:g})")


def _take_trained(model: Any, mixture: ReplayMixture, progress: _Progress, checkpoints: Path) -> bool:
    """Take over a fine-tune that `FineTuner.keep` kept; return whether there is one.

    Raises
    ------
    DataError
        If it cannot be read.
    """
    path = checkpoints / f"{_TRAINED}.json"
    if not path.exists():
        return False
    kept, weights = read_json(path), load_weights(path.with_suffix(".safetensors"))
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if not isinstance(kept, dict) or not {"replayed", "seconds"} <= kept.keys() or trained.keys() != weights.keys():
        raise DataError(f"{path} is damaged; remove it, and the fine-tune goes on from its last checkpoint")
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(weights[name])
    if mixture.replayed:
        mixture.revise(0, kept["replayed"])
    progress.seconds = float(kept["seconds"])
    return True


def _easy_weights(language_model: LanguageModel, task: Pool, recipe: Recipe) -> dict[str, float]:
    """Weight the examples of a task by how well a model predicts them before the fine-tune."""
    losses = score(language_model, task, max_length=min(recipe.max_length, language_model.context)).nll
    return dict(zip(task.ids, easy_weights(losses).tolist(), strict=True))


def _learning_rates(recipe: Recipe, steps: int) -> list[float]:
    """Return the learning rate of each step, relative to its peak."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    name = recipe.schedule if recipe.schedule != "constant" else "constant_with_warmup"
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=recipe.warmup_steps, num_training_steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return rates


def _copy(state: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a state into CPU memory: on a GPU, a fine-tune needs the place."""
    return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}


def _check_shardable(base: LanguageModel) -> None:
    """Raise ConfigError unless several processes can share a model's weights."""
    if processes.count() < 2:
        raise ConfigError(
            "--fsdp shares a model among processes, and there is one; start several: torchrun --nproc-per-node 2 -m "
            "forgetcast.cli train ..."
        )
    if base.is_quantized:
        raise ConfigError(f"{base.name} is quantised, so its weights cannot be sharded; leave out --fsdp")
    if (
        getattr(adapters.base_model(base.model), "hf_device_map", None)
        and len({p.device for p in base.model.parameters()}) > 1
    ):
        raise ConfigError(
            "--device auto spreads the layers over the devices, --fsdp shards them; leave out one of the two"
        )
    if "compiled" in base.loading:
        raise ConfigError("--compile and --fsdp were not made to work together; leave out one of the two")


def _check_launcher(*, sharded: bool) -> None:
    """Raise ConfigError if `accelerate launch` was configured to wrap the model in a way that is not supported."""
    wanted = {
        name for name in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"
    }
    if "DEEPSPEED" in wanted:
        raise ConfigError("the configuration of accelerate asks for DeepSpeed, which is not supported; leave it out")
    if "FSDP" in wanted and not sharded:
        raise ConfigError("the configuration of accelerate asks for FSDP; leave it out there, and give `train` --fsdp")


def _hollow(model: Any) -> Any:
    """Copy a model without its weights."""
    without: dict[int, Any] = {
        id(value): torch.nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)
        for value in model.parameters()
    }
    return copy.deepcopy(model, without)


def _filled(hollow: Any, state: Mapping[str, torch.Tensor]) -> Any:
    """Give a hollow copy the weights that were gathered; in all processes but the first there are none."""
    if state:
        hollow.load_state_dict(state, assign=True)
        adapters.base_model(hollow).tie_weights()
    return hollow


def _precision(recipe: Recipe, device: torch.device) -> str:
    """Return what the passes of a fine-tune compute in.

    Raises
    ------
    ConfigError
        If the GPU has not what the recipe asks for.
    """
    # PyTorch imitates it on older GPUs, slowly.
    has_it = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if recipe.precision == "auto":
        return "bfloat16" if device.type == "cuda" and has_it else "float32"
    if recipe.precision == "bfloat16" and not has_it:
        raise ConfigError("precision: this GPU does not compute in bfloat16; use float32, or auto")
    return recipe.precision


def _check_trainable(base: LanguageModel, recipe: Recipe) -> None:
    """Raise ConfigError unless a quantised model can be tuned as the recipe says."""
    if recipe.method != "lora":
        raise ConfigError(f"{base.name} is quantised, so its weights cannot be trained; use a recipe with method: lora")
    quantizer: Any = base.model.hf_quantizer
    if not quantizer.is_trainable:
        method = quantizer.quantization_config.quant_method
        raise ConfigError(
            f"models quantised with {getattr(method, 'value', method)} cannot be trained, not with LoRA "
            "either; use the unquantised model"
        )


def _with_lora(model: Any, recipe: Recipe) -> PeftModel:
    """Add LoRA to all linear layers, those of fused experts included, but not to the output layer and routers.

    PEFT's own "all-linear" trains the routers of some mixtures of experts, and leaves out the experts of others. Its
    preparation of quantised models is left out on purpose: it changes the type of the other weights, and so the losses
    that the fine-tune is compared with.
    """
    output = model.get_output_embeddings()
    modules = [
        name for name, module in model.named_modules() if module is not output and _is_linear(name, module, model)
    ]
    parameters = [
        name
        for name, value in model.named_parameters()
        if value.ndim == 3 and value.is_floating_point() and ".experts." in name
    ]
    if parameters:
        # PEFT takes modules of these names for experts of an old format, so their weights are named instead.
        odd = [name for name in modules if name.rpartition(".")[2] in _NAMES_OF_EXPERTS]
        modules = [name for name in modules if name not in odd]
        parameters += [f"{name}.weight" for name in odd]
    lora = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        target_modules=modules,
        target_parameters=parameters or None,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, lora)
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        raise ConfigError(f"LoRA cannot be added to the model: {' '.join(str(error).split())[:300]}") from error


def _is_linear(name: str, module: Any, model: Any) -> bool:
    """Whether a module is a linear layer and no router."""
    is_linear = isinstance(module, torch.nn.Linear | Conv1D)
    if getattr(model, "is_quantized", False):  # then the layers may be of classes of their own
        is_linear |= all(isinstance(getattr(module, size, None), int) for size in ("in_features", "out_features"))
    return is_linear and _ROUTERS.isdisjoint(name.split("."))


def save_weights(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write weights as one safetensors file, atomically."""
    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary)


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read weights that `save_weights` wrote, into CPU memory.

    Raises
    ------
    DataError
        If it cannot be read.
    """
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read ({error}); remove it and the stage will be re-run") from None


@contextmanager
def _checkpoints(directory: Path | None, run: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Yield the directory for checkpoints (by default a temporary one) and its last complete checkpoint."""
    if directory is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield scratch, None
        return
    if (directory / "run.json").exists():
        if read_json(directory / "run.json") != run:
            raise MismatchError(
                f"{directory} holds an unfinished run of another model, task, plan or recipe; finish it, or remove it"
            )
    else:
        write_json(directory / "run.json", run)
    kept = sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    while kept and not _is_complete(kept[-1]):
        shutil.rmtree(kept.pop(), ignore_errors=True)  # another process may be removing it too
    yield str(directory), str(kept[-1]) if kept else None


@contextmanager
def _recomputing(model: Any, recipe: Recipe) -> Iterator[None]:
    """Enable gradient checkpointing if the recipe asks for it."""
    if not recipe.gradient_checkpointing:
        yield
        return
    # Newer versions of Transformers call it activation checkpointing and warn about the old name.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    try:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(f"gradient_checkpointing: {error}") from None
    try:
        yield
    finally:
        getattr(model, f"{name}_checkpointing_disable")()
        model.disable_input_require_grads()


def _is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written completely: the Trainer writes this file last."""
    try:
        read_json(checkpoint / "trainer_state.json")
    except DataError:
        return False
    return True


def _raise_for_checkpoint(error: Exception, directory: str, latest: str | None) -> None:
    """Raise DataError if a checkpoint could not be read or written; errors of the training itself pass."""
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    if isinstance(error, pickle.UnpicklingError | EOFError) or "PytorchStreamReader" in reason:
        raise DataError(
            f"the checkpoint {latest} cannot be read: {reason}; remove it to start from the one before"
        ) from error
    if isinstance(error, SafetensorError) or "PytorchStreamWriter" in reason:
        raise DataError(
            f"a checkpoint in {directory} cannot be read or written: {reason}; make room on the disk, or remove "
            f"{latest or 'it'}, and run the same command again"
        ) from error


def _arguments(
    recipe: Recipe,
    mixture: ReplayMixture,
    device: torch.device,
    micro: int,
    directory: str,
    precision: str,
    *,
    logs: bool,
    sharded: bool,
) -> TrainingArguments:
    on_gpu = device.type == "cuda"
    sharding: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2}} if sharded else {}
    arguments = TrainingArguments(
        output_dir=directory,
        max_steps=mixture.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=recipe.batch_size // (micro * processes.count()),
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule if recipe.schedule != "constant" else "constant_with_warmup",
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        seed=recipe.seed,
        bf16=precision == "bfloat16",
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=on_gpu,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        save_strategy="no",  # at fixed time intervals instead, see _Progress
        save_total_limit=1,
        logging_strategy="steps" if logs else "no",
        logging_steps=STEPS_BETWEEN_LOSSES,
        logging_nan_inf_filter=False,  # the default hides a loss that is not finite, which is an error here
        report_to="none",
        disable_tqdm=True,
        **sharding,
    )
    if arguments.n_gpu > 1:
        # Otherwise the Trainer gives every GPU a batch, and a step has more examples than the recipe says.
        arguments._n_gpu = 1
    return arguments


def _printer() -> type[TrainerCallback]:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


class _Progress(TrainerCallback, ExportableState):
    """Report the Trainer's steps and losses, request a checkpoint at intervals, and stop with one when asked to.

    Attributes
    ----------
    saves : bool
        Whether checkpoints are written.
    seconds : float
        Of the training, those before an interruption included.
    stop : Stop
        What signals ask for.
    stopped : bool
        Whether the training was ended for it.
    """

    def __init__(
        self, on_step: Callable[[int, int], None] | None, on_loss: Callable[[float], None] | None, *, saves: bool
    ) -> None:
        self._on_loss = on_loss
        self._on_step, self.saves, self._saved = on_step, saves, time.monotonic()
        self.seconds, self._started = 0.0, time.monotonic()
        self.stop, self.stopped = Stop(), False

    def state(self) -> dict[str, Any]:
        """Trainer hook: return what to keep in a checkpoint."""
        return {"args": {}, "attributes": {"seconds": self.seconds + time.monotonic() - self._started}}

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Trainer hook."""
        kept = state.stateful_callbacks.setdefault(type(self).__name__, {})  # a checkpoint may be an earlier version's
        self.seconds, self._started = float(kept.get("attributes", {}).get("seconds", 0.0)), time.monotonic()

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Trainer hook."""
        self.seconds += time.monotonic() - self._started

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Trainer hook."""
        if self._on_step is not None:
            self._on_step(state.global_step, state.max_steps)
        due = self.saves and time.monotonic() - self._saved >= SECONDS_BETWEEN_CHECKPOINTS
        if processes.count() > 1:  # all save the same step, whatever their clocks say
            due = state.global_step % STEPS_BETWEEN_LOSSES == 0 and processes.from_first(due)
        if due:
            control.should_save = True
        if self._asked(state.global_step):
            self.stopped = control.should_save = control.should_training_stop = True

    def _asked(self, step: int) -> bool:
        """Whether a signal asked any of the processes to stop: all must, or none."""
        if processes.count() == 1:
            return bool(self.stop)
        return step % STEPS_BETWEEN_LOSSES == 0 and any(processes.from_all(bool(self.stop)))

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Trainer hook."""
        self._saved = time.monotonic()

    def on_log(self, args: TrainingArguments, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Trainer hook."""
        loss = given.get("logs", {}).get("loss")
        if self._on_loss is not None and loss is not None:
            self._on_loss(float(loss))
