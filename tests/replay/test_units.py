"""How much to replay, in the units that people use: per new example, of the set, of the tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgetcast import ConfigError, Pool, ReplayPlan
from forgetcast.lm import ReplayMixture
from forgetcast.replay import ratio_of_share, with_share_of_tokens
from support.cli import RunCommand
from support.data import make_pool
from support.models import tiny
from support.plans import plan_for
from support.training import POOL, TASK, make_recipe, measured_atlas, model_files


@given(st.floats(0.01, 0.99))
def test_a_share_of_the_set_is_a_ratio(share: float) -> None:
    ratio = ratio_of_share(share)
    assert ratio / (1 + ratio) == pytest.approx(share)


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="above 0 and below 1"):
        ratio_of_share(share)


def tokens_of(plan: ReplayPlan, task: Pool, pool: Pool) -> tuple[int, int]:
    """Tokens of new and of replayed examples, as a fine-tune reads them."""
    assert plan.recipe is not None
    mixture = ReplayMixture(
        task,
        tiny().tokenizer,
        steps=plan.recipe.steps,
        batch_size=plan.recipe.batch_size,
        max_length=plan.recipe.max_length,
        seed=plan.recipe.seed,
        plan=plan,
        pool=pool,
    )
    at = range(0, len(mixture), plan.recipe.batch_size)
    sums = [sum(len(mixture[i].ids) for i in range(start, start + plan.recipe.batch_size)) for start in at]
    replayed = [mixture.replays(step) for step in range(mixture.steps)]
    return tuple(sum(n for n, old in zip(sums, replayed, strict=True) if old is kind) for kind in (False, True))  # type: ignore[return-value]


class TestTokens:
    recipe = make_recipe(steps=12, batch_size=2)

    def plan(self, share: float, **options: bool) -> ReplayPlan:
        base = tiny()
        plan = replace(plan_for(POOL, "random", 1.0, held_out=POOL.ids[:8], **options), recipe=self.recipe)
        lengths = {
            example.id: len(base.encode(example, self.recipe.max_length, end=True).ids) for example in (*POOL, *TASK)
        }
        return with_share_of_tokens(plan, share, [lengths[id_] for id_ in TASK.ids], lengths.__getitem__)

    @pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
    def test_no_number_of_batches_comes_closer(self, share: float) -> None:
        """Oracle: the tokens of the mixture that a fine-tune reads, one batch more and one fewer."""
        plan = self.plan(share, repeat=True)
        batches = round(plan.ratio * self.recipe.steps)
        off = {}
        for count in (batches - 1, batches, batches + 1):
            if count:
                new, old = tokens_of(replace(plan, ratio=count / self.recipe.steps), TASK, POOL)
                off[count] = abs(old / (old + new) - share)
        assert min(off, key=lambda count: off[count]) == batches

    def test_most_of_the_set_may_be_replayed(self) -> None:
        plan = self.plan(0.9, repeat=True)
        assert plan.ratio > 1
        new, old = tokens_of(plan, TASK, POOL)
        assert old / (old + new) == pytest.approx(0.9, abs=0.02)

    def test_too_few_examples_are_said(self) -> None:
        with pytest.raises(ConfigError, match=r"the 32 examples that may be replayed are \d+% of the tokens, not 90%"):
            self.plan(0.9)
        with pytest.raises(ConfigError, match="a plan that replays"):
            with_share_of_tokens(plan_for(make_pool(), "none", 0.0), 0.5, [3], lambda _: 3)


def test_commands(tmp_path: Path, run: RunCommand) -> None:
    model_files(tmp_path)
    atlas = measured_atlas(tmp_path, make_recipe(steps=12, batch_size=2))
    words = ("plan", atlas.path, "-o", tmp_path / "plan.parquet", "--json", "--repeat")
    code, out, err = run(*words, "--share-of-set", 0.75)
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["ratio"], facts["replayed"], facts["new"], facts["share_of_set"]) == (pytest.approx(3), 72, 24, 0.75)
    tokens = ("--model", tmp_path / "model", "--task", tmp_path / "task.jsonl")
    code, out, err = run(*words, "--share-of-tokens", 0.4, *tokens)
    assert code == 0, err
    new, old = tokens_of(ReplayPlan.load(tmp_path / "plan.parquet"), TASK, atlas.pool)
    assert old / (old + new) == pytest.approx(0.4, abs=0.03)
    for given_, reason in (
        (("--share-of-set", 0.2, "--ratio", 0.2), "give one of --ratio, --share-of-set"),
        (("--share-of-set", 1), "above 0 and below 1, not 1"),
        (("--share-of-tokens", 0.2), "--share-of-tokens needs --model and --task"),
    ):
        code, _, err = run(*words, *given_)
        assert code == 2
        assert reason in err
