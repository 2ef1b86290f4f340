"""Scores from the samples of lm-evaluation-harness."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

from forgetcast.errors import DataError
from forgetcast.files import decode_json, read_json
from forgetcast.measure.logs import LogFile, LogTable, digest_of, one_run
from forgetcast.measure.scores import Scores

RIGHT = ("exact_match", "acc", "acc_norm", "em", "acc_bytes", "acc_mutual_info")
"""Metrics of lm-evaluation-harness that are 1 for a right answer and 0 for a wrong one; the first available counts."""

ROLLING = {"word_perplexity": "word", "byte_perplexity": "byte", "bits_per_byte": "byte"}
"""Metrics whose samples are pairs of a log-likelihood and a number of words or bytes; the first available counts."""

NUMBER = re.compile(r"[+-]?\d+")
HASHES = ("doc_hash", "prompt_hash", "target_hash")
WRITE_OUT = "_write_out_info.json"

Sample = dict[str, Any]


class _UnknownLossError(Exception):
    """The log does not say what the loss is; the message is the reason."""


def read_lm_eval(path: str | Path) -> tuple[Scores, tuple[str, ...]]:
    """Read samples of lm-evaluation-harness: those of --log_samples, or of version 0.3's --write_out.

    Parameters
    ----------
    path : path
        A file, or a folder with the files of one model. Of several runs the newest is read if it has all tasks; the
        metadata say so under 'notes'.

    Returns
    -------
    Scores
        Ids are "task/doc_id", plus the filter's name where the log has one. The loss is in nats per word or byte of
        rolling log-likelihoods, in nats for the right choice of multiple choice, in nats per continuation of other
        log-likelihoods, and NaN for generated answers; metadata 'units' has the unit of each task, 'right' the metric
        that is its exact match. Digests are of the log's own hashes and prompts; older logs have none.
    tuple of str
        The task of each example.

    Raises
    ------
    DataError
        If there is no such file, runs cannot be told apart, or a line is not a sample; the message names file and line.
    """
    path = Path(path)
    table, metadata = read_table(path)
    return table.scores(path, metadata)


def read_table(path: Path) -> tuple[LogTable, dict[str, Any]]:
    """Read samples with what was asked; `read_lm_eval` says how."""
    files, note = one_run(path, _find(path))
    table = LogTable(notes=[note] if note else [])
    units: defaultdict[str, set[str]] = defaultdict(set)
    right: defaultdict[str, set[str]] = defaultdict(set)
    between: Counter[str] = Counter()
    for file in files:
        samples = _samples(file.path)
        numbers_are_positions = any(_is_position(sample) for _, _, sample in samples)
        for where, key, sample in samples:
            try:
                key = f"{file.task}/{key}"
                key.encode()
                unit, loss, reason = _loss(sample, numbers_are_positions)
                metric, exact_match = _right(sample)
                digest = _digest(sample, unit, metric)
                asked = _asked(sample, numbers_are_positions)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError):
                raise DataError(f"{where}: not a sample of lm-evaluation-harness") from None
            if key in table.rows:
                raise DataError(f"{where}: the sample {key!r} occurs twice; give one run's files only")
            for values, value in ((units, unit), (right, metric)):
                if value is not None:
                    values[file.task] |= {value}
            if metric is not None and math.isnan(exact_match):
                between[f"{file.task} ({metric})"] += 1
            table.rows[key] = {
                "task": file.task, "nll": loss, "reason": reason, "exact_match": exact_match, "digest": digest,
                "asked": asked,
            }  # fmt: skip
    table.notes += [f"{name}: {n} sample(s) are neither right nor wrong, not compared" for name, n in between.items()]
    for task in sorted({file.task for file in files} - set(units) - set(right)):
        table.notes.append(f"{task}: neither a log-likelihood nor a metric that says right or wrong, not compared")
    if len(several := sorted(set().union(*units.values()))) > 1:
        table.notes.append(f"losses are in {', '.join(several)}: read them by task, not their mean over all")
    metadata = {"units": units, "right": right}
    named = {name: {task: " or ".join(sorted(found)) for task, found in of.items()} for name, of in metadata.items()}
    return table, {"origin": "lm-evaluation-harness", **named}


def _find(path: Path) -> list[LogFile]:
    """Find the files with samples: samples_TASK_DATE.jsonl in a folder per model, or what older versions wrote."""
    paths = [path]
    if path.is_dir():
        paths = sorted({*path.rglob("samples_*.jsonl"), *path.rglob(f"*{WRITE_OUT}")})
        # Version 0.4.0 wrote MODEL_TASK.jsonl next to results.json.
        paths = paths or sorted(file for at in path.rglob("results.json") for file in at.parent.glob("*.jsonl"))
    if not paths or not all(file.is_file() for file in paths):
        raise DataError(f"{path}: there are no samples_*.jsonl of lm-evaluation-harness here")
    found = []
    for file in paths:
        model, run = str(file.parent.relative_to(path)) if path.is_dir() else "", ""
        if file.name.startswith("samples_"):
            name, _, run = file.stem.removeprefix("samples_").rpartition("_")  # the date has no underscore
            task = name or run
        elif file.name.endswith(WRITE_OUT):
            task = file.name.removesuffix(WRITE_OUT)
        else:
            known = [name for name in _known_tasks(file.parent) if file.stem.endswith(f"_{name}")]
            task = max(known, key=len, default="samples")
            if known and path.is_dir():
                model = str(Path(model) / file.stem.removesuffix(f"_{task}"))
            elif path.is_dir():
                raise DataError(f"{file}: the results.json next to it has no such task; give the file itself")
        found.append(LogFile(file, task, model, run))
    return found


def _known_tasks(folder: Path) -> list[str]:
    """Return the tasks that the results of version 0.4.0 name."""
    try:
        return list(read_json(folder / "results.json")["results"])
    except (LookupError, TypeError, DataError):
        return []


def _samples(file: Path) -> list[tuple[str, str, Sample]]:
    """Return the place of each sample in the file, its id within the task, and the sample."""
    samples: list[tuple[str, Sample]] = []
    where = str(file)
    try:
        text = file.read_text(encoding="utf-8-sig")
        if text.lstrip()[:1] == "[":
            parts = ((f"{file}, sample {number}", part) for number, part in enumerate(decode_json(text), 1))
        else:
            # Not splitlines, which also splits at characters that JSON allows within a string.
            lines = enumerate(text.split("\n"), 1)
            parts = ((f"{file}, line {number}", line) for number, line in lines if line.strip())
        for where, part in parts:
            sample = decode_json(part) if isinstance(part, str) else part
            sample = _of_write_out(sample) if "logit_0" in sample else sample
            if isinstance(sample.get("metrics"), dict):
                sample = sample | sample["metrics"]
            if not isinstance(sample["doc_id"], int | str):
                raise TypeError
            samples.append((where, sample))
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
        raise DataError(f"{where}: not a sample of lm-evaluation-harness") from None
    found = []
    for (where, sample), suffix in zip(samples, _unnamed_filters([sample for _, sample in samples]), strict=True):
        name = sample.get("filter", "none")
        found.append((where, f"{sample['doc_id']}{suffix}" + (f"/{name}" if name != "none" else ""), sample))
    return found


def _unnamed_filters(samples: list[Sample]) -> list[str]:
    """Number the filters of a log that does not name them: it has the same answers once per filter."""
    by_id: defaultdict[Any, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_id[sample["doc_id"]].append(sample)
    again = [(sample, group[0]) for group in by_id.values() for sample in group[1:]]
    if (
        any("filter" in sample for sample in samples)
        or not all("resps" in sample and sample["resps"] == first.get("resps") for sample, first in again)
        or all(sample == first for sample, first in again)
        or len({len(group) for group in by_id.values()}) > 1
    ):
        return [""] * len(samples)  # if any is repeated, it is refused later
    seen: Counter[Any] = Counter()
    suffixes = []
    for sample in samples:
        seen[sample["doc_id"]] += 1
        suffixes.append(f"/filter {seen[sample['doc_id']]}")
    return suffixes


def _of_write_out(sample: Sample) -> Sample:
    """Translate a sample of version 0.3: logit_0, logit_1, ... and metrics as strings."""
    logits = [sample[f"logit_{i}"] for i in range(len(sample)) if f"logit_{i}" in sample]
    pairs = [[value, False] for value in logits if isinstance(value, float)]
    metrics = {name: _parsed(sample[name]) for name in (*RIGHT, *ROLLING) if name in sample}
    return {"doc_id": sample["doc_id"], "target": sample.get("truth"), "filtered_resps": pairs or logits, **metrics}


def _parsed(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    words = {"True": "true", "False": "false", "(": "[", ")": "]", "nan": "NaN", "inf": "Infinity"}
    return decode_json(re.sub(r"True|False|[()]|nan|inf", lambda match: words[match[0]], text))


def _nats(value: Any) -> float:
    """Return minus a log-likelihood."""
    loss = -float(value)
    if not 0 <= loss < math.inf:
        raise DataError(f"the log-likelihood {value} is not a finite number that is at most 0")
    return loss + 0.0  # not -0.0


def _loss(sample: Sample, numbers_are_positions: bool) -> tuple[str | None, float, str | None]:
    """Return the loss with its unit, or NaN with a reason; the unit is None where there is no log-likelihood."""
    for name, what in ROLLING.items():
        if name in sample:
            log_likelihood, count = _unwrapped(sample[name], name)
            if not 0 < float(count) < math.inf:
                raise DataError(f"a text of {count} {what}s has no loss per {what}")
            return f"nats per {what}", _nats(log_likelihood) / float(count), None
    pairs = _pairs(sample)
    if pairs is None:
        return None, math.nan, "the harness kept no log-likelihood of it"
    if len(pairs) == 1:
        return "nats per continuation", _nats(pairs[0][0]), None
    unit = "nats for the right choice"
    if "acc_mutual_info" in sample:
        # The second half is of the choices without their question.
        pairs = pairs[: len(pairs) // 2]
    losses = [_nats(pair[0]) for pair in pairs]
    try:
        return unit, losses[_right_choice(sample, losses, numbers_are_positions)], None
    except _UnknownLossError as error:
        return unit, math.nan, str(error)


def _pairs(sample: Sample) -> list[Any] | None:
    """Return the pairs of a log-likelihood and whether the continuation is the greedy one, if the sample has any."""
    if any(len(arguments) > 1 and isinstance(arguments[1], dict) for arguments in _arguments(sample)):
        return None  # settings of a generation
    filtered, raw = sample.get("filtered_resps"), sample.get("resps")
    once = [repeats[0] for repeats in raw if len(repeats) == 1] if isinstance(raw, list) else []
    for pairs in (filtered, once):
        if isinstance(pairs, list) and pairs and all(_is_pair(pair) for pair in pairs):
            return pairs
    return None


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and str(value[1]) in ("True", "False")


def _right_choice(sample: Sample, losses: list[float], numbers_are_positions: bool) -> int:
    """Return the position of the right choice.

    The target is a position or the text of a choice, and the log writes both as text. Where both readings are possible,
    whether the likeliest choice was right decides.
    """
    target, n = sample.get("target"), len(losses)
    if target is None:
        raise _UnknownLossError("the log does not say which choice is right")
    text = str(target).strip()
    possible = {at for at, choice in enumerate(_continuations(sample)[:n]) if choice == text}
    if NUMBER.fullmatch(text):
        if numbers_are_positions:
            possible = set()
        if 0 <= int(text) < n:
            possible.add(int(text))
        elif not possible:
            raise DataError(f"the target {text} is none of the {n} choices")
    elif isinstance(target, list) or re.fullmatch(r"\[[\d, ]*\]", text):
        raise _UnknownLossError("it has several right choices")
    if len(possible) > 1:
        likeliest = losses.index(min(losses))
        match _unwrapped(sample.get("acc"), "acc"):
            case 1:
                possible &= {likeliest}
            case 0:
                possible -= {likeliest}
    if len(possible) != 1:
        raise _UnknownLossError("its target does not tell which choice is right")
    return possible.pop()


def _is_position(sample: Sample) -> bool:
    """Return whether the target can only be a position, as the text of no choice; all of its task are then."""
    try:
        text, continuations = str(sample.get("target")).strip(), _continuations(sample)
    except (AttributeError, TypeError):
        return False  # refused when it is read
    return NUMBER.fullmatch(text) is not None and len(continuations) > 1 and text not in continuations


def _continuations(sample: Sample) -> list[Any]:
    texts = [arguments[1] for arguments in _arguments(sample) if len(arguments) > 1]
    return [text.strip() if isinstance(text, str) else text for text in texts]


def _right(sample: Sample) -> tuple[str | None, float]:
    """Return the first metric that says right or wrong, and its value; NaN if that is neither 0 nor 1."""
    for name in RIGHT:
        if name in sample:
            value = _unwrapped(sample[name], name)
            return name, float(value) if value in (0, 1) else math.nan
    return None, math.nan


def _unwrapped(value: Any, name: str) -> Any:
    """Return what is in {name: value} or [value]."""
    if isinstance(value, dict):
        value = value[name]
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _arguments(sample: Sample) -> list[list[Any]]:
    """Return the arguments of each request; newer logs have them as gen_args_0: {arg_0, arg_1}."""
    requests = sample.get("arguments") or []
    requests = list(requests.values()) if isinstance(requests, dict) else requests
    return [list(request.values()) if isinstance(request, dict) else list(request) for request in requests]


def _asked(sample: Sample, numbers_are_positions: bool) -> dict[str, str] | None:
    """Return the text, or the prompt and the right continuation, as fields of an example; None without a target."""
    arguments = _arguments(sample)
    texts = [argument[0] for argument in arguments if argument and isinstance(argument[0], str)]
    if any(name in sample for name in ROLLING):
        return {"text": texts[0]} if texts and texts[0].strip() else None
    target, continuations = sample.get("target"), [str(each[1]) for each in arguments if len(each) > 1]
    pairs = _pairs(sample)
    if pairs is not None and len(continuations) == len(pairs):
        with suppress(_UnknownLossError):  # else the target as the log has it
            right = 0 if len(pairs) == 1 else _right_choice(sample, [_nats(p[0]) for p in pairs], numbers_are_positions)
            target = continuations[right]
    prompt = texts[0] if texts else json.dumps(sample.get("doc"), ensure_ascii=False)
    return {"prompt": prompt, "completion": str(target)} if target is not None and str(target).strip() else None


def _digest(sample: Sample, unit: str | None, metric: str | None) -> str | None:
    """Hash what was measured: the log's hashes, all prompts and continuations, the loss's unit and the metric."""
    hashes = [sample.get(name) for name in HASHES]
    if not all(isinstance(value, str) for value in hashes):
        return None
    texts = [text for arguments in _arguments(sample) for text in arguments if isinstance(text, str)]
    return digest_of([hashes, texts, unit, metric])
