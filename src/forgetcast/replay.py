"""Replay plans: which upstream examples to mix into a fine-tune, how often, and which to keep aside for judging."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import scipy

from forgetcast.errors import ConfigError, DataError, MismatchError
from forgetcast.matrix import check_fingerprint
from forgetcast.pool import Pool
from forgetcast.scores import read_table, write_table

STRATEGIES = ("none", "random", "forecast")

EFFECTIVE_SHARE = 0.25
"""Effective sample size that the default temperature aims at, as a share of the examples that may be replayed.

The paper's fixed temperature of 0.1 leaves about 1 % on real rows: a few outliers are then all that is replayed."""


@dataclass(frozen=True)
class ReplayPlan:
    """Sampling weights over a pool.

    Parameters
    ----------
    ids : sequence of str, length N
        The whole pool.
    weights : array, shape (N,)
        Probability of being the first example replayed; sums to one. All zero where nothing is to be replayed.
    held_out : array of bool, shape (N,)
        Examples that are never replayed, so that they can be judged on.
    ratio : float
        Replayed examples per new-task example, e.g. 1/32.
    strategy : str
    seed : int
        Of the order in which examples are drawn.
    pool_fingerprint : str

    Raises
    ------
    DataError
        If a weight is negative or not finite, or a held-out example has one.
    """

    ids: Sequence[str]
    weights: np.ndarray
    held_out: np.ndarray
    ratio: float
    strategy: str
    seed: int
    pool_fingerprint: str

    def __post_init__(self) -> None:
        """Bring the arrays to their types and check them."""
        object.__setattr__(self, "ids", tuple(self.ids))
        object.__setattr__(self, "weights", np.asarray(self.weights, dtype=np.float64))
        object.__setattr__(self, "held_out", np.asarray(self.held_out, dtype=bool))
        if not len(self.ids) == len(self.weights) == len(self.held_out):
            raise DataError("a replay plan needs one weight and one held-out mark for every id")
        _check_ratio(self.ratio, self.strategy)
        for id_, weight, held in zip(self.ids, self.weights, self.held_out, strict=True):
            if not np.isfinite(weight) or weight < 0:
                raise DataError(f"the replay weight of {id_!r} is {weight}; it must be finite and not negative")
            if held and weight > 0:
                raise DataError(f"{id_!r} is held out, but has a replay weight")
        if self.ratio > 0 and not self.weights.any():
            raise DataError("the plan is to replay, but no example has a weight above zero")

    @property
    def held_out_ids(self) -> tuple[str, ...]:
        """Ids that are never replayed."""
        return tuple(id_ for id_, held in zip(self.ids, self.held_out, strict=True) if held)

    @property
    def effective_size(self) -> float:
        """Effective number of examples that the weights spread over, (sum w)^2 / sum w^2."""
        squares = float((self.weights**2).sum())
        return float(self.weights.sum()) ** 2 / squares if squares else 0.0

    @property
    def fingerprint(self) -> str:
        """Hash over the ids and their weights (64 hexadecimal digits)."""
        digest = hashlib.sha256(json.dumps(self.ids).encode())
        digest.update(self.weights.tobytes())
        return digest.hexdigest()

    def check_pool(self, pool: Pool) -> None:
        """Raise MismatchError if the plan was made for a pool with another fingerprint."""
        check_fingerprint("the replay plan", self.pool_fingerprint, pool)

    def order(self, count: int) -> tuple[str, ...]:
        """Draw the ids to replay, in order: by weight and without replacement until all are used, then anew.

        The same plan always gives the same order, and a longer one starts with the shorter.
        """
        usable = np.flatnonzero(self.weights)
        if count and not len(usable):
            raise ConfigError("this plan replays nothing")
        rng = np.random.default_rng(self.seed)
        drawn: list[int] = []
        while len(drawn) < count:
            # Arrival order of exponential clocks with these rates: successive sampling without replacement.
            drawn.extend(usable[np.argsort(rng.exponential(size=len(usable)) / self.weights[usable])])
        return tuple(self.ids[i] for i in drawn[:count])

    def save(self, path: str | Path) -> None:
        """Write a Parquet file with the columns id, weight and held_out."""
        table = pa.table(
            {
                "id": pa.array(self.ids, pa.string()),
                "weight": pa.array(self.weights, pa.float64()),
                "held_out": pa.array(self.held_out, pa.bool_()),
            }
        )
        metadata = {"ratio": self.ratio, "strategy": self.strategy, "seed": self.seed, "pool": self.pool_fingerprint}
        write_table(table, Path(path), metadata)

    @classmethod
    def load(cls, path: str | Path) -> ReplayPlan:
        """Read a file that `save` wrote."""
        table, metadata = read_table(Path(path), ("id", "weight", "held_out"), kind="replay plan")
        try:
            return cls(
                ids=table.column("id").to_pylist(),
                weights=table.column("weight").to_numpy(),
                held_out=table.column("held_out").to_numpy(zero_copy_only=False),
                ratio=metadata["ratio"],
                strategy=metadata["strategy"],
                seed=metadata["seed"],
                pool_fingerprint=metadata["pool"],
            )
        except KeyError as error:
            raise DataError(f"{path} is not a replay plan: its metadata lacks {error}") from None
        except (DataError, ConfigError) as error:
            raise type(error)(f"{path}: {error}") from None


def make_plan(
    pool: Pool,
    strategy: str,
    ratio: float,
    *,
    held_out: Sequence[str] = (),
    forecast: Any = None,
    temperature: float | None = None,
    seed: int = 0,
) -> ReplayPlan:
    """Make a replay plan.

    Parameters
    ----------
    pool : Pool
    strategy : {'none', 'random', 'forecast'}
        'random' gives every example the same weight; 'forecast' weighs by softmax(forecast / temperature).
    ratio : float
        Replayed examples per new-task example; 0 for 'none'.
    held_out : sequence of str
        Ids that are never replayed.
    forecast : array-like, shape (N,), optional
        Expected forgetting in the pool's order, nats per token; needed by 'forecast'.
    temperature : float, optional
        In nats. Default: the one at which the effective sample size is EFFECTIVE_SHARE of the usable examples.
    seed : int
    """
    _check_ratio(ratio, strategy)
    held = np.zeros(len(pool), dtype=bool)
    held[pool.positions(held_out, where="the held-out list")] = True
    weights = np.zeros(len(pool))
    if held.all():
        raise ConfigError("every example is held out: nothing is left to replay")
    if strategy == "random":
        weights[~held] = 1.0 / (~held).sum()
    elif strategy == "forecast":
        values = np.asarray(forecast, dtype=np.float64) if forecast is not None else np.empty(0)
        if values.shape != (len(pool),):
            raise MismatchError(f"the forecast has shape {values.shape}; the pool has {len(pool)} examples")
        if not np.isfinite(values).all():
            raise DataError(f"the forecast of {pool.ids[int(np.argmin(np.isfinite(values)))]!r} is not a finite number")
        weights[~held] = softmax_weights(values[~held], temperature)
    return ReplayPlan(pool.ids, weights, held, ratio, strategy, seed, pool.fingerprint)


def softmax_weights(forecast: np.ndarray, temperature: float | None = None) -> np.ndarray:
    """Softmax of forecast / temperature, shape (n,), summing to one.

    Without a temperature, the one is found at which the effective sample size is EFFECTIVE_SHARE of n.
    """

    def weights(inverse: float) -> np.ndarray:
        w = np.exp(inverse * (forecast - forecast.max()))
        return np.asarray(w / w.sum())

    if temperature is not None:
        if not temperature > 0:
            raise ConfigError(f"the temperature must be positive, not {temperature}")
        return weights(1 / temperature)
    spread = float(np.ptp(forecast))
    target = max(EFFECTIVE_SHARE * len(forecast), 1.0)

    def excess(log_inverse: float) -> float:
        return 1 / float((weights(np.exp(log_inverse)) ** 2).sum()) - target

    if spread == 0:
        return weights(0.0)
    low, high = np.log(1e-3 / spread), np.log(1e6 / spread)
    if excess(low) <= 0 or excess(high) >= 0:  # too few examples, or ties: no temperature reaches the target
        return weights(1 / spread)
    return weights(float(np.exp(scipy.optimize.brentq(excess, low, high))))


def _check_ratio(ratio: float, strategy: str) -> None:
    if strategy not in STRATEGIES:
        raise ConfigError(f"unknown replay strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    if not np.isfinite(ratio) or ratio < 0:
        raise ConfigError(f"the replay ratio must be finite and not negative, not {ratio}")
    if (strategy == "none") != (ratio == 0):
        raise ConfigError(f"the strategy {strategy!r} does not go with the ratio {ratio}: 'none', and only it, has 0")
