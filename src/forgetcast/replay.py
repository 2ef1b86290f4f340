"""Replay plans: which upstream examples to mix into a fine-tune, how often, and which to keep aside for judging."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from forgetcast._files import read_table, write_table
from forgetcast.errors import ConfigError, DataError, MismatchError
from forgetcast.matrix import check_fingerprint
from forgetcast.pool import Pool
from forgetcast.strategies import EFFECTIVE_SHARE, STRATEGIES, by_stratum, in_turn, select, softmax_weights

__all__ = ["EFFECTIVE_SHARE", "STRATEGIES", "ReplayPlan", "make_plan", "softmax_weights"]


@dataclass(frozen=True)
class ReplayPlan:
    """Sampling weights over a pool, or an order.

    Parameters
    ----------
    ids : sequence of str, length N
        The whole pool.
    weights : array, shape (N,)
        Probability of being the first example drawn; sums to one. All zero where nothing is to be replayed. Equal where
        the rank alone says what comes first.
    held_out : array of bool, shape (N,)
        Examples that are never replayed, so that they can be judged on.
    ratio : float
        Replayed examples per new-task example, e.g. 1/32.
    strategy : str
    seed : int
        Of the order in which examples are drawn.
    pool_fingerprint : str
    rank : array of int, shape (N,), optional
        Place of each example in the order of replay, from 0; -1 where it is never replayed. None where the order is
        drawn by weight.
    ranked_share : float
        Share of the replayed examples that follow the rank; the others, in turn with them, are drawn by weight.
    strata : sequence of str, length N, optional
        Label of each example; whatever number is replayed has each label in its share of what may be.
    repeat : bool
        Whether a fine-tune may replay examples again once all were: see `count`.

    Raises
    ------
    DataError
        If a weight is negative or not finite, a held-out example has one, or a rank is missing or occurs twice.
    """

    ids: Sequence[str]
    weights: np.ndarray
    held_out: np.ndarray
    ratio: float
    strategy: str
    seed: int
    pool_fingerprint: str
    rank: np.ndarray | None = None
    ranked_share: float = 1.0
    strata: Sequence[str] | None = None
    repeat: bool = False

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
        if self.strategy == "padding" and self.weights.any():
            raise DataError("a plan that pads with new examples has no replay weights")
        if self.ratio > 0 and self.strategy != "padding" and not self.weights.any():
            raise DataError("the plan is to replay, but no example has a weight above zero")
        if self.rank is not None:
            object.__setattr__(self, "rank", np.asarray(self.rank, dtype=np.int64))
            self._check_rank(self.rank)
        if self.strata is not None:
            object.__setattr__(self, "strata", tuple(self.strata))
            if len(self.strata) != len(self.ids) or self.rank is not None:
                raise DataError("strata need a label for every id, and no rank beside them")

    def _check_rank(self, rank: np.ndarray) -> None:
        if rank.shape != self.weights.shape or ((rank >= 0) != (self.weights > 0)).any():
            raise DataError("a replay plan with ranks needs one for every example that has a weight, and for no other")
        if len(np.unique(rank[rank >= 0])) < (rank >= 0).sum():
            raise DataError("two examples have the same rank in the replay plan")
        if not 0 < self.ranked_share <= 1:
            raise DataError(f"the share that follows the rank must be above 0 and at most 1, not {self.ranked_share}")

    @property
    def held_out_ids(self) -> tuple[str, ...]:
        """Ids that are never replayed."""
        return tuple(id_ for id_, held in zip(self.ids, self.held_out, strict=True) if held)

    @property
    def usable(self) -> int:
        """Number of examples that may be replayed."""
        return int((self.weights > 0).sum())

    @property
    def effective_size(self) -> float:
        """Effective number of examples that the weights spread over, (sum w)^2 / sum w^2."""
        squares = float((self.weights**2).sum())
        return float(self.weights.sum()) ** 2 / squares if squares else 0.0

    @property
    def fingerprint(self) -> str:
        """Hash over the ids, their weights, and their ranks or strata if there are any (64 hexadecimal digits)."""
        digest = hashlib.sha256(json.dumps(self.ids).encode())
        digest.update(self.weights.tobytes())
        if self.rank is not None:
            digest.update(self.rank.tobytes() + str(self.ranked_share).encode())
        if self.strata is not None:
            digest.update(json.dumps(self.strata).encode())
        return digest.hexdigest()

    def check_pool(self, pool: Pool) -> None:
        """Raise MismatchError if the plan was made for a pool with another fingerprint."""
        check_fingerprint("the replay plan", self.pool_fingerprint, pool)

    def count(self, steps: int, batch_size: int) -> int:
        """Examples that are replayed beside so many batches of new ones.

        Raises
        ------
        ConfigError
            If there would be none, or more than the plan has and it is not to repeat any.
        """
        wanted = replay_steps(steps, self.ratio) * batch_size if self.ratio else 0
        self.check_count(wanted)
        return wanted

    def check_count(self, wanted: int) -> None:
        """Raise ConfigError if so many examples are more than the plan has and it is not to repeat any."""
        if wanted > self.usable > 0 and not self.repeat:
            raise ConfigError(
                f"{wanted} examples are to be replayed, and the plan has {self.usable}: take a ratio of at most "
                f"{self.ratio * self.usable / wanted:.2g} or a larger pool, or let examples come again (--repeat where "
                "the plan is made)"
            )

    def order(self, count: int, *, besides: Iterable[str] = ()) -> tuple[str, ...]:
        """Ids to replay, in order: by rank or drawn by weight, without replacement until all are used, then anew.

        The same plan always gives the same order, and a longer one starts with the shorter. What was replayed already,
        `besides`, comes again only once all others were replayed as often.
        """
        usable = np.flatnonzero(self.weights)
        if count and not len(usable):
            raise ConfigError("this plan replays nothing")
        already = Counter(besides)
        times = np.array([already[self.ids[i]] for i in usable.tolist()]) if already else np.zeros(len(usable), int)
        rng = np.random.default_rng(self.seed)
        drawn: list[int] = []
        passes = int(times.min()) if len(times) else 0
        while len(drawn) < count:
            # Arrival order of exponential clocks with these rates: successive sampling without replacement.
            arrival = np.argsort(rng.exponential(size=len(usable)) / self.weights[usable])
            due = usable[times <= passes]
            arranged = self._arranged(usable[arrival])
            drawn.extend(arranged[np.isin(arranged, due)].tolist())
            passes += 1
        return tuple(self.ids[i] for i in drawn[:count])

    def _arranged(self, drawn: np.ndarray) -> np.ndarray:
        """Order of one pass over all that may be replayed, given the same drawn by weight."""
        if self.strata is not None:
            return by_stratum(drawn, self.strata)
        if self.rank is None:
            return drawn
        return in_turn(drawn[np.argsort(self.rank[drawn])], drawn, self.ranked_share)

    def save(self, path: str | Path) -> None:
        """Write a Parquet file with the columns id, weight and held_out; rank or stratum where there is one."""
        columns = {
            "id": pa.array(self.ids, pa.string()),
            "weight": pa.array(self.weights, pa.float64()),
            "held_out": pa.array(self.held_out, pa.bool_()),
        }
        metadata = {"ratio": self.ratio, "strategy": self.strategy, "seed": self.seed, "pool": self.pool_fingerprint}
        if self.rank is not None:
            columns["rank"] = pa.array(self.rank, pa.int64(), mask=self.rank < 0)
            metadata["ranked_share"] = self.ranked_share
        if self.repeat:
            metadata["repeat"] = True
        if self.strata is not None:
            columns["stratum"] = pa.array(self.strata, pa.string())
        write_table(pa.table(columns), Path(path), metadata)

    @classmethod
    def load(cls, path: str | Path) -> ReplayPlan:
        """Read a file that `save` wrote."""
        table, metadata = read_table(Path(path), ("id", "weight", "held_out"), kind="replay plan")
        names = table.column_names
        try:
            return cls(
                ids=table.column("id").to_pylist(),
                weights=table.column("weight").to_numpy(),
                held_out=table.column("held_out").to_numpy(zero_copy_only=False),
                ratio=metadata["ratio"],
                strategy=metadata["strategy"],
                seed=metadata["seed"],
                pool_fingerprint=metadata["pool"],
                rank=table.column("rank").fill_null(-1).to_numpy() if "rank" in names else None,
                ranked_share=metadata.get("ranked_share", 1.0),
                strata=table.column("stratum").to_pylist() if "stratum" in names else None,
                repeat=metadata.get("repeat", False),
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
    among: Sequence[str] | None = None,
    forecast: Any = None,
    truth: Any = None,
    losses: Any = None,
    gradients: Any = None,
    loadings: Any = None,
    temperature: float | None = None,
    repeat: bool = False,
    seed: int = 0,
) -> ReplayPlan:
    """Make a replay plan.

    Parameters
    ----------
    pool : Pool
    strategy : str
        One of `STRATEGIES`, which say what they do and which of the following they need.
    ratio : float
        Replayed examples per new-task example; 0 for 'none'.
    held_out : sequence of str
        Ids that are never replayed. What is said of them below is not looked at.
    among : sequence of str, optional
        Ids that may be replayed, unless they are held out; default: all.
    forecast : array-like, shape (N,), optional
        Expected forgetting in the pool's order, nats per token.
    truth : array-like, shape (N,), optional
        Measured forgetting, nats per token; NaN where it was not measured, which is never replayed.
    losses : array-like, shape (N,), optional
        Of the base model, nats per token; NaN where it has none, which is never replayed.
    gradients : array-like, shape (N,), optional
        How much a step along the task's gradient raises each loss: `lm.gradient_products`; NaN is never replayed.
    loadings : array-like, shape (N, r), optional
        Rows whose products say how alike the forgetting of two examples is: `coverage.correlation_loadings`.
    temperature : float, optional
        In the unit of what the softmax is of. Default: the one at which the effective sample size is EFFECTIVE_SHARE of
        the usable examples.
    repeat : bool
        Whether a fine-tune that is to replay more than there is may replay examples again.
    seed : int

    Raises
    ------
    ConfigError
        If the strategy is unknown, its ratio makes no sense, or nothing is left to replay.
    DataError
        If something that the strategy needs is missing, has another shape, or is not finite.
    """
    _check_ratio(ratio, strategy)
    held = np.zeros(len(pool), dtype=bool)
    held[pool.positions(held_out, where="the held-out list")] = True
    usable = np.flatnonzero(~held)
    if among is not None:
        usable = np.intersect1d(usable, pool.positions(among, where="the list of what may be replayed"))
    if not len(usable):
        raise ConfigError("every example is held out: nothing is left to replay")
    given = {"forecast": forecast, "truth": truth, "losses": losses, "gradients": gradients, "loadings": loadings}
    known = {name: _known(name, given[name], strategy, pool, usable) for name in STRATEGIES[strategy].needs}
    selection = select(strategy, len(usable), known, temperature)
    weights = np.zeros(len(pool))
    weights[usable] = selection.weights
    rank = None
    if selection.order is not None:
        rank = np.full(len(pool), -1)
        rank[usable[selection.order]] = np.arange(len(selection.order))
    return ReplayPlan(
        pool.ids,
        weights,
        held,
        ratio,
        strategy,
        seed,
        pool.fingerprint,
        rank=rank,
        ranked_share=selection.ranked_share,
        strata=pool.sources if strategy == "stratified" else None,
        repeat=repeat,
    )


def _known(name: str, values: Any, strategy: str, pool: Pool, usable: np.ndarray) -> np.ndarray:
    """What is known of the usable examples, checked."""
    if values is None:
        raise DataError(f"the strategy {strategy!r} needs {name}, a value for each example; the pool has {len(pool)}")
    array = np.asarray(values, dtype=np.float64)
    if array.shape[:1] != (len(pool),) or array.ndim != (2 if name == "loadings" else 1):
        raise MismatchError(f"the {name} has shape {array.shape}; the pool has {len(pool)} examples")
    array = array[usable]
    bad = ~np.isfinite(array)
    if name in ("truth", "losses", "gradients"):
        bad &= ~np.isnan(array)
    if bad.any():
        worst = pool.ids[usable[int(np.argmax(bad.reshape(len(usable), -1).any(axis=1)))]]
        raise DataError(f"the {name} of {worst!r} is not a finite number")
    return array


def replay_steps(steps: int, ratio: float) -> int:
    """Batches to replay beside so many batches of new examples.

    Raises
    ------
    ConfigError
        If the ratio is so small that there would be none.
    """
    if not (count := round(steps * ratio)):
        raise ConfigError(f"a ratio of {ratio:g} over {steps} steps replays no batch; use at least {1 / steps:.3g}")
    return count


def _check_ratio(ratio: float, strategy: str) -> None:
    if strategy not in STRATEGIES:
        raise ConfigError(f"unknown replay strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    if not np.isfinite(ratio) or ratio < 0:
        raise ConfigError(f"the replay ratio must be finite and not negative, not {ratio}")
    if (strategy == "none") != (ratio == 0):
        raise ConfigError(f"the strategy {strategy!r} does not go with the ratio {ratio}: 'none', and only it, has 0")
