"""A gauge of forgetting in a training: what it says, that it changes nothing, and what it refuses."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import scipy
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from forgetcast import Atlas, ConfigError, MismatchError
from forgetcast.lm import ForgettingMonitor, LanguageModel, score
from forgetcast.lm.tokens import encode
from support.data import make_pool
from support.models import tiny
from support.training import POOL, TASK, measured_atlas

# SFTConfig's own default goes by the name of before.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:nothing is said of the end of the run:UserWarning"),
]

STEPS = 6
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "logging_steps": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    return measured_atlas(tmp_path_factory.mktemp("atlas"))


class Recorder(TrainerCallback):
    """A tracker that keeps what it is given."""

    def __init__(self) -> None:
        self.logs: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        self.logs.append((state.global_step, dict(logs)))

    def of(self, name: str) -> list[tuple[int, float]]:
        return [(step, logs[name]) for step, logs in self.logs if name in logs]


def rows(language_model: LanguageModel) -> list[dict[str, list[int]]]:
    encoded = [encode(example, language_model.tokenizer, 96, end=True) for example in TASK]
    return [{"input_ids": each.ids, "labels": each.labels} for each in encoded]


def plain_trainer(
    language_model: LanguageModel, folder: Path, callbacks: Sequence[TrainerCallback], **options: Any
) -> Trainer:
    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)
        ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in batch]
        labels = [row["labels"] + [-100] * (longest - len(row["labels"])) for row in batch]
        mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}

    data: Any = rows(language_model)
    return Trainer(
        model=language_model.model,
        args=TrainingArguments(output_dir=str(folder), **(SETTINGS | {"remove_unused_columns": False} | options)),
        train_dataset=data,
        eval_dataset=data[:4] if "eval_strategy" in options else None,
        data_collator=collate,
        processing_class=language_model.tokenizer,
        callbacks=list(callbacks),
    )


def sft_trainer(
    language_model: LanguageModel, folder: Path, callbacks: Sequence[TrainerCallback], **options: Any
) -> SFTTrainer:
    return SFTTrainer(
        model=language_model.model,
        args=SFTConfig(output_dir=str(folder), **(SETTINGS | {"max_length": 64} | options)),
        train_dataset=datasets.Dataset.from_list(rows(language_model)),
        processing_class=language_model.tokenizer,
        callbacks=list(callbacks),
    )


def with_lora(language_model: LanguageModel, *, neutral: bool = True) -> LanguageModel:
    torch.manual_seed(0)
    lora = LoraConfig(
        r=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=neutral
    )
    return replace(language_model, model=get_peft_model(language_model.model, lora))


def with_dropout(language_model: LanguageModel) -> LanguageModel:
    for layer in language_model.model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    return language_model


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore:Padding-free training is enabled:UserWarning")
@pytest.mark.parametrize(
    ("make", "change", "options"),
    [
        (plain_trainer, with_dropout, {}),
        (plain_trainer, with_lora, {"gradient_accumulation_steps": 2, "max_steps": 5}),
        (plain_trainer, with_dropout, {"bf16": True, "gradient_accumulation_steps": 2}),
        (sft_trainer, with_dropout, {}),
        (sft_trainer, with_lora, {"packing": True, "packing_strategy": "wrapped"}),
    ],
)
def test_the_weights_are_those_without_it(
    atlas: Atlas,
    tmp_path: Path,
    make: Callable[..., Trainer],
    change: Callable[[LanguageModel], LanguageModel],
    options: dict[str, Any],
) -> None:
    found = []
    for callbacks in ([], [ForgettingMonitor(atlas, probes=8, every=1)]):
        language_model = change(tiny())
        trainer = make(language_model, tmp_path, callbacks, **options)
        trainer.train()
        found.append((weights(language_model.model), [log.get("loss") for log in trainer.state.log_history]))
    assert all(torch.equal(found[0][0][name], value) for name, value in found[1][0].items())
    assert any(not torch.equal(value, weights(change(tiny()).model)[name]) for name, value in found[0][0].items())
    # The Trainer's own losses are logged when they were, and TRL's averages are not cut short.
    assert [loss for loss in found[1][1] if loss is not None] == [loss for loss in found[0][1] if loss is not None]


def test_nothing_is_forgotten_before_the_first_step(atlas: Atlas, tmp_path: Path) -> None:
    """A few probes that lost nothing would be completed to what finished fine-tunes of the atlas forgot beside them."""
    monitor = ForgettingMonitor(atlas, probes=8, every=100)
    plain_trainer(tiny(), tmp_path, [monitor]).train()
    first, last = monitor.readings
    assert (first.step, first.misfit) == (0, None)
    assert set(first.named().values()) == {0.0}
    assert set(first.named()) == set(last.named()) - {"misfit"}
    assert last.figures["mean"].value != 0


def test_what_it_logs_is_what_the_model_forgot(atlas: Atlas, tmp_path: Path) -> None:
    recorder, monitor = Recorder(), ForgettingMonitor(atlas, probes=len(POOL), every=4)
    language_model = tiny()
    plain_trainer(language_model, tmp_path, [recorder, monitor]).train()
    language_model.model.eval()
    forgotten = score(language_model, POOL).nll - score(tiny(), POOL).nll
    assert [reading.step for reading in monitor.readings] == [0, 4, 6]
    assert recorder.of("forgetting/mean")[0] == (0, 0.0)
    assert recorder.of("forgetting/mean")[-1] == (6, pytest.approx(forgotten.mean(), abs=1e-5))
    assert recorder.of("forgetting/worst_tenth")[-1][1] == pytest.approx(np.sort(forgotten)[-4:].mean(), abs=1e-5)
    sources = np.array(POOL.sources)
    for source in set(POOL.sources):
        mean = recorder.of(f"forgetting/{source}")[-1][1]
        assert mean == pytest.approx(forgotten[sources == source].mean(), abs=1e-5)
    last = [logs for _, logs in recorder.logs if "forgetting/mean" in logs][-1]
    assert {f"forgetting/{name}" for name in ("mean_lower", "mean_upper", "misfit", "share_of_time")} <= set(last)
    assert 0 < last["forgetting/share_of_time"] <= 1
    assert "forgetting/end_of_run" not in last
    run = monitor.run()
    run.save(tmp_path / "run.json")
    assert type(run).load(tmp_path / "run.json") == run


def test_a_condition_ends_the_training_and_another_warns_once(atlas: Atlas, tmp_path: Path) -> None:
    whole = ForgettingMonitor(atlas, probes=8, every=1)
    plain_trainer(tiny(), tmp_path, [whole]).train()
    uppers = [reading.figures["mean"].upper or 0.0 for reading in whole.readings]
    bound = (uppers[2] + uppers[3]) / 2
    expected = next(step for step, upper in enumerate(uppers) if step and upper > bound)
    monitor = ForgettingMonitor(atlas, probes=8, every=1, warn_if="mean > -9", stop_if=f"upper>{bound}")
    trainer = plain_trainer(tiny(), tmp_path, [monitor])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.train()
    assert trainer.state.global_step == expected < STEPS
    assert monitor.readings[:-1] == [
        reading.model_copy(update={"share_of_time": ours.share_of_time})
        for reading, ours in zip(whole.readings[:expected], monitor.readings, strict=False)
    ]
    words = [str(each.message) for each in said]
    assert [each for each in words if "mean > -9" in each] == [
        f"step 1: forgetting mean > -9 ({monitor.readings[1].figures['mean'].value:.4g} nats per token)"
    ]
    assert [each for each in words if "is stopped" in each] == [f"the training is stopped at {monitor.stopped}"]
    assert f"upper>{bound}" in str(monitor.stopped)


def test_a_condition_that_does_not_hold_changes_nothing(atlas: Atlas, tmp_path: Path) -> None:
    monitor = ForgettingMonitor(atlas, probes=8, every=2, stop_if="lower >= 9", warn_if="s1_lower < -99")
    assert plain_trainer(tiny(), tmp_path, [monitor]).train().global_step == STEPS
    assert monitor.stopped is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stop_if": "lower"}, "'lower' is not a condition; write one as mean>0.05"),
        ({"stop_if": "lower > much"}, "is not a condition"),
        ({"warn_if": "lower > inf"}, "inf is not a finite number"),
        ({"warn_if": "__import__('os') > 1"}, "there is no figure"),
        ({"stop_if": "low > .1"}, "there is no figure 'low' here; there are lower, upper, "),
        ({"stop_if": "end_of_run > .1"}, "there is no figure 'end_of_run'"),
        ({"every": 0}, "every=0"),
        ({"probes": 1}, "1 probes: at least two are needed"),
        ({"pool": POOL}, "either an atlas or a pool"),
    ],
)
def test_settings_that_cannot_be_are_refused(atlas: Atlas, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ForgettingMonitor(atlas, **given)


def test_it_refuses_to_begin_where_its_figures_would_be_wrong(atlas: Atlas, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"the model in training is not the base of .*neutral at the start"):
        plain_trainer(tiny(seed=1), tmp_path, [ForgettingMonitor(atlas)]).train()
    with pytest.raises(MismatchError, match="the model in training is not the base"):
        plain_trainer(with_lora(tiny(), neutral=False), tmp_path, [ForgettingMonitor(atlas)]).train()
    with pytest.raises(MismatchError, match="the Trainer's tokenizer makes other tokens or targets of 30 of 30 probes"):
        plain_trainer(tiny(bos=False), tmp_path, [ForgettingMonitor(atlas)]).train()
    trainer = plain_trainer(tiny(), tmp_path, [ForgettingMonitor(atlas)])
    trainer.callback_handler.processing_class = None
    with pytest.raises(ConfigError, match="give it to the Trainer as processing_class"):
        trainer.train()
    for options in ({}, {"eval_strategy": "steps", "eval_steps": 2}):
        with pytest.raises(ConfigError, match="save_best needs evaluations"):
            plain_trainer(tiny(), tmp_path, [ForgettingMonitor(atlas, save_best=True)], **options).train()


def test_a_failing_tracker_does_not_end_the_training(atlas: Atlas, tmp_path: Path) -> None:
    class Broken(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
            if "forgetting/mean" in logs:
                raise ConnectionError("no route to the tracker")

    monitor = ForgettingMonitor(atlas, probes=8, every=1)
    trainer = plain_trainer(tiny(), tmp_path, [Broken(), monitor])
    with pytest.warns(UserWarning, match="ConnectionError: no route to the tracker.*; the training goes on") as said:
        assert trainer.train().global_step == STEPS
    assert sum("no route" in str(each.message) for each in said) == 1
    assert len(monitor.readings) == STEPS + 1
    assert [log["step"] for log in trainer.state.log_history if "loss" in log] == [2, 4, 6]


def test_losses_that_are_not_finite_are_said(atlas: Atlas, tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: ARG002
            if state.global_step == 3:
                with torch.no_grad():
                    model.get_input_embeddings().weight.fill_(float("nan"))

    monitor = ForgettingMonitor(atlas, probes=8, every=1, stop_if="mean > 99")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = plain_trainer(tiny(), tmp_path, [Poison(), monitor]).train()
    words = [str(each.message) for each in said]
    assert any(re.match("step 3: the loss of the probe .* is not finite any more", each) for each in words)
    assert result.global_step == 3
    assert monitor.stopped == "step 3: the loss of a probe is not finite"
    assert [reading.step for reading in monitor.readings] == [0, 1, 2]


def test_without_an_atlas_it_scores_a_random_sample(tmp_path: Path) -> None:
    pool = make_pool(60)
    recorder, monitor = Recorder(), ForgettingMonitor(pool=pool, probes=20, every=3, stop_if="mean > 99")
    language_model = tiny()
    plain_trainer(language_model, tmp_path, [recorder, monitor]).train()
    language_model.model.eval()
    run = monitor.run("a task")
    assert len(set(run.probes)) == 20
    assert run.atlas is None
    sample = pool.subset(run.probes)
    forgotten = score(language_model, sample).nll - score(tiny(), sample).nll
    error = forgotten.std(ddof=1) * np.sqrt(1 / 20 - 1 / 60)
    lower, upper = scipy.stats.t.interval(0.9, 19, forgotten.mean(), error)
    last = monitor.readings[-1].named()
    assert last["mean"] == pytest.approx(forgotten.mean(), abs=1e-6)
    assert (last["mean_lower"], last["mean_upper"]) == (pytest.approx(lower, abs=1e-6), pytest.approx(upper, abs=1e-6))
    assert "misfit" not in last
    assert recorder.of("forgetting/mean")[-1] == (STEPS, last["mean"])
    with pytest.raises(ConfigError, match="no figure 'worst_tenth' here"):
        ForgettingMonitor(pool=pool, stop_if="worst_tenth > 1")


def test_the_best_checkpoint_is_kept(atlas: Atlas, tmp_path: Path) -> None:
    recorder, monitor = Recorder(), ForgettingMonitor(atlas, probes=8, every=5, save_best=True)
    options = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "best",
        "metric_for_best_model": "forgetting_and_loss",
        "learning_rate": 0.3,  # so that it soon forgets more than it learns
        "save_total_limit": 1,
        "max_steps": 10,
    }
    trainer = plain_trainer(tiny(), tmp_path, [recorder, monitor], **options)
    trainer.train()
    means = {reading.step: reading.figures["mean"].value for reading in monitor.readings}
    trades = {step: loss + means[step] for step, loss in recorder.of("eval_loss")}
    assert sorted(trades) == [2, 4, 6, 8, 10]
    best = min(trades, key=lambda step: trades[step])
    assert dict(recorder.of("forgetting/forgetting_and_loss")) == pytest.approx(trades)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert (tmp_path / f"checkpoint-{best}").is_dir()


def test_a_resumed_training_is_watched_as_if_it_had_not_been_interrupted(atlas: Atlas, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = ForgettingMonitor(atlas, probes=8, every=1)
    plain_trainer(tiny(), tmp_path, [whole], **options).train()
    resumed = ForgettingMonitor(atlas, probes=8, every=1)
    plain_trainer(tiny(), tmp_path, [resumed], **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))

    def figures(monitor: ForgettingMonitor) -> list[tuple[int, dict[str, float]]]:
        return [(reading.step, reading.named()) for reading in monitor.readings]

    assert figures(resumed) == figures(whole)
    other = ForgettingMonitor(atlas, probes=9, every=1)
    with pytest.warns(UserWarning, match="a checkpoint that says nothing of this monitor"):
        plain_trainer(tiny(), tmp_path, [other], **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [reading.step for reading in other.readings] == [4, 5, 6]


def test_tensorboard_has_the_figures(atlas: Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    monitor = ForgettingMonitor(atlas, probes=8, every=2)
    plain_trainer(tiny(), tmp_path, [monitor], report_to="tensorboard").train()
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    scalars = {tag for tag in events.Tags()["scalars"] if "forgetting/" in tag}
    assert {f"train/forgetting/{name}" for name in monitor.readings[-1].named()} <= scalars
    found = [(event.step, event.value) for event in events.Scalars("train/forgetting/mean")]
    assert found == [(r.step, pytest.approx(r.figures["mean"].value)) for r in monitor.readings]


# What its callback imports at the end of a training.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_trackio_has_the_figures(atlas: Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    monitor = ForgettingMonitor(atlas, probes=8, every=2)
    plain_trainer(tiny(), tmp_path, [monitor], report_to="trackio", project="p", run_name="r").train()
    logs = [log for log in SQLiteStorage.get_logs("p", "r") if "train/forgetting/mean" in log]
    assert [(log["train/global_step"], log["train/forgetting/mean"]) for log in logs] == [
        (r.step, pytest.approx(r.figures["mean"].value)) for r in monitor.readings
    ]
