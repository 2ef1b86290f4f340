"""Replay strategies: rules that turn signals into sampling weights, or into the order of replay.

A strategy is one small class. It sees only the examples that may be replayed, never those held out.
"""

from __future__ import annotations

import importlib.util
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from forgetcast.errors import ConfigError
from forgetcast.files import neighbour
from forgetcast.replay.coverage import Diminishing, Facility, coverage, herding
from forgetcast.replay.sampling import normal_scores, softmax_weights
from forgetcast.replay.signals import Signals
from forgetcast.text import did_you_mean

Phase = Literal["never", "planned", "in-training", "padding"]
"""When a strategy acts: it replays nothing; its plan fixes the examples; a selector picks them during training; or it
adds new examples instead of replayed ones."""


class Selection(NamedTuple):
    """What a strategy makes of n examples.

    Attributes
    ----------
    weights : array, shape (n,)
        Sampling weights, summing to one.
    order : array of int or None, shape (m,)
        Examples in the order of their replay; None where they are sampled by weight.
    ranked_share : float
        Fraction of the replayed examples that follows `order`; the others are sampled by weight.
    by_source : bool
        Whether every prefix has each source in proportion to its share of the pool.
    """

    weights: np.ndarray
    order: np.ndarray | None = None
    ranked_share: float = 1.0
    by_source: bool = False


STRATEGIES: dict[str, type[Strategy]] = {}
"""Every strategy by its name; a subclass of `Strategy` with a name registers itself."""


class Strategy(ABC):
    """A rule for what to replay. Derive a class from this to add one.

    Attributes
    ----------
    name : str
    summary : str
        One line, shown in the help and in reports.
    needs : frozenset of str
        Signals that `select` uses. Examples without an observed value are never replayed.
    phase : Phase
        When the strategy acts; nearly always 'planned'.

    Examples
    --------
    >>> import numpy as np
    >>> from forgetcast.replay import Selection, Strategy
    >>> class EasiestFirst(Strategy):
    ...     name = "easiest-first"
    ...     summary = "the base model's lowest losses first"
    ...     needs = frozenset({"losses"})
    ...
    ...     def select(self, signals):
    ...         n = len(signals)
    ...         return Selection(np.full(n, 1 / n), np.argsort(signals.losses, kind="stable"))
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    phase: ClassVar[Phase] = "planned"

    def __init_subclass__(cls, **options: Any) -> None:
        """Register the class by its name."""
        super().__init_subclass__(**options)
        if "name" not in vars(cls):
            return
        if (earlier := STRATEGIES.get(cls.name)) and _source(earlier) != _source(cls):
            raise ConfigError(
                f"there are two replay strategies {cls.name!r}: {earlier.__qualname__} and {cls.__qualname__}"
            )
        STRATEGIES[cls.name] = cls

    @abstractmethod
    def select(self, signals: Signals) -> Selection:
        """Select among n >= 1 examples, all of which may be replayed and have the signals in `needs`."""

    def __repr__(self) -> str:
        """Return the class and its settings."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    @property
    def replays(self) -> bool:
        """Whether upstream examples are replayed."""
        return self.phase in ("planned", "in-training")


def get_strategy(name: str, **settings: Any) -> Strategy:
    """Make a strategy from its name.

    Parameters
    ----------
    name : str
        A registered name, or ``FILE.py:NAME`` for one that a Python file defines. The file is run.
    **settings
        Settings of the strategy; those that are None keep their default.

    Raises
    ------
    ConfigError
        If the strategy is unknown, or does not have such a setting.
    """
    file, _, short = name.rpartition(":")
    if file.endswith(".py"):
        _run_file(Path(file).resolve())
        name = short
    if name not in STRATEGIES:
        raise ConfigError(
            f"unknown replay strategy {name!r}; choose one of {', '.join(STRATEGIES)}, or FILE.py:NAME of your own"
            f"{did_you_mean(name, STRATEGIES)}"
        )
    cls = STRATEGIES[name]
    given = {setting: value for setting, value in settings.items() if value is not None}
    if unknown := sorted(given.keys() - inspect.signature(cls).parameters.keys()):
        raise ConfigError(f"the strategy {name!r} has no setting {unknown[0]!r}")
    return cls(**given)


def check_available(strategy: Strategy, available: Iterable[str], where: str) -> None:
    """Raise ConfigError unless the strategy plans ahead and needs nothing but the `available` signals."""
    missing = ", ".join(sorted(strategy.needs.difference(available)))
    reason = {
        "never": "it replays nothing, and is a baseline anyway",
        "padding": "it replays no upstream example",
        "in-training": "it selects examples during training",
        "planned": f"it needs {missing}" if missing else "",
    }[strategy.phase]
    if reason:
        raise ConfigError(f"the strategy {strategy.name!r} cannot be used {where}: {reason}")


def _source(cls: type[Strategy]) -> tuple[str, str]:
    """Where a class is defined: running its file a second time defines the same strategy again."""
    return cls.select.__code__.co_filename, cls.__qualname__


def _run_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file of replay strategies{neighbour(path)}")
    spec = importlib.util.spec_from_file_location(f"forgetcast_user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ConfigError:
        raise
    except Exception as error:  # it is the user's code: whatever it raises names the file
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error


def _uniform(signals: Signals) -> np.ndarray:
    return np.full(len(signals), 1 / len(signals))


def _descending(values: np.ndarray) -> np.ndarray:
    return np.argsort(-values, kind="stable")


class NoReplay(Strategy):
    """The baseline without replay."""

    name = "none"
    summary = "replay nothing"
    phase = "never"

    def select(self, signals: Signals) -> Selection:
        """Give every example the weight zero."""
        return Selection(np.zeros(len(signals)))


class Padding(Strategy):
    """A control for the number of steps."""

    name = "padding"
    summary = "control: as many extra steps, on new examples instead of replayed ones"
    phase = "padding"

    def select(self, signals: Signals) -> Selection:
        """Give every example the weight zero."""
        return Selection(np.zeros(len(signals)))


class Random(Strategy):
    """The baseline that every other strategy is compared with."""

    name = "random"
    summary = "sample uniformly"

    def select(self, signals: Signals) -> Selection:
        """Sample uniformly."""
        return Selection(_uniform(signals))


class Stratified(Strategy):
    """Uniform sampling within each source."""

    name = "stratified"
    summary = "sample uniformly, stratified by source, proportional in every prefix"

    def select(self, signals: Signals) -> Selection:
        """Sample uniformly within each source."""
        return Selection(_uniform(signals), by_source=True)


class _Softmax(Strategy):
    """Base of the strategies with a softmax.

    Parameters
    ----------
    temperature : float, optional
        In units of the softmax's argument. Default: the one at which the effective sample size is EFFECTIVE_SHARE of
        the usable examples.
    """

    def __init__(self, *, temperature: float | None = None) -> None:
        self.temperature = temperature


class SoftmaxForecast(_Softmax):
    """Sampling by the forecast, as in arXiv 2406.14026."""

    name = "forecast"
    summary = "sample by softmax of the forecast"
    needs = frozenset({"forecast"})

    def select(self, signals: Signals) -> Selection:
        """Sample by softmax of the forecast."""
        return Selection(softmax_weights(signals.forecast, self.temperature))


class Ranked(_Softmax):
    """Sampling by the rank of the forecast."""

    name = "ranked"
    summary = "sample by softmax of the forecast's normal scores, which limits outliers"
    needs = frozenset({"forecast"})

    def select(self, signals: Signals) -> Selection:
        """Sample by softmax of the normal scores."""
        return Selection(softmax_weights(normal_scores(signals.forecast), self.temperature))


class Top(Strategy):
    """The order of the forecast."""

    name = "top"
    summary = "the highest forecasts first"
    needs = frozenset({"forecast"})

    def select(self, signals: Signals) -> Selection:
        """Order by forecast, highest first."""
        return Selection(_uniform(signals), _descending(signals.forecast))


class Half(_Softmax):
    """Exploitation and exploration by turns."""

    name = "half"
    summary = "alternate the highest forecast with a softmax sample of the forecast"
    needs = frozenset({"forecast"})

    def select(self, signals: Signals) -> Selection:
        """Order half by forecast, and sample half by softmax."""
        weights = softmax_weights(signals.forecast, self.temperature)
        return Selection(weights, _descending(signals.forecast), ranked_share=0.5)


class Coverage(Strategy):
    """Greedy coverage with a power law: `coverage.Diminishing`."""

    name = "coverage"
    summary = "greedily protect most of the remaining forecast forgetting, with diminishing returns"
    needs = frozenset({"forecast", "loadings"})

    def select(self, signals: Signals) -> Selection:
        """Order greedily."""
        return Selection(_uniform(signals), coverage(signals.loadings, signals.forecast, Diminishing))


class FacilityCoverage(Strategy):
    """Greedy facility location: `coverage.Facility`."""

    name = "coverage-facility"
    summary = "greedily give most of the forecast forgetting a more similar replayed example (facility location)"
    needs = frozenset({"forecast", "loadings"})

    def select(self, signals: Signals) -> Selection:
        """Order greedily."""
        return Selection(_uniform(signals), coverage(signals.loadings, signals.forecast, Facility))


class HerdingCoverage(_Softmax):
    """Kernel herding: `coverage.herding`."""

    name = "coverage-herding"
    summary = "match the softmax distribution of the forecast with every prefix (kernel herding)"
    needs = frozenset({"forecast", "loadings"})

    def select(self, signals: Signals) -> Selection:
        """Order by herding."""
        weights = softmax_weights(signals.forecast, self.temperature)
        return Selection(_uniform(signals), herding(signals.loadings, weights))


class HighestLoss(Strategy):
    """The order of the base losses."""

    name = "loss"
    summary = "the base model's highest losses first"
    needs = frozenset({"losses"})

    def select(self, signals: Signals) -> Selection:
        """Order by loss, highest first."""
        return Selection(_uniform(signals), _descending(signals.losses))


class MedianLoss(Strategy):
    """The order of the distance to the median base loss, as in arXiv 2406.14026."""

    name = "median-loss"
    summary = "the losses closest to the base model's median first"
    needs = frozenset({"losses"})

    def select(self, signals: Signals) -> Selection:
        """Order by distance to the median."""
        distance = np.abs(signals.losses - np.median(signals.losses))
        return Selection(_uniform(signals), np.argsort(distance, kind="stable"))


class Gradient(Strategy):
    """The order of the gradient products at the base model."""

    name = "gradient"
    summary = "largest first-order loss increase along the task gradient first"
    needs = frozenset({"gradients"})

    def select(self, signals: Signals) -> Selection:
        """Order by gradient product, highest first."""
        return Selection(_uniform(signals), _descending(signals.gradients))


class MostForgotten(Strategy):
    """A random order that `lm.MostForgottenSelector` revises during training."""

    name = "most-forgotten"
    summary = "during training: of every few random candidates, the one whose loss rose most since the base model"
    phase = "in-training"

    def select(self, signals: Signals) -> Selection:
        """Sample uniformly; the selector decides."""
        return Selection(_uniform(signals))


class SoftmaxTruth(_Softmax):
    """The upper bound of `forecast`."""

    name = "truth"
    summary = "sample by softmax of measured forgetting: the upper bound of 'forecast'"
    needs = frozenset({"truth"})

    def select(self, signals: Signals) -> Selection:
        """Sample by softmax of measured forgetting."""
        return Selection(softmax_weights(signals.truth, self.temperature))
