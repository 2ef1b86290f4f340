"""Scores measured by other tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from forgetcast.errors import DataError
from forgetcast.measure.scores import Scores

RIGHT = ("exact_match", "acc", "acc_norm", "em")
"""Metrics of lm-evaluation-harness that are 1 for a right answer and 0 for a wrong one; the first available counts."""

ROLLING = ("word_perplexity", "byte_perplexity")
"""Metrics of lm-evaluation-harness whose samples are pairs of a log-likelihood and a number of words or bytes."""


def read_lm_eval(path: str | Path) -> tuple[Scores, tuple[str, ...]]:
    """Read samples of lm-evaluation-harness (--log_samples): one JSONL file, or a folder of them.

    Returns
    -------
    Scores
        Ids are "task/doc_id" (plus the filter's name where a task has several). The loss is nats per word for rolling
        log-likelihoods, nats for the right choice of multiple choice, and NaN for generated answers.
    tuple of str
        The task of each example.

    Raises
    ------
    DataError
        If there is no such file, or a line is not a sample; the message names file and line.
    """
    path = Path(path)
    files = sorted(path.rglob("samples_*.jsonl")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise DataError(f"{path}: there are no samples_*.jsonl of lm-evaluation-harness here")
    rows: dict[str, tuple[str, float, float]] = {}
    for file in files:
        # samples_TASK_DATE.jsonl, where the date has no underscore.
        task = file.stem.removeprefix("samples_").rpartition("_")[0] or file.stem
        # Not splitlines, which also splits at characters that JSON allows within a string.
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            try:
                sample = json.loads(line)
                key = f"{task}/{sample['doc_id']}"
                if sample.get("filter", "none") != "none":
                    key += f"/{sample['filter']}"
                loss, right = _loss(sample), _right(sample)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError):
                raise DataError(f"{file}, line {number}: not a sample of lm-evaluation-harness") from None
            if key in rows:
                raise DataError(f"{file}, line {number}: the sample {key!r} occurs twice; give one run's files only")
            rows[key] = (task, loss, right)
    if not rows:
        raise DataError(f"{path} has no samples")
    losses = np.array([loss for _, loss, _ in rows.values()])
    scores = Scores(
        ids=tuple(rows),
        nll=losses,
        tokens=np.zeros(len(rows), dtype=int),
        truncated=np.zeros(len(rows), dtype=bool),
        reasons=[None if np.isfinite(loss) else "the harness kept no log-likelihood of it" for loss in losses],
        exact_match=np.array([right for _, _, right in rows.values()]),
        metadata={"origin": "lm-evaluation-harness"},
    )
    return scores, tuple(task for task, _, _ in rows.values())


def _loss(sample: dict[str, Any]) -> float:
    for name in ROLLING:
        if name in sample:
            log_likelihood, count = sample[name]
            return -float(log_likelihood) / float(count)
    choices, target = sample.get("filtered_resps"), sample.get("target")
    if isinstance(target, str) and target.isdigit():
        target = int(target)
    if isinstance(target, int) and isinstance(choices, list) and len(choices) > target and "acc" in sample:
        return -float(choices[target][0])
    return float("nan")


def _right(sample: dict[str, Any]) -> float:
    for name in RIGHT:
        if sample.get(name) in (0, 1):
            return float(sample[name])
    return float("nan")
