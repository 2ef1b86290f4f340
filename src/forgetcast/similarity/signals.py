"""Similarities: numbers for each task and example, known before a fine-tune, that could predict forgetting.

A similarity is one small class. It computes from a `Material`, which makes what several of them need only once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from forgetcast.data.pool import Pool
from forgetcast.errors import ConfigError, DataError, MissingExtraError
from forgetcast.progress import OnProgress, counted
from forgetcast.text import did_you_mean

if TYPE_CHECKING:
    from forgetcast.lm import LanguageModel

SAMPLE = 64
"""Examples of a task, drawn at random, that stand for it."""

TERMS = 50_000
"""Most terms of TF-IDF."""


class Vectors(NamedTuple):
    """Vectors of tasks (M, d) and of examples (N, d) in one space."""

    tasks: np.ndarray
    examples: np.ndarray

    def cosines(self) -> np.ndarray:
        """Return the cosine of each task with each example, shape (M, N); 0 where a vector is zero."""
        tasks, examples = (part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-30) for part in self)
        return tasks @ examples.T


@dataclass
class Material:
    """Texts of M tasks and N examples, and the models that similarities may use.

    Parameters
    ----------
    tasks : mapping of str to Pool
    pool : Pool
    losses : array, shape (N,), optional
        Of the base model, nats per token.
    language_model : LanguageModel, optional
        The base model.
    embedding : path, optional
        Folder of a sentence-transformers model.
    tuned : mapping of str to sequence of str, optional
        Models of each task's fine-tune, in the order of its steps: checkpoints, then the tuned model or adapter.
    load : callable, optional
        Loads one of these by its name, as the language model was loaded; needed with `tuned`.
    sample : int
        At most so many examples of a task, drawn at random, stand for it.
    seed : int
    on_progress : callable, optional
        Called with what is measured, the number done, and the number of all.

    Attributes
    ----------
    drawn : dict of str to Pool
        The examples that stand for each task.
    notes : list of str
        What was cut, so far.
    """

    tasks: Mapping[str, Pool]
    pool: Pool
    losses: np.ndarray | None = None
    language_model: LanguageModel | None = None
    embedding: str | Path | None = None
    tuned: Mapping[str, Sequence[str]] | None = None
    load: Callable[[str], LanguageModel] | None = None
    sample: int = SAMPLE
    seed: int = 0
    on_progress: OnProgress | None = None

    def __post_init__(self) -> None:
        """Draw the examples of each task."""
        if not self.tasks:
            raise DataError("there are no tasks to compute similarities of")
        if self.tuned is not None and (without := [name for name in self.tasks if not self.tuned.get(name)]):
            raise DataError(f"the tuned model of the task {without[0]!r} is not given")
        if self.tuned is not None and self.load is None:
            raise ConfigError("tuned models need a function that loads them")
        if self.sample < 1:
            raise ConfigError(f"at least one example must stand for a task, not {self.sample}")
        self.notes: list[str] = []
        self.drawn = {name: task.sample(self.sample, seed=self.seed) for name, task in self.tasks.items()}

    def available(self) -> frozenset[str]:
        """Return which of `Similarity.needs` are given."""
        given: dict[str, object] = {"losses": self.losses, "language_model": self.language_model}
        given |= {"embedding": self.embedding, "tuned": self.tuned}
        return frozenset(name for name, value in given.items() if value is not None)

    def _of_tasks(self, rows: np.ndarray) -> np.ndarray:
        """Average the vectors of the drawn examples, one task after another, shape (M, d)."""
        ends = np.cumsum([len(task) for task in self.drawn.values()])[:-1]
        return np.array([part.mean(axis=0) for part in np.split(rows, ends)])

    def _drawn_texts(self) -> list[str]:
        return [example.full_text for task in self.drawn.values() for example in task]

    @cached_property
    def tfidf(self) -> np.ndarray:
        """Cosines of TF-IDF vectors, shape (M, N); a task's vector is the mean over all of its examples."""
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
        except ImportError as error:
            raise MissingExtraError("similarity", error) from error
        vectorizer = TfidfVectorizer(max_features=TERMS, sublinear_tf=True)
        try:
            examples = vectorizer.fit_transform([example.full_text for example in self.pool])
        except ValueError as error:  # no text has a word
            raise DataError(f"TF-IDF of the pool: {error}") from None
        cosines = []
        for task in self.tasks.values():
            mean = np.asarray(vectorizer.transform([example.full_text for example in task]).mean(axis=0)).ravel()
            cosines.append(examples @ mean / max(float(np.linalg.norm(mean)), 1e-30))
        return np.array(cosines)

    @cached_property
    def embeddings(self) -> Vectors:
        """Sentence embeddings."""
        from forgetcast.lm.embeddings import sentence_embeddings

        assert self.embedding is not None
        texts = [example.full_text for example in self.pool]
        rows, note = sentence_embeddings(self.embedding, texts + self._drawn_texts())
        if note:
            self.notes.append(note)
        return Vectors(self._of_tasks(rows[len(texts) :]), rows[: len(texts)])

    @cached_property
    def hidden(self) -> Vectors:
        """Mean hidden states of the base model, standardised over the pool, because a few directions dominate."""
        from forgetcast.lm.features import hidden_states

        assert self.language_model is not None
        examples = hidden_states(self.language_model, self.pool, on_progress=self._report("hidden states", self.pool))
        tasks = [hidden_states(self.language_model, task) for task in self.drawn.values()]
        for name, pool, rows in (
            ("the pool", self.pool, examples),
            *zip(self.drawn, self.drawn.values(), tasks, strict=True),
        ):
            if not np.isfinite(rows).all():
                bad = pool.ids[int(np.argmin(np.isfinite(rows).all(axis=1)))]
                raise DataError(f"{name}: the example {bad!r} has no finite hidden state; remove it")
        centre, scale = examples.mean(axis=0), np.maximum(examples.std(axis=0), 1e-12)
        return Vectors(
            np.array([((rows - centre) / scale).mean(axis=0) for rows in tasks]), (examples - centre) / scale
        )

    @cached_property
    def gradients(self) -> tuple[np.ndarray, np.ndarray]:
        """Inner products and cosines of the loss gradients of tasks and examples at the base model, each (M, N).

        Randomly projected. Those of the examples are not kept, so memory does not grow with their number.
        """
        directions, products, norms = self._products
        tasks = directions[: len(self.tasks)]
        return products[: len(tasks)], products[: len(tasks)] / (np.linalg.norm(tasks, axis=1)[:, None] * norms)

    @property
    def updates(self) -> np.ndarray:
        """Inner products of each task's update and the examples' gradients at the base model, likewise, (M, N).

        They are the first-order changes of the losses, nats per token.
        """
        return self._products[1][len(self.tasks) :]

    @cached_property
    def _products(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Projected gradients of the tasks and, if there are tuned models, updates; their products; norms (N,)."""
        from forgetcast.lm.gradients import projected_gradients, projected_update

        assert self.language_model is not None
        model, groups = self.language_model, list(self.drawn.values())
        report = self._report("gradients of tasks", groups)
        directions = list(projected_gradients(model, groups, seed=self.seed, on_progress=report))
        if self.tuned is not None and self.load is not None:
            report = self._report("updates of tasks", groups)
            for name in self.tasks:
                directions.append(projected_update(model, self.load(self.tuned[name][-1]), seed=self.seed))
                report(1)
        tasks = np.array(directions)
        products, norms = self._with_examples(model, tasks, self._report("gradients of examples", self.pool))
        return tasks, products, norms

    @cached_property
    def along_the_run(self) -> np.ndarray:
        """Inner products of the gradients of task and example, summed over the base model and the run's models, (M, N).

        A backward pass for each example, task and model. One model and one task's products are in memory at a time.
        """
        from forgetcast.lm.gradients import projected_gradients

        assert self.tuned is not None
        assert self.load is not None
        total = self.gradients[0].copy()
        points = [(row, name, model) for row, name in enumerate(self.tasks) for model in self.tuned[name]]
        report = self._report("gradients along the run", points)
        for row, name, path in points:
            model = self.load(path).merged()
            own = next(iter(projected_gradients(model, [self.drawn[name]], seed=self.seed)))
            total[row] += self._with_examples(model, own[None], lambda _: None)[0][0]
            report(1)
        return total

    def _with_examples(
        self, model: LanguageModel, directions: np.ndarray, report: Callable[[int], None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the products of projected directions (D, d) with the examples' gradients, (D, N), and norms (N,)."""
        from forgetcast.lm.gradients import projected_gradients

        singles = [(example,) for example in self.pool]
        products, norms = np.empty((len(directions), len(singles))), np.empty(len(singles))
        rows = projected_gradients(model, singles, end=False, seed=self.seed, on_progress=report)
        for at, row in enumerate(rows):
            products[:, at], norms[at] = directions @ row, np.linalg.norm(row)
        return products, norms

    def _report(self, what: str, all_: Sequence[Any]) -> Callable[[int], None]:
        return (lambda _: None) if self.on_progress is None else counted(self.on_progress, what, len(all_))


SIMILARITIES: dict[str, type[Similarity]] = {}
"""Every similarity by its name; a subclass of `Similarity` with a name registers itself."""


class Similarity(ABC):
    """A number for each task and example; the higher it is, the more the example should be forgotten.

    Derive a class from this to add one.

    Attributes
    ----------
    name : str
    summary : str
        One line, shown in tables.
    needs : frozenset of str
        Of 'losses', 'language_model', 'embedding' and 'tuned': what the `Material` must have.

    Examples
    --------
    >>> import numpy as np
    >>> from forgetcast.similarity import Similarity
    >>> class Words(Similarity):
    ...     name = "words"
    ...     summary = "number of words of the example"
    ...
    ...     def compute(self, material):
    ...         row = [len(example.full_text.split()) for example in material.pool]
    ...         return np.tile(row, (len(material.tasks), 1))
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **options: Any) -> None:
        """Register the class by its name."""
        super().__init_subclass__(**options)
        if "name" in vars(cls):
            SIMILARITIES[cls.name] = cls

    @abstractmethod
    def compute(self, material: Material) -> np.ndarray:
        """Return the similarities, shape (M, N), all finite."""


class TfIdf(Similarity):
    """Cosine of word counts."""

    name = "tfidf"
    summary = "cosine of TF-IDF vectors (Salton and Buckley 1988)"

    def compute(self, material: Material) -> np.ndarray:
        """Compute the cosines."""
        return material.tfidf


class Embedding(Similarity):
    """Cosine of sentence embeddings."""

    name = "embedding"
    summary = "cosine of sentence embeddings"
    needs = frozenset({"embedding"})

    def compute(self, material: Material) -> np.ndarray:
        """Compute the cosines."""
        return material.embeddings.cosines()


class Hidden(Similarity):
    """Cosine of the base model's hidden states."""

    name = "hidden"
    summary = "cosine of mean hidden states of the base model, standardised over the pool"
    needs = frozenset({"language_model"})

    def compute(self, material: Material) -> np.ndarray:
        """Compute the cosines."""
        return material.hidden.cosines()


class GradientProduct(Similarity):
    """Product of gradients: the first-order loss increase of a gradient step on the task."""

    name = "gradient"
    summary = "minus the inner product of the gradients of task and example, randomly projected"
    needs = frozenset({"language_model"})

    def compute(self, material: Material) -> np.ndarray:
        """Compute the products."""
        return -material.gradients[0]


class GradientCosine(Similarity):
    """Cosine of gradients."""

    name = "gradient-cosine"
    summary = "minus the cosine of the gradients of task and example, randomly projected"
    needs = frozenset({"language_model"})

    def compute(self, material: Material) -> np.ndarray:
        """Compute the cosines."""
        return -material.gradients[1]


class GradientRun(Similarity):
    """Products of gradients along the run (TracInCP): known after the fine-tune only."""

    name = "gradient-run"
    summary = "the products of gradient, summed over the base model and the models of the run (Pruthi et al. 2020)"
    needs = frozenset({"language_model", "tuned"})

    def compute(self, material: Material) -> np.ndarray:
        """Compute the sums."""
        return -material.along_the_run


class Update(Similarity):
    """First-order forgetting by the update that was made: known after the fine-tune only."""

    name = "update"
    summary = "inner product of the update, tuned minus base weights, and the gradient of the example, projected"
    needs = frozenset({"language_model", "tuned"})

    def compute(self, material: Material) -> np.ndarray:
        """Compute the products."""
        return material.updates


class Loss(Similarity):
    """Loss of the base model, the same for every task."""

    name = "loss"
    summary = "loss of the example before, the same for every task"
    needs = frozenset({"losses"})

    def compute(self, material: Material) -> np.ndarray:
        """Repeat the losses."""
        assert material.losses is not None
        return np.tile(np.asarray(material.losses, dtype=np.float64), (len(material.tasks), 1))


class Length(Similarity):
    """Length of the example, the same for every task."""

    name = "length"
    summary = "logarithm of the example's number of characters, the same for every task"

    def compute(self, material: Material) -> np.ndarray:
        """Repeat the lengths."""
        row = np.log([len(example.full_text) for example in material.pool])
        return np.tile(row, (len(material.tasks), 1))


def compute_similarities(names: Sequence[str], material: Material) -> dict[str, np.ndarray]:
    """Compute similarities by name, each of shape (M, N).

    Raises
    ------
    ConfigError
        If one is unknown, or needs what the material lacks.
    DataError
        If one is not finite.
    """
    found = {}
    for name in dict.fromkeys(names):
        if name not in SIMILARITIES:
            hint = did_you_mean(name, SIMILARITIES)
            raise ConfigError(f"unknown similarity {name!r}; choose from {', '.join(SIMILARITIES)}{hint}")
        options = {"language_model": "--model", "embedding": "--embedding", "losses": "base scores", "tuned": "--tuned"}
        if missing := sorted(SIMILARITIES[name].needs - material.available()):
            raise ConfigError(f"the similarity {name!r} needs {', '.join(options[each] for each in missing)}")
    for name in dict.fromkeys(names):
        values = np.asarray(SIMILARITIES[name]().compute(material), dtype=np.float64)
        if values.shape != (len(material.tasks), len(material.pool)):
            raise DataError(f"the similarity {name!r} has the shape {values.shape}, not that of tasks and examples")
        if name != "loss" and not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            raise DataError(
                f"the similarity {name!r} of the task {list(material.tasks)[row]!r} and the example "
                f"{material.pool.ids[int(column)]!r} is not finite"
            )
        found[name] = values
    return found
