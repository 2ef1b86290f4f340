"""A gauge of forgetting for any Trainer: probes scored by the model in training, completed, and logged."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from forgetcast.atlas.store import Atlas
from forgetcast.completion.watch import MEAN, AtlasGauge, Gauge, Reading, SampleGauge, WatchedRun, check_names
from forgetcast.data.pool import Pool
from forgetcast.data.rendering import Rendering
from forgetcast.defaults import PROBES, WATCH_EVERY
from forgetcast.errors import ConfigError, DataError, MismatchError
from forgetcast.lm import processes
from forgetcast.lm.curve import same_randomness, undisturbed
from forgetcast.lm.load import LanguageModel
from forgetcast.lm.score import Inputs, prepare, prepared_losses
from forgetcast.measure.gates import Gate
from forgetcast.measure.scores import Scores, check_tokens, length_settings

SAME_LOSS = 1e-3
"""Nats per token, on the average of the probes, by which two measurements of the base may differ in single precision;
in a coarser type, twice its relative precision."""

TRADE = "forgetting_and_loss"
"""Metric of `save_best`: the loss on the evaluation data plus the mean forgetting, both in nats per token."""

_SAVE_BEST = (
    'save_best needs evaluations, and a Trainer that keeps the best: set eval_strategy="steps", save_strategy="best" '
    f'and metric_for_best_model="{TRADE}" in TrainingArguments, and leave greater_is_better out'
)


class ForgettingMonitor(TrainerCallback, ExportableState):
    """Log how much a model forgets while it is trained: a callback for Trainer and its subclasses, TRL's too.

    Every so many steps, before the first and after the last one, the probes are scored by the model in training, and
    their forgetting is completed to that of the whole pool. What is logged, to whatever the Trainer reports to:
    `forgetting/mean`, `forgetting/worst_tenth` and `forgetting/SOURCE` for the largest sources, each with `_lower` and
    `_upper`, the ends of its 90 % interval; `forgetting/end_of_run`, the mean that is forecast for the last step, if
    the atlas has learning curves; `forgetting/misfit`; and `forgetting/share_of_time`, what the monitor took of the
    run's time so far. The intervals of mean and worst tenth are guaranteed, those of the sources model-based; see
    `Forecast.mean_interval`.

    The tokenizer is the Trainer's `processing_class`. The trained weights are those of a training without a monitor, to
    the last bit.

    Parameters
    ----------
    atlas : Atlas or path, optional
        Of the base model that the training starts from.
    pool : Pool or path, optional
        In place of an atlas: a random sample of it is scored, which gives the mean only.
    probes : int
        Examples to score. Of an atlas, a sixth of them are chosen, the others random.
    every : int
        Optimiser steps from look to look.
    stop_if : str, optional
        Condition that ends the training, such as "lower > .1": a figure by its name in the log, without `forgetting/`,
        one of < > <= >=, and a number. `lower` and `upper` are the ends of the interval of the mean.
    warn_if : str, optional
        Condition that is warned of, once.
    save_best : bool
        Give the Trainer's evaluations the metric 'forgetting_and_loss', the loss plus the mean forgetting. With
        `save_strategy="best"` and this as `metric_for_best_model`, the Trainer keeps the checkpoint where it is least.

    Attributes
    ----------
    readings : list of Reading
        All looks so far, also after the training.
    gauge : Gauge
        Which examples are probes, and what they say of the others.
    every : int

    Raises
    ------
    ConfigError
        If neither an atlas nor a pool is given, or both; or a condition cannot be read. When the training begins: if
        the Trainer has no tokenizer, or would not keep the best.
    MismatchError
        When the training begins: if the model is not the atlas's base, as where an adapter is not neutral at the start,
        or the tokenizer makes other tokens of the probes.
    DataError
        If the atlas or pool cannot be read, or has too little for a forecast.
    """

    def __init__(
        self,
        atlas: Atlas | str | Path | None = None,
        *,
        pool: Pool | str | Path | None = None,
        probes: int = PROBES,
        every: int = WATCH_EVERY,
        stop_if: str | None = None,
        warn_if: str | None = None,
        save_best: bool = False,
    ) -> None:
        if (atlas is None) == (pool is None):
            raise ConfigError("a monitor needs either an atlas or a pool: ForgettingMonitor('runs.atlas')")
        if every < 1:
            raise ConfigError(f"every={every}: the steps from look to look are at least 1")
        self._settings = {
            "atlas": None if atlas is None else str(atlas.path if isinstance(atlas, Atlas) else atlas),
            "pool": str(pool) if isinstance(pool, str | Path) else None,
            "probes": probes,
            "every": every,
            "stop_if": stop_if,
            "warn_if": warn_if,
            "save_best": save_best,
        }
        self._atlas = Atlas.open(atlas) if isinstance(atlas, str | Path) else atlas
        self.gauge: Gauge
        if self._atlas is not None:
            self.gauge = AtlasGauge(self._atlas, probes)
        else:
            self.gauge = SampleGauge(pool if isinstance(pool, Pool) else Pool.load(str(pool)), probes)
        self._stop_if, self._warn_if = (self._condition(each) for each in (stop_if, warn_if))
        self.every, self._save_best = every, save_best
        self._run: _Run | None = None
        self._said: set[str] = set()
        self.kept: dict[str, Any] | None = None
        self.readings: list[Reading] = []
        self.stopped: str | None = None

    def _condition(self, text: str | None) -> Gate | None:
        if text is None:
            return None
        gate = Gate.parse(text)
        return Gate(gate.text, check_names(self.gauge.names, gate.figure, gate.text), gate.comparison, gate.bound)

    def state(self) -> dict[str, Any]:
        """Trainer hook: return what a resumed training needs, to keep in a checkpoint."""
        return {"args": self._settings, "attributes": {"kept": self.kept}}

    def run(self, name: str = "") -> WatchedRun:
        """Return the looks so far, ready to be saved under the name of a task.

        Raises
        ------
        DataError
            If no training was watched.
        """
        if self._run is None:
            raise DataError("this monitor has not watched a training yet")
        pool, atlas = self._run.examples, None if self._atlas is None else str(self._atlas.path)
        fingerprint = self._atlas.pool_fingerprint if self._atlas is not None else pool.fingerprint
        series, ids = tuple(self.readings), tuple(pool.ids)
        return WatchedRun(name, self._run.steps, atlas, fingerprint, ids, series, self.stopped)

    @property
    def watching(self) -> bool:
        """Whether a training has begun that calls this monitor, and has not ended."""
        return self._run is not None and not self._run.over

    def forgetting(self) -> np.ndarray | None:
        """Return what the model in training has forgotten of each probe by now, shape (k,), nats per token.

        The probes are scored once per step, whoever asks first. None while no training is watched, before its first
        step, and where the loss of a probe is not finite.
        """
        run = self._run
        if run is None or run.over or not run.state.global_step:
            return None
        started = time.monotonic()
        forgotten = run.losses() - run.before
        run.spent += time.monotonic() - started
        return forgotten if np.isfinite(forgotten).all() else None

    @same_randomness()
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: Any,
        control: Any,
        model: Any = None,
        processing_class: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Trainer hook: check that the model is the base, and take the first look.

        Raises
        ------
        ConfigError, MismatchError, DataError
            As for the class.
        """
        self._check_saving(args)
        started = time.monotonic()
        # A processor has a tokenizer, and so has a `ReplayMixture`.
        owner = train_dataloader.dataset if processing_class is None else processing_class
        tokenizer = getattr(owner, "tokenizer", owner)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ConfigError("the monitor needs the tokenizer: give it to the Trainer as processing_class")
        stored = {} if self._atlas is None else self._atlas.scored_with
        language_model = LanguageModel(model, tokenizer, "the model in training", Rendering.of(stored))
        examples, lengths = self.gauge.examples, length_settings(stored, language_model.context)
        inputs = prepare(language_model, examples, **lengths)
        if self._atlas is not None:
            _check_inputs(self._atlas, examples, inputs)
        elif unusable := [id_ for id_, reason in zip(examples.ids, inputs.reasons, strict=True) if reason]:
            self._say(f"{len(unusable)} of {len(examples)} sampled examples have no token to predict, and are left out")
            examples = self.gauge.without(unusable)
            inputs = prepare(language_model, examples, **lengths)
        if isinstance(self.gauge, AtlasGauge) and self.gauge.growth is None:
            self._say(
                f"nothing is said of the end of the run: {self._settings['atlas']} has too few learning curves; "
                "collect with checkpoints: [0.1, 0.25, 0.5] in the configuration"
            )
        self._run = _Run(language_model, examples, inputs, state, started)
        kept = self._kept_in(state) if state.global_step else None
        if kept is not None:
            self._run.before = np.array(kept["before"])
            self.readings = [Reading.model_validate(each) for each in kept["readings"]]
        else:
            self._run.before = self._first(state.global_step)
            self.readings = []
        self.stopped = None
        if state.global_step == 0 or not self.readings:
            self._look(state, control)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Trainer hook: look every so many steps, and after the last one."""
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            self._look(state, control)

    def on_epoch_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Trainer hook: look at the end of a training that stops early."""
        if control.should_training_stop:
            self._look(state, control)

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Trainer hook."""
        if self._run is not None:
            self._run.over = True

    def on_evaluate(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: Any,
        control: Any,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Trainer hook: add what `save_best` judges by to the metrics that the Trainer chooses by."""
        if not self._save_best or self._run is None or metrics is None:
            return
        self._look(state, control)
        if not self.readings or self.readings[-1].step != state.global_step:
            return  # the losses of the probes are not finite, which was said
        mean = self.readings[-1].figures[MEAN].value
        added = {
            f"{name.removesuffix('loss')}{TRADE}": value + mean
            for name, value in metrics.items()
            if name.endswith("loss")
        }
        metrics |= added
        self._log(control, {name.removeprefix("eval_"): value for name, value in added.items()})

    def _check_saving(self, args: TrainingArguments) -> None:
        if not self._save_best:
            return
        wanted = (args.metric_for_best_model or "").endswith(TRADE) and not args.greater_is_better
        if args.eval_strategy == IntervalStrategy.NO or args.save_strategy != SaveStrategy.BEST or not wanted:
            raise ConfigError(_SAVE_BEST)

    def _kept_in(self, state: Any) -> dict[str, Any] | None:
        """Return what a checkpoint has of this monitor's looks at the same probes; None if it has nothing."""
        assert self._run is not None
        found = state.stateful_callbacks.get(type(self).__name__, [])
        for entry in found if isinstance(found, list) else [found]:
            kept: dict[str, Any] | None = entry.get("attributes", {}).get("kept")
            if kept is not None and kept["probes"] == list(self._run.examples.ids):
                return kept
        return None

    def _first(self, step: int) -> np.ndarray:
        """Return the losses that forgetting is measured from, shape (k,): those of the model before its first step."""
        run = self._run
        assert run is not None
        atlas = self._atlas
        stored = None if atlas is None else atlas.nll_before[atlas.examples.positions(run.examples.ids)]
        if step:
            if stored is None:
                raise ConfigError(
                    "the checkpoint says nothing of this monitor, so the losses before the training are not known; "
                    "watch from the first step on, or give an atlas of the base model"
                )
            self._say(
                "the training goes on from a checkpoint that says nothing of this monitor: forgetting is measured from "
                f"the base scores of {self._settings['atlas']}, and whether they are of this base cannot be checked"
            )
            return stored
        measured = run.losses()
        if not np.isfinite(measured).all():
            bad = int(np.argmin(np.isfinite(measured)))
            reason = run.inputs.reasons[bad] or "its loss is not finite"
            raise DataError(f"the probe {run.examples.ids[bad]!r} cannot be scored before the training: {reason}")
        if atlas is not None and stored is not None:
            types = {run.language_model.model.dtype, getattr(torch, atlas.scored_with.get("dtype", "float32"))}
            tolerance = max(SAME_LOSS, *(2 * torch.finfo(each).eps for each in types))
            if (difference := float(np.abs(measured - stored).mean())) > tolerance:
                raise MismatchError(
                    f"the model in training is not the base of {atlas.path}: before the first step, its losses on the "
                    f"probes differ by {difference:.3g} nats per token on average (at most {tolerance:.2g}). It is "
                    f"another model than {atlas.model}, or its adapter is not neutral at the start; without an atlas "
                    "of it, use ForgettingMonitor(pool=...)"
                )
        # Measured as all later looks are, so that the type of the weights and the machine do not matter.
        return measured

    @same_randomness()
    def _look(self, state: Any, control: Any) -> None:
        """Score the probes, log what they say of the pool, and do what the conditions ask for; once per step."""
        run, step = self._run, int(state.global_step)
        if run is None or run.looked == step:
            return
        started, run.looked = time.monotonic(), step
        losses = run.losses()
        if np.isfinite(losses).all():
            progress = min(step / max(run.steps, 1), 1.0)
            figures, sources, misfit = self.gauge.read(losses - run.before, progress)
            run.spent += time.monotonic() - (started if step else run.begun)
            share = min(run.spent / max(time.monotonic() - run.begun, 1e-9), 1.0)
            given = {"step": step, "progress": progress, "figures": figures, "sources": sources, "misfit": misfit}
            # The first process decides for all.
            reading = processes.from_first(Reading(**given, share_of_time=share))
            self.readings.append(reading)
            self.kept = {
                "probes": list(run.examples.ids),
                "before": run.before.tolist(),
                "readings": [each.model_dump() for each in self.readings],
            }
            self._log(control, reading.named() | {"share_of_time": reading.share_of_time})
            if step:
                self._judge(reading, control)
            return
        bad = run.examples.ids[int(np.argmin(np.isfinite(losses)))]
        self._say(f"step {step}: the loss of the probe {bad!r} is not finite any more, so that forgetting is not known")
        if self._stop_if is not None:
            self._stop(control, f"step {step}: the loss of a probe is not finite")

    def _judge(self, reading: Reading, control: Any) -> None:
        values = reading.named()
        for gate in (self._warn_if, self._stop_if):
            if gate is None or gate.figure not in values or not gate.holds(values[gate.figure]):
                continue
            what = f"step {reading.step}: forgetting {gate.text} ({values[gate.figure]:.4g} nats per token)"
            if gate is self._stop_if:
                self._stop(control, what)
            elif gate.text not in self._said:
                self._said.add(gate.text)
                self._say(what)

    def _stop(self, control: Any, what: str) -> None:
        control.should_training_stop = True
        self.stopped = what
        self._say(f"the training is stopped at {what}")

    def _log(self, control: Any, values: Mapping[str, float]) -> None:
        """Give figures to all that the Trainer reports to; a tracker that fails does not end the training."""
        assert self._run is not None
        asked = control.should_log  # by the Trainer's own loss; any log answers it
        logs = {f"forgetting/{name}": float(value) for name, value in values.items()}
        try:
            # Not that of a subclass: TRL's would write its own averages with these, and begin new ones.
            Trainer.log(self._run.trainer, logs)
        except Exception as error:  # each tracker has exceptions of its own
            if "tracker" not in self._said:
                self._said.add("tracker")
                reason = " ".join(str(error).split())[:200]
                self._say(f"forgetting could not be logged ({type(error).__name__}: {reason}); the training goes on")
        control.should_log = asked

    def _say(self, what: str) -> None:
        if processes.index() == 0:
            warnings.warn(what, stacklevel=2)


class _Run:
    """A training that is watched: its model, and what is measured of it."""

    def __init__(self, language_model: LanguageModel, examples: Pool, inputs: Inputs, state: Any, begun: float) -> None:
        self.language_model, self.examples, self.inputs = language_model, examples, inputs
        self.state, self.steps = state, int(state.max_steps)
        self.begun, self.spent = begun, 0.0
        self.trainer = _trainer()
        self.before = np.empty(0)
        self.looked, self.over = -1, False
        self._latest: tuple[int, np.ndarray] | None = None

    def losses(self) -> np.ndarray:
        """Return the losses of the probes at this step, shape (k,); NaN where one is not finite, or memory is short."""
        step = int(self.state.global_step)
        if self._latest is None or self._latest[0] != step:
            with undisturbed(self.language_model.model):
                self._latest = step, prepared_losses(self.language_model, self.inputs)
        return self._latest[1]


def _trainer() -> Trainer:
    """Return the Trainer that is calling: its callbacks are not told, and only it knows all that it reports to."""
    # Found in the interpreter's frames, once, when the training begins. Nothing that a callback is given leads to the
    # Trainer or to its other callbacks. To add to the figures in `on_log` is too late: trackers come before the
    # user's callbacks. To ask for a log by `control.should_log` ends the averages of the Trainer's own loss, and TRL's,
    # at other steps than without the monitor, and brings none before the first step.
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    raise ConfigError("a ForgettingMonitor is called by a Trainer of transformers; give it as one of its callbacks")


def _check_inputs(atlas: Atlas, examples: Pool, inputs: Inputs) -> None:
    """Raise MismatchError if the probes have other tokens or targets than the base model was scored on."""
    nothing = np.zeros(len(examples))
    made = Scores(
        ids=examples.ids,
        nll=nothing,
        tokens=nothing.astype(np.int64),
        truncated=nothing.astype(bool),
        reasons=[None] * len(examples),
        metadata={},
        digests=inputs.digests,
    )
    different = check_tokens(atlas.baseline, made, allow_different=True)
    if different:
        raise MismatchError(
            f"the Trainer's tokenizer makes other tokens or targets of {different} of {len(examples)} probes than the "
            f"base of {atlas.path} was scored on: tokenizer, chat template or longest input differ; use those of "
            f"{atlas.model}"
        )
