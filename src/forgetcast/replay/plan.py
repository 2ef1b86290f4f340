"""Replay plans: which upstream examples to mix into a fine-tune, how often, and which to keep aside for judging."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, Field

from forgetcast.atlas.matrix import check_fingerprint
from forgetcast.data.pool import Pool
from forgetcast.data.recipe import Recipe
from forgetcast.defaults import MAX_SEED, MOST_EXAMPLES
from forgetcast.errors import ConfigError, DataError, MismatchError
from forgetcast.files import read_table, write_table
from forgetcast.replay.corpus import Candidates
from forgetcast.replay.sampling import interleave, passes, stratified_order
from forgetcast.replay.signals import Signals
from forgetcast.replay.strategies import Phase, Strategy, get_strategy
from forgetcast.results import validated


class _Metadata(BaseModel):
    """Metadata of the file; what has a default is not in those of earlier versions, or of some strategies."""

    ratio: float
    strategy: str
    seed: int
    pool: str = Field(min_length=1)
    phase: Phase | None = None
    summary: str = ""
    ranked_share: float = 1.0
    repeat: bool = False
    recipe: Recipe | None = None


@dataclass(frozen=True)
class ReplayPlan:
    """Which examples of a pool to replay: sampling weights, or an order.

    Parameters
    ----------
    ids : sequence of str, length N
        The whole pool.
    weights : array, shape (N,)
        Probability of being the first example sampled; sums to one. All zero if nothing is replayed. Equal if the rank
        alone sets the order.
    held_out : array of bool, shape (N,)
        Examples that are never replayed, so that they can be judged on.
    ratio : float
        Replayed examples per new-task example, e.g. 1/32.
    strategy : str
        Name of the strategy.
    seed : int
        Of the order in which examples are sampled.
    pool_fingerprint : str
    rank : array of int, shape (N,), optional
        Place of each example in the order of replay, from 0; -1 where it is never replayed. None where the order is
        sampled by weight.
    ranked_share : float
        Fraction of the replayed examples that follows the rank; it alternates with samples by weight.
    strata : sequence of str, length N, optional
        Label of each example; every prefix of the order has each label in proportion.
    repeat : bool
        Whether a fine-tune may reuse examples once all have been replayed: see `count`.
    phase : Phase
        When the strategy acts.
    summary : str
        What the strategy does, in one line.
    recipe : Recipe, optional
        The fine-tune that the plan is made for, which an export carries over; None where it is not known.

    Raises
    ------
    DataError
        If a weight is negative or not finite, the weights do not sum to one, a held-out example has one, a rank is
        missing or occurs twice, or the phase is none.
    ConfigError
        If the ratio or the seed is out of range.
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
    phase: Phase = "planned"
    summary: str = ""
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        """Bring the arrays to their types and check them."""
        object.__setattr__(self, "ids", tuple(self.ids))
        object.__setattr__(self, "weights", np.asarray(self.weights, dtype=np.float64))
        object.__setattr__(self, "held_out", np.asarray(self.held_out, dtype=bool))
        if not len(self.ids) == len(self.weights) == len(self.held_out):
            raise DataError("a replay plan needs one weight and one held-out mark for every id")
        if self.phase not in get_args(Phase):
            raise DataError(f"the phase of a replay plan is one of {', '.join(get_args(Phase))}, not {self.phase!r}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"the seed must be between 0 and {MAX_SEED}, not {self.seed}")
        _check_ratio(self.ratio, self.strategy, self.phase)
        for id_, weight, held in zip(self.ids, self.weights, self.held_out, strict=True):
            if not np.isfinite(weight) or weight < 0:
                raise DataError(f"the replay weight of {id_!r} is {weight}; it must be finite and not negative")
            if held and weight > 0:
                raise DataError(f"{id_!r} is held out, but has a replay weight")
        if self.weights.any() and not np.isclose(self.weights.sum(), 1, rtol=0, atol=1e-6):
            raise DataError(f"the replay weights sum to {self.weights.sum():g}; they must sum to 1")
        if self.phase == "padding" and self.weights.any():
            raise DataError("a plan that pads with new examples has no replay weights")
        if self.ratio > 0 and self.phase != "padding" and not self.weights.any():
            raise DataError("ratio > 0, but no example has a weight above zero")
        if self.rank is not None:
            object.__setattr__(self, "rank", np.asarray(self.rank, dtype=np.int64))
            self._check_rank(self.rank)
        if self.strata is not None:
            object.__setattr__(self, "strata", tuple(self.strata))
            if len(self.strata) != len(self.ids) or self.rank is not None:
                raise DataError("strata need a label for every id, and exclude a rank")

    def __repr__(self) -> str:
        """Return strategy, ratio and size."""
        return (
            f"ReplayPlan({self.strategy!r}, ratio {self.ratio:.4g}, {self.usable} of {len(self.ids)} examples usable, "
            f"{int(self.held_out.sum())} held out)"
        )

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
        """Count the replayed examples for `steps` new batches.

        Raises
        ------
        ConfigError
            If there would be none, or more than the plan has although it may not repeat any.
        """
        wanted = replay_steps(steps, self.ratio) * batch_size if self.ratio else 0
        self.check_count(wanted)
        return wanted

    def check_count(self, wanted: int) -> None:
        """Raise ConfigError if `wanted` exceeds what the plan has although it may not repeat any."""
        if wanted > MOST_EXAMPLES:
            raise ConfigError(f"{wanted:,} examples are to be replayed; at most {MOST_EXAMPLES:,} can be")
        if wanted > self.usable > 0 and not self.repeat:
            raise ConfigError(
                f"{wanted} examples are to be replayed, and the plan has {self.usable}: take a ratio of at most "
                f"{self.ratio * self.usable / wanted:.2g} or a larger pool, or let examples come again (--repeat where "
                "the plan is made)"
            )

    def order(self, count: int, *, already_replayed: Iterable[str] = ()) -> tuple[str, ...]:
        """Return the ids to replay, in order: by rank or sampled by weight, without replacement until all are used.

        The same plan always gives the same order, and a longer one starts with the shorter. Ids in `already_replayed`
        come again only once all others were replayed as often.
        """
        usable = np.flatnonzero(self.weights)
        if count and not len(usable):
            raise ConfigError("this plan replays nothing")
        already = Counter(already_replayed)
        times = np.array([already[self.ids[i]] for i in usable.tolist()]) if already else np.zeros(len(usable), int)
        rng = np.random.default_rng(self.seed)
        drawn: list[int] = []
        passes = int(times.min()) if len(times) else 0
        while len(drawn) < count:
            # Arrival order of exponential clocks with these rates: successive sampling without replacement.
            with np.errstate(over="ignore"):  # a tiny weight comes last
                arrival = np.argsort(rng.exponential(size=len(usable)) / self.weights[usable])
            due = usable[times <= passes]
            arranged = self._arranged(usable[arrival])
            drawn.extend(arranged[np.isin(arranged, due)].tolist())
            passes += 1
        return tuple(self.ids[i] for i in drawn[:count])

    def _arranged(self, drawn: np.ndarray) -> np.ndarray:
        """Order one pass over all usable examples, given one that was sampled by weight."""
        if self.strata is not None:
            return stratified_order(drawn, self.strata)
        if self.rank is None:
            return drawn
        return interleave(drawn[np.argsort(self.rank[drawn])], drawn, self.ranked_share)

    def without(self, ids: Iterable[str]) -> ReplayPlan:
        """Return the plan with some examples never replayed; they are not held out, and keep their places.

        Raises
        ------
        ConfigError
            If nothing is left to replay.
        """
        spared = frozenset(ids)
        kept = np.array([id_ not in spared for id_ in self.ids], dtype=bool)
        weights = np.where(kept, self.weights, 0.0)
        if self.weights.any() and not weights.any():
            raise ConfigError("none of the examples that may be replayed is left")
        return replace(
            self,
            weights=weights / weights.sum() if weights.any() else weights,
            rank=None if self.rank is None else np.where(kept, self.rank, -1),
        )

    def of_texts(self, texts: Pool) -> ReplayPlan:
        """Return the same choice for other texts of the same examples, such as a model's own answers.

        Parameters
        ----------
        texts : Pool
            Under ids of the plan's; those of held-out examples stay held out, and what has no text is not replayed.

        Raises
        ------
        MismatchError
            If an id is not the plan's.
        ConfigError
            If nothing is left to replay.
        """
        place = {id_: i for i, id_ in enumerate(self.ids)}
        if (unknown := next((id_ for id_ in texts.ids if id_ not in place), None)) is not None:
            raise MismatchError(f"the texts have an example {unknown!r} that the pool of the plan does not have")
        rows = np.array([place[id_] for id_ in texts.ids])
        weights = self.weights[rows]
        if self.weights.any() and not weights.any():
            raise ConfigError("none of the examples that may be replayed has such a text")
        rank = None
        if self.rank is not None:
            rank = np.full(len(rows), -1)
            usable = np.flatnonzero(self.rank[rows] >= 0)
            rank[usable[np.argsort(self.rank[rows][usable])]] = np.arange(len(usable))
        return replace(
            self,
            ids=tuple(texts.ids),
            weights=weights / weights.sum() if weights.any() else weights,
            held_out=self.held_out[rows],
            pool_fingerprint=texts.fingerprint,
            rank=rank,
            strata=None if self.strata is None else [self.strata[i] for i in rows.tolist()],
        )

    def save(self, path: str | Path) -> None:
        """Write a Parquet file with the columns id, weight and held_out; rank or stratum where there is one."""
        columns = {
            "id": pa.array(self.ids, pa.string()),
            "weight": pa.array(self.weights, pa.float64()),
            "held_out": pa.array(self.held_out, pa.bool_()),
        }
        metadata = {"ratio": self.ratio, "strategy": self.strategy, "seed": self.seed, "pool": self.pool_fingerprint}
        metadata |= {"phase": self.phase, "summary": self.summary}
        if self.rank is not None:
            columns["rank"] = pa.array(self.rank, pa.int64(), mask=self.rank < 0)
            metadata["ranked_share"] = self.ranked_share
        if self.repeat:
            metadata["repeat"] = True
        if self.recipe is not None:
            metadata["recipe"] = self.recipe.model_dump()
        if self.strata is not None:
            columns["stratum"] = pa.array(self.strata, pa.string())
        write_table(pa.table(columns), Path(path), metadata)

    @classmethod
    def load(cls, path: str | Path) -> ReplayPlan:
        """Read a file that `save` wrote.

        Raises
        ------
        DataError, ConfigError
            If the file is not a replay plan; the message names what is missing or invalid.
        """
        columns, optional = {"id": str, "weight": float, "held_out": bool}, {"rank": int, "stratum": str}
        table, content = read_table(Path(path), columns, optional, kind="replay plan")
        metadata = validated(_Metadata, content, f"{path} is not a replay plan: its metadata")
        names = table.column_names
        try:
            # Files of earlier versions have no phase; their strategies are among those that ship.
            made_by = get_strategy(metadata.strategy) if metadata.phase is None else None
            return cls(
                ids=table.column("id").to_pylist(),
                weights=table.column("weight").to_numpy(),
                held_out=table.column("held_out").to_numpy(zero_copy_only=False),
                ratio=metadata.ratio,
                strategy=metadata.strategy,
                seed=metadata.seed,
                pool_fingerprint=metadata.pool,
                rank=table.column("rank").fill_null(-1).to_numpy() if "rank" in names else None,
                ranked_share=metadata.ranked_share,
                strata=table.column("stratum").to_pylist() if "stratum" in names else None,
                repeat=metadata.repeat,
                phase=metadata.phase or (made_by.phase if made_by is not None else "planned"),
                summary=metadata.summary if made_by is None else made_by.summary,
                recipe=metadata.recipe,
            )
        except (DataError, ConfigError) as error:
            raise type(error)(f"{path}: {error}") from None


def make_plan(
    pool: Pool | Candidates,
    strategy: str | Strategy,
    signals: Signals | None = None,
    *,
    ratio: float,
    held_out: Sequence[str] = (),
    among: Sequence[str] | None = None,
    repeat: bool = False,
    seed: int = 0,
) -> ReplayPlan:
    """Apply a strategy to a pool.

    Parameters
    ----------
    pool : Pool or Candidates
    strategy : str or Strategy
        A name, or an object where it has settings.
    signals : Signals, optional
        What is known of the pool's examples; only the strategy's `needs` are used. Values of held-out examples are
        never read.
    ratio : float
        Replayed examples per new-task example; 0 for 'none'.
    held_out : sequence of str
        Ids that are never replayed.
    among : sequence of str, optional
        Ids that may be replayed, unless they are held out; default: all.
    repeat : bool
        Whether a fine-tune may reuse examples once all have been replayed.
    seed : int

    Raises
    ------
    ConfigError
        If the strategy is unknown, its ratio makes no sense, or nothing is left to replay.
    DataError
        If a signal that the strategy needs is missing, has another shape, or is not finite.
    """
    rule = get_strategy(strategy) if isinstance(strategy, str) else strategy
    _check_ratio(ratio, rule.name, rule.phase)
    held = np.zeros(len(pool), dtype=bool)
    held[pool.positions(held_out, where="the held-out list")] = True
    usable = np.flatnonzero(~held)
    if among is not None:
        usable = np.intersect1d(usable, pool.positions(among, where="the list of what may be replayed"))
    if not len(usable):
        raise ConfigError("every example is held out: nothing is left to replay")
    signals = Signals(pool.ids) if signals is None else signals
    if missing := rule.needs - signals.names:
        raise DataError(
            f"the strategy {rule.name!r} needs {min(missing)}, a value for each example; the pool has {len(pool)}"
        )
    if len(signals) != len(pool) or tuple(signals.ids) != pool.ids:
        raise MismatchError(f"the signals are of {len(signals)} other examples than the pool's {len(pool)}")
    restricted, rows = signals.restrict(usable, rule.needs)
    if not len(rows):
        raise DataError(f"the strategy {rule.name!r} has no signal to use: no usable example was measured")
    selection = rule.select(restricted)
    weights = np.zeros(len(pool))
    weights[rows] = selection.weights
    rank = None
    if selection.order is not None:
        order = rows[selection.order]
        order = order[weights[order] > 0]  # a low temperature leaves some without any weight
        rank = np.full(len(pool), -1)
        rank[order] = np.arange(len(order))
    return ReplayPlan(
        pool.ids,
        weights,
        held,
        ratio,
        rule.name,
        seed,
        pool.fingerprint,
        rank=rank,
        ranked_share=selection.ranked_share,
        strata=pool.sources if selection.by_source else None,
        repeat=repeat,
        phase=rule.phase,
        summary=rule.summary,
    )


def ratio_of_share(share: float) -> float:
    """Return the ratio of replayed to new examples at which replayed ones are a share of all.

    Raises
    ------
    ConfigError
        If the share is not above 0 and below 1.
    """
    if not 0 < share < 1:
        raise ConfigError(f"a share of the set or of the tokens must be above 0 and below 1, not {share:g}")
    return share / (1 - share)


def with_share_of_tokens(
    plan: ReplayPlan, share: float, new: Sequence[int], tokens: Callable[[str], int]
) -> ReplayPlan:
    """Give a plan the ratio at which a share of all tokens of its recipe's fine-tune are replayed ones.

    Batches are whole, so the ratio is that of the number of replayed batches that comes closest.

    Parameters
    ----------
    plan : ReplayPlan
        With a recipe.
    share : float
        Between 0 and 1.
    new : sequence of int
        Tokens of each example of the new task, as it is trained on.
    tokens : callable
        Tokens of an example of the pool, by its id.

    Raises
    ------
    ConfigError
        If the share is out of range, the plan replays nothing, or has too few examples for it.
    """
    if plan.recipe is None or not plan.usable:
        raise ConfigError("a share of tokens needs a plan that replays, with the recipe of its fine-tune")
    wanted, recipe = ratio_of_share(share), plan.recipe
    batch = recipe.batch_size
    order = passes(len(new), [recipe.seed])
    fresh = sum(new[next(order)] for _ in range(recipe.steps * batch))
    most = MOST_EXAMPLES // batch if plan.repeat else plan.usable // batch
    batches, replayed = min(64, most), [0]
    while True:
        ids = plan.order(batches * batch)
        for i in range(len(replayed) - 1, batches):
            replayed.append(replayed[-1] + sum(map(tokens, ids[i * batch : (i + 1) * batch])))
        if replayed[-1] >= wanted * fresh or batches == most:
            break
        batches = min(2 * batches, most)
    if replayed[-1] < wanted * fresh:
        raise ConfigError(
            f"the {plan.usable} examples that may be replayed are {replayed[-1] / (replayed[-1] + fresh):.0%} of the "
            f"tokens, not {share:.0%}: let examples come again (--repeat), or take a larger pool"
        )
    closest = min(range(1, len(replayed)), key=lambda i: abs(replayed[i] / (replayed[i] + fresh) - share))
    return replace(plan, ratio=closest / recipe.steps)


def replay_steps(steps: int, ratio: float) -> int:
    """Count the batches to replay for `steps` batches of new examples.

    Raises
    ------
    ConfigError
        If the ratio is so small that there would be none.
    """
    if not (count := round(steps * ratio)):
        raise ConfigError(f"a ratio of {ratio:g} over {steps} steps replays no batch; use at least {1 / steps:.3g}")
    return count


def achieved_ratio(steps: int, ratio: float) -> float:
    """Return the ratio that `steps` batches of new examples have with whole batches of replayed ones.

    Raises
    ------
    ConfigError
        As `replay_steps`.
    """
    return replay_steps(steps, ratio) / steps if ratio else 0.0


def default_ratios(steps: int) -> tuple[float, float]:
    """Return two different ratios, about 1/32 and 1/8, that `steps` batches of new examples have in whole batches."""
    few = max(1, round(steps / 32))
    return few / steps, max(few + 1, round(steps / 8)) / steps


def ratio_note(ratio: float, steps: int, batch_size: int) -> str | None:
    """Say what a ratio becomes in whole batches; None where they hit it. Raises as `replay_steps`."""
    achieved = achieved_ratio(steps, ratio)
    if np.isclose(achieved, ratio, rtol=1e-9, atol=0):
        return None
    batches = replay_steps(steps, ratio)
    return (
        f"whole batches turn the ratio {ratio:.4g} into {achieved:.4g}: {batches} batch{'es' * (batches != 1)} of "
        f"{batch_size} replayed examples and {steps} of new ones"
    )


def _check_ratio(ratio: float, strategy: str, phase: Phase) -> None:
    if not np.isfinite(ratio) or ratio < 0:
        raise ConfigError(f"the replay ratio must be finite and not negative, not {ratio}")
    if (phase == "never") != (ratio == 0):
        raise ConfigError(f"the strategy {strategy!r} is incompatible with the ratio {ratio}: only 'none' has 0")
