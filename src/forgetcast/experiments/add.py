"""Add rows to an atlas from models and adapters that exist already, or from scores of them."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from forgetcast.atlas.index import check_free, check_writable
from forgetcast.atlas.store import Atlas
from forgetcast.data.pool import Pool
from forgetcast.data.recipe import Recipe
from forgetcast.defaults import ANSWER_TOKENS
from forgetcast.errors import ConfigError, DataError, ForgetcastError, MismatchError
from forgetcast.experiments.command import CHECKPOINT
from forgetcast.experiments.meter import Meter, Work, scoring_work
from forgetcast.experiments.runs import (
    answer_settings,
    base_scores_file,
    check_text,
    cost,
    is_final,
    score_base,
    score_with_progress,
)
from forgetcast.files import read_json
from forgetcast.measure.scores import Scores, check_tokens, forgetting, length_settings
from forgetcast.progress import OnProgress
from forgetcast.settings import check_settings

if TYPE_CHECKING:
    from forgetcast.lm import LanguageModel, SharedBase

_MODEL_FILES = ("config.json", "adapter_config.json")
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
_TRAINER_FACTS = ("global_step", "max_steps", "num_train_epochs", "epoch", "train_batch_size")
_ADAPTER_FACTS = ("peft_type", "r", "lora_alpha", "base_model_name_or_path", "revision")


@dataclass(frozen=True)
class FoundModels:
    """Models to be added.

    Attributes
    ----------
    models : dict
        Directory, file or hub id by the name of its row.
    ignored : tuple of str
        Folders beside them that are no models.
    """

    models: dict[str, str]
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a model that was to be added.

    Attributes
    ----------
    name : str
        Of the row.
    model : str
        The model, or the score file.
    status : 'added', 'skipped' or 'failed'
    measured : int
        How many losses were added.
    mean : float or None
        Mean forgetting of the examples measured this time, nats per token.
    seconds : float or None
        Of the measurement, loading included.
    reason : str or None
        Why it was skipped or failed.
    notes : tuple of str
        What a reader of the row should know.
    mean_of, examples : int
        How many examples `mean` is the mean of, and how many of the atlas can be measured. Examples that were chosen
        for what they say about the others are no sample: their mean does not estimate that of all.
    """

    name: str
    model: str
    status: Literal["added", "skipped", "failed"]
    measured: int = 0
    mean: float | None = None
    seconds: float | None = None
    reason: str | None = None
    notes: tuple[str, ...] = ()
    mean_of: int = 0
    examples: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self) | {"notes": list(self.notes)}


def create_atlas(
    path: str | Path,
    base: Callable[[], LanguageModel],
    pool: Pool,
    *,
    exact_match: bool = False,
    max_new_tokens: int = ANSWER_TOKENS,
    on_progress: OnProgress | None = None,
) -> Atlas:
    """Create an atlas without rows by scoring the base model.

    Parameters
    ----------
    path : path or URL
    base : callable
        Loads the base model, once it is known that the atlas can be stored.
    pool : Pool
        Upstream examples.
    exact_match : bool
        Whether the models also answer the pool's prompts, so that flips are counted.
    max_new_tokens : int
        Longest answer.
    on_progress : callable, optional

    Raises
    ------
    DataError
        If `path` exists.
    """
    check_free(path)
    check_writable(path)
    language_model = base()
    answers, unfinished = {"max_new_tokens": max_new_tokens} if exact_match else None, base_scores_file(path)
    before = score_base(language_model, pool, answers, on_progress, unfinished)
    return Atlas.create(path, pool, before, model=language_model.name)


def find_models(given: Sequence[str], name: str | None = None) -> FoundModels:
    """Find the models that a user names, and give each a name for its row.

    A folder that is no model itself stands for the models and adapters directly in it. A row is called as the folder;
    a checkpoint, and folders of the same name, as the folder above them too.

    Parameters
    ----------
    given : sequence of str
        Directories, GGUF files, hub ids.
    name : str, optional
        Name of the row, if there is one model.

    Raises
    ------
    DataError
        If a folder holds no model, or two models would have the same name.
    ConfigError
        If there are several models, and one name.
    """
    models: list[str] = []
    ignored: list[str] = []
    for each in given:
        path = Path(each)
        if not path.is_dir() or _is_model(path):
            models.append(each)
            continue
        children = sorted((child for child in path.iterdir() if child.is_dir()), key=_natural)
        found = [str(child) for child in children if _is_model(child)]
        if not found:
            raise DataError(
                f"{each} holds neither a model nor an adapter, nor folders with one: {' and '.join(_MODEL_FILES)} are "
                "missing"
            )
        models += found
        ignored += [str(child) for child in children if not _is_model(child) and not child.name.startswith(".")]
    if name is not None:
        if len(models) != 1:
            raise ConfigError(f"--name is for one model, and there are {len(models)}; leave it out")
        return FoundModels({name: models[0]}, tuple(ignored))
    names = [_name(model) for model in models]
    named: dict[str, str] = {}
    for model, short in zip(models, names, strict=True):
        row = short if names.count(short) == 1 else _name(model, longer=True)
        if row in named:
            raise DataError(f"{named[row]} and {model} would both be called {row!r}; add one of them alone with --name")
        named[row] = model
    return FoundModels(named, tuple(ignored))


def models_of_run(folder: Path) -> list[str]:
    """Return the models of one fine-tune in the order of its steps: the checkpoints in its folder, and itself.

    Raises
    ------
    DataError
        If there is none.
    """
    children = sorted(folder.iterdir(), key=_natural) if folder.is_dir() else []
    found = [str(each) for each in children if CHECKPOINT.fullmatch(each.name) and _is_model(each)]
    found += [str(folder)] if _is_model(folder) else []
    if not found:
        raise DataError(f"{folder} holds neither a model nor an adapter, nor checkpoint folders with one")
    return found


def _is_model(path: Path) -> bool:
    return any((path / file).is_file() for file in _MODEL_FILES)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Key by which checkpoint-9 comes before checkpoint-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _name(model: str, *, longer: bool = False) -> str:
    """Return the name of a row: the last part of a path or hub id, or the last two."""
    path = Path(model)
    if path.exists():
        path = path.resolve()
    last = path.stem if path.suffix == ".gguf" else path.name
    return f"{path.parent.name}/{last}" if (longer or CHECKPOINT.fullmatch(last)) and path.parent.name else last


def add_models(
    atlas: Atlas,
    models: Mapping[str, str],
    loader: SharedBase,
    *,
    probes: int | None = None,
    allow_different_tokens: bool = False,
    on_progress: OnProgress | None = None,
) -> list[Outcome]:
    """Score models on the pool of an atlas, and add a row each.

    Rows that are complete are skipped, and of others only what is missing is measured. An interrupted model is resumed
    within its losses, unless there are few of them, as of probes. A model that cannot be added does not stop the rest.

    Parameters
    ----------
    atlas : Atlas
        If it has the base model's answers, the models answer too.
    models : mapping of str to str
        Directory, file or hub id by the name of the row.
    loader : SharedBase
        Loads the models.
    probes : int, optional
        Number of examples that are measured, chosen for what they say about the others; default: all.
    allow_different_tokens : bool
        Whether to add models that read examples as other tokens than the base did; their number is stored.
    on_progress : callable, optional

    Returns
    -------
    list of Outcome
        In the order of `models`.

    Raises
    ------
    DataError
        If there are fewer examples than probes.
    OSError
        If the atlas cannot be written to.
    """
    check_writable(atlas.path)
    choice = _Choice(atlas, probes)
    jobs: dict[str, _Job] = {}
    outcomes: dict[str, Outcome] = {}
    for name, model in models.items():
        try:
            job = _Job(name, model, loader.base_name(model), choice.columns(name))
            if len(job.columns):
                jobs[name] = job
            else:
                outcomes[name] = Outcome(name, model, "skipped", reason=_skipped(atlas, job, probes))
        except ForgetcastError as error:
            outcomes[name] = Outcome(name, model, "failed", reason=str(error))
    meter = Meter.of(on_progress)
    work = {
        name: scoring_work(_examples_of(job, atlas), None, answered=atlas.has_answers) for name, job in jobs.items()
    }
    meter.begin(sum(work.values(), Work()))
    # Adapters of one base after another, and whole models last, so that at most one model is in memory.
    for job in sorted(jobs.values(), key=lambda job: (job.base is None, job.base or "")):
        before = dict(meter.left)
        try:
            outcomes[job.name] = _add_model(atlas, job, loader, choice, allow_different_tokens, meter)
        except ForgetcastError as error:
            outcomes[job.name] = Outcome(job.name, job.model, "failed", reason=str(error))
        meter.settle(before, work[job.name], f"{job.name}: {outcomes[job.name].status}")
    return [outcomes[name] for name in models]


@dataclass(frozen=True)
class _Job:
    """A model to be measured: the name of its row, where it is, its base if it is an adapter, and the columns."""

    name: str
    model: str
    base: str | None
    columns: np.ndarray


def _examples_of(job: _Job, atlas: Atlas) -> Pool:
    """Return the examples that a model is measured on."""
    whole = len(job.columns) == len(atlas.examples)
    return atlas.pool if whole else atlas.subset(atlas.examples[i] for i in job.columns.tolist())


class _Choice:
    """Chooses the columns of a row that are to be measured: all that are missing, or probes."""

    def __init__(self, atlas: Atlas, probes: int | None) -> None:
        self._atlas, self.probes = atlas, probes
        self._scorable = ~np.isnan(atlas.nll_before)
        if probes is not None and not 1 <= probes <= self._scorable.sum():
            raise DataError(
                f"{probes} probes cannot be chosen: the base model of {atlas.path} has scores of "
                f"{self._scorable.sum()} examples"
            )

    @cached_property
    def how(self) -> str:
        """Say how probes are chosen."""
        return "at random" if self._model is None else "most informative"

    @cached_property
    def _model(self) -> Any:
        """A model of the rows that there were at the beginning; None if they are too few for one."""
        from forgetcast.completion import Bayesian

        return Bayesian().fit(self._atlas) if len(self._atlas.tasks) > 1 else None

    def columns(self, task: str) -> np.ndarray:
        """Return the columns to be measured for a row, sorted."""
        from forgetcast.completion.probes import choose, random

        atlas, known = self._atlas, np.zeros(len(self._scorable), dtype=bool)
        if exists := task in atlas.tasks:
            known = ~np.isnan(atlas.stored([task])[:, :][0])
        if self.probes is None:
            if exists and atlas.is_complete(task):
                return np.empty(0, dtype=np.intp)
            missing = self._scorable & ~known
            if atlas.has_answers and (right := np.flatnonzero(atlas.right_before)).size:
                flips = atlas.matrix([task], measure="exact_match").values[0] if exists else np.full(len(right), np.nan)
                missing[right[np.isnan(flips)]] = True
            return np.flatnonzero(missing)
        k = min(self.probes - int(known.sum()), int((self._scorable & ~known).sum()))
        if k < 1:
            return np.empty(0, dtype=np.intp)
        candidates = np.flatnonzero(self._scorable & ~known)
        if self._model is None:
            return np.sort(random(len(known), k, candidates=candidates))
        return np.sort(choose(self._model, k, candidates, measured=np.flatnonzero(known)))


def _skipped(atlas: Atlas, job: _Job, probes: int | None) -> str:
    """Say why a row is skipped.

    Raises
    ------
    MismatchError
        If it is known to be of another model.
    """
    stored, here = atlas.provenance(job.name).get("weights_file"), weights_file(job.model)
    if None not in (stored, here) and stored != here:
        raise MismatchError(_of_another_model(atlas, job.name))
    return "the row exists and is complete" if probes is None else f"the row exists and has {probes} examples or more"


def _of_another_model(atlas: Atlas, name: str) -> str:
    return (
        f"the row {name!r} of {atlas.path} is of another model, by the hash of its weights; give this one another name "
        f"with --name, or remove the row with: forgetcast atlas drop {atlas.path} {name}"
    )


def _add_model(
    atlas: Atlas, job: _Job, loader: SharedBase, choice: _Choice, allow_different_tokens: bool, meter: Meter
) -> Outcome:
    """Measure a model, and add the measurements."""
    pool = _examples_of(job, atlas)
    notes, started = [], time.monotonic()
    try:
        if job.base is not None and (note := _check_base(atlas, job, loader.base(job.base))):
            notes.append(note)
        with loader.model(job.model) as language_model:
            _check_new(atlas, job.name, job.model, language_model.weights_hash)
            if not allow_different_tokens:
                check_text(atlas, language_model, pool)
            answers = answer_settings(atlas) if atlas.has_answers else None
            settings, loaded = length_settings(atlas.scored_with, language_model.context), time.monotonic()
            resumed = False
            if choice.probes is None:  # the next time, other probes may be chosen
                settings["unfinished"] = unfinished = atlas.unfinished(job.name)
                resumed = unfinished.exists()
            after = score_with_progress(language_model, pool, meter, job.name, answers, **settings)
    except ForgetcastError:
        raise
    except Exception as error:  # a model's own code and the libraries' have no common base of their exceptions
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"{job.model} cannot be scored: {reason}") from error
    scored = time.monotonic()
    recipe = recipe_of(job.model)
    provenance: dict[str, Any] = {
        "kind": "model" if job.base is None else "adapter",
        "source": job.model,
        "weights_file": weights_file(job.model),
        **_facts_beside(job.model),
        **({} if recipe is None else {"seed": recipe.seed}),
        # Checkpoints of a run say much about one another, and about where it ended.
        **({"run": path.parent.name} if CHECKPOINT.fullmatch((path := Path(job.model).absolute()).name) else {}),
        "cost": cost(None, None, None if resumed else scored - loaded, after),
    }
    if choice.probes is not None:
        provenance["probes"] = choice.how
        if choice.how == "at random":
            notes.append("the atlas had fewer than two rows, so that its probes are a random sample")
    elif is_final(after):
        provenance["finished"] = 1.0
    outcome = _add(atlas, job.name, job.model, after, provenance, recipe, allow_different_tokens)
    return replace(outcome, seconds=round(scored - started, 3), notes=(*notes, *outcome.notes))


def add_scores(
    atlas: Atlas, name: str, scores: Scores, *, source: str = "scores", allow_different_tokens: bool = False
) -> Outcome:
    """Add scores that were measured elsewhere, of the pool or a part of it, as a row or a part of one.

    Parameters
    ----------
    atlas : Atlas
    name : str
        Of the row.
    scores : Scores
        Of the tuned model.
    source : str
        Where they are from, for the provenance.
    allow_different_tokens : bool
        Whether to add scores of examples that had other tokens than the base model's.

    Raises
    ------
    MismatchError
        If the scores are of other examples, texts or tokens, of the base model itself, or the row is of another model.
    DataError
        If there is no loss to be added.
    """
    _check_new(atlas, name, source, scores.metadata.get("model_hash"))
    provenance = {"kind": "scores", "source": source}
    return _add(atlas, name, source, scores, provenance, None, allow_different_tokens)


def _add(
    atlas: Atlas,
    name: str,
    model: str,
    after: Scores,
    provenance: Mapping[str, Any],
    recipe: Recipe | None,
    allow_different_tokens: bool,
) -> Outcome:
    """Add scores with their provenance."""
    measured_with = after.metadata
    known = {what: measured_with[what] for what in ("text", "dtype", "max_length", "stride") if what in measured_with}
    versions = {"forgetcast": measured_with.get("version"), **measured_with.get("versions", {})}
    if provenance["kind"] == "adapter":
        versions["peft"] = version("peft")
    added = atlas.add(
        name,
        after,
        recipe=None if recipe is None else recipe.model_dump(),
        provenance={**provenance, **known, "versions": versions},
        allow_different_tokens=allow_different_tokens,
    )
    change = forgetting(atlas.baseline, after)
    mean = float(np.nanmean(change)) if not np.isnan(change).all() else None
    scorable = int((~np.isnan(atlas.nll_before)).sum())
    if not added:
        return Outcome(name, model, "skipped", reason="the row has all of these examples")
    notes, mean_of = tuple(_notes(atlas, after)), int((~np.isnan(change)).sum())
    return Outcome(name, model, "added", measured=added, mean=mean, notes=notes, mean_of=mean_of, examples=scorable)


def _notes(atlas: Atlas, after: Scores) -> Iterator[str]:
    """Say what could not be measured or compared."""
    lost = np.isnan(after.nll) & ~np.isnan(atlas.nll_before[atlas.examples.positions(after.ids, where="the scores")])
    if lost.any():
        first = int(np.argmax(lost))
        yield f"{lost.sum()} example(s) could not be scored, e.g. {after.ids[first]!r}: {after.reasons[first]}"
    different = check_tokens(atlas.baseline, after, allow_different=True)
    if different is None:
        yield "it is unknown whether the examples had the same tokens as for the base model"
    elif different:
        yield f"{different} example(s) had other tokens than for the base model"
    if atlas.has_answers and after.exact_match is None:
        yield "the scores have no answers, which the atlas has"


def _check_base(atlas: Atlas, job: _Job, base: LanguageModel) -> str | None:
    """Check that the base model of an adapter is the atlas's; return a note if only its name could be compared."""
    what = f"{job.model} is an adapter of {job.base}"
    if atlas.model_hash is None:
        if Path(base.name).resolve() != Path(atlas.model).resolve():
            raise MismatchError(f"{what}, and the atlas {atlas.path} was measured on {atlas.model}")
        return "the base model was compared by its name only, because the atlas has no hash of its weights"
    if base.weights_hash != atlas.model_hash:
        dtype, here = atlas.scored_with.get("dtype"), str(base.model.dtype).removeprefix("torch.")
        as_loaded = f", here loaded as {here}, there as {dtype}" if dtype not in (None, here) else ""
        raise MismatchError(f"{what}, whose weights are not those of the atlas's base model ({atlas.model}{as_loaded})")
    return None


def _check_new(atlas: Atlas, name: str, model: str, weights_hash: str | None) -> None:
    """Check that a model is not the base model, nor another one than that of the row it is to complete."""
    if weights_hash is None:
        return
    if weights_hash == atlas.model_hash:
        raise MismatchError(f"{model} is the base model of the atlas {atlas.path} itself; give a fine-tuned one")
    if name in atlas.tasks and atlas.provenance(name).get("model_hash") not in (None, weights_hash):
        raise MismatchError(_of_another_model(atlas, name))


def weights_file(model: str) -> str | None:
    """Return a SHA-256 of the files with the weights in a model's directory; None if it is not a directory or file."""
    path = Path(model)
    files: Iterable[Path] = [path] if path.is_file() else ()
    if path.is_dir():
        # Of an adapter, the directory may have a copy of the whole model too, which is not what is loaded.
        only = "adapter_model" if not (path / "config.json").is_file() else ""
        files = sorted(file for pattern in _WEIGHTS for file in path.glob(f"{only}{pattern}"))
    digest, found = hashlib.sha256(), False
    for file in files:
        found = True
        with file.open("rb") as content:
            digest.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}".encode())
    return digest.hexdigest() if found else None


def recipe_of(model: str) -> Recipe | None:
    """Return the recipe in the run.json that `forgetcast train` leaves beside a model; None if it is unknown."""
    path = Path(model)
    above = [path.parent] if CHECKPOINT.fullmatch(path.name) else []
    for folder in (path, *above):
        if (file := folder / "run.json").is_file():
            run = _object(file)
            try:
                return check_settings(run["recipe"], Recipe, where=str(file)) if "recipe" in run else None
            except ConfigError:  # another tool's file of that name
                return None
    return None


def _facts_beside(model: str) -> dict[str, Any]:
    """Return what the files beside a model say of its training: the Trainer's state, the adapter's configuration."""
    found: dict[str, Any] = {}
    for name, file, wanted in (
        ("trainer", "trainer_state.json", _TRAINER_FACTS),
        ("adapter", "adapter_config.json", _ADAPTER_FACTS),
    ):
        content = _object(path) if (path := Path(model) / file).is_file() else {}
        if facts := {key: content[key] for key in wanted if isinstance(content.get(key), str | int | float)}:
            found[name] = facts
    return found


def _object(file: Path) -> dict[str, Any]:
    """Read a JSON object of another tool; empty if it is not one."""
    try:
        content = read_json(file)
    except DataError:
        return {}
    return content if isinstance(content, dict) else {}
