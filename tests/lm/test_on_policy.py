"""A model's own answers as texts to replay, under the ids of the pool."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from forgetcast import ConfigError, DataError, Example, MismatchError, Pool, ReplayPlan, Verification
from forgetcast.experiments import ReplayComparison, add_arms, arms
from forgetcast.lm import FineTuner, LanguageModel, Recipe, answer_prompts, exact_match, score
from support.cli import RunCommand
from support.data import make_pool, make_task
from support.experiments import verify_on
from support.models import save, tiny
from support.plans import plan_for
from support.training import QUESTIONS, TASKS, make_recipe, measured_atlas, model_files


@pytest.fixture(scope="module")
def taught() -> LanguageModel:
    """Answers the first questions as it was taught, and ends its answers."""
    teach = Recipe(steps=80, learning_rate=1e-2, batch_size=8, max_length=48)
    return FineTuner(tiny()).tune(QUESTIONS, teach).language_model


TEXTS = Pool([Example(f"t{i}", text=f"Text number {i} about rivers.") for i in range(4)])


def with_others() -> Pool:
    wrong = [Example(f"w{i}", prompt=f"Item {i} is", completion=" never", source="w") for i in range(3)]
    return Pool([*TEXTS, *QUESTIONS, *wrong])


class TestAnswers:
    def test_they_are_what_the_model_writes_under_the_ids_of_the_pool(self, taught: LanguageModel) -> None:
        """Oracle: the answers of exact_match, and the completions that it was taught."""
        pool = with_others()
        own = answer_prompts(taught, pool, max_new_tokens=6)
        _, greedy = exact_match(taught, pool, max_new_tokens=6)
        answers = {id_: answer for id_, answer in zip(pool.ids, greedy, strict=True) if answer is not None}
        assert own.asked == 11 == len(answers)
        assert {e.id: (e.completion or "").strip() for e in own.pool} == {id_: answers[id_] for id_ in own.pool.ids}
        assert {e.id: e.completion for e in own.pool if e.id.startswith("q")} == {e.id: e.completion for e in QUESTIONS}
        assert {(e.prompt, e.source) for e in own.pool if e.id == "w1"} == {("Item 1 is", "w")}
        assert own.tokens == 11  # a letter each
        assert own.empty + own.unfinished + own.wrong + own.unlikely + len(own.pool) == own.asked

    def test_filters(self, taught: LanguageModel) -> None:
        pool = with_others()
        right = answer_prompts(taught, pool, max_new_tokens=6, right_only=True)
        assert set(right.pool.ids) == set(QUESTIONS.ids)
        assert right.wrong == 3
        every = answer_prompts(taught, pool, max_new_tokens=6)
        half = answer_prompts(taught, pool, max_new_tokens=6, most_likely=0.5)
        losses = dict(zip(every.pool.ids, score(taught, every.pool).nll, strict=True))
        best = sorted(losses, key=lambda id_: losses[id_])[: len(half.pool)]
        assert len(half.pool) == round(len(every.pool) / 2)
        assert max(losses[id_] for id_ in half.pool.ids) == pytest.approx(max(losses[id_] for id_ in best))

    def test_answers_that_were_cut_are_dropped_unless_asked_for(self) -> None:
        pool = Pool(
            [Example("a", prompt="Once", completion=" upon\na time"), Example("b", prompt="So", completion=" it\nis")]
        )
        with pytest.raises(DataError, match="none of llama's 2 answers is kept: 0 were empty, 2 cut at 4 tokens"):
            answer_prompts(tiny(), pool, max_new_tokens=4)
        own = answer_prompts(tiny(), pool, max_new_tokens=4, keep_unfinished=True)
        assert own.pool.ids == pool.ids
        assert own.tokens == 8
        again = answer_prompts(tiny(), pool, max_new_tokens=4, keep_unfinished=True, temperature=1.0, seed=3)
        same = answer_prompts(tiny(), pool, max_new_tokens=4, keep_unfinished=True, temperature=1.0, seed=3)
        assert again.pool.fingerprint == same.pool.fingerprint != own.pool.fingerprint

    def test_a_pool_without_prompts_is_refused(self) -> None:
        with pytest.raises(DataError, match="the pool has no prompt to answer: on-policy replay needs"):
            answer_prompts(tiny(), TEXTS, max_new_tokens=6)
        with pytest.raises(ConfigError, match="most_likely must be above 0"):
            answer_prompts(tiny(), QUESTIONS, most_likely=0)


class TestPlan:
    def test_it_keeps_choice_and_held_out_examples(self) -> None:
        pool = make_pool()
        for name, given in (("top", {"forecast": np.arange(24.0)}), ("forecast", {"forecast": np.arange(24.0)})):
            plan = plan_for(pool, name, 0.5, held_out=pool.ids[:10], **given)
            own = make_pool().subset([pool.ids[i] for i in (20, 3, 12, 17)])
            found = plan.of_texts(own)
            found.check_pool(own)
            assert found.held_out_ids == (pool.ids[3],)
            assert found.weights.sum() == pytest.approx(1)
            weights = dict(zip(plan.ids, plan.weights, strict=True))
            np.testing.assert_allclose(
                found.weights / found.weights.max(),
                [weights[i] / max(weights[j] for j in own.ids) for i in own.ids],
            )
            if name == "top":
                assert found.order(3) == tuple(id_ for id_ in plan.order(14) if id_ in own.ids)
        with pytest.raises(MismatchError, match="'strange'"):
            plan.of_texts(Pool([Example("strange", text="a text")]))
        with pytest.raises(ConfigError, match="none of the examples that may be replayed has such a text"):
            plan.of_texts(pool.subset(pool.ids[:3]))


def test_arm_of_a_verification(tmp_path: Path, taught: LanguageModel) -> None:
    """Its texts are the model's; none of a held-out example is replayed, by the ids that both share."""
    pool = Pool([*QUESTIONS, *make_pool(16)])
    own = answer_prompts(taught, pool, max_new_tokens=6).pool
    held_out = ["q0", "q1", *pool.ids[8:12]]
    plan = plan_for(pool, "top", 0.7, held_out=held_out, forecast=np.arange(24.0))
    plans, variants = add_arms([], arms([plan], pool), make_recipe(), texts=own)
    assert list(plans) == ["none", "random", "top", "random on-policy", "top on-policy"]
    compared = ReplayComparison("naming", TASKS["naming"], make_task("naming", 2), plans, variants=variants)
    base = copy.deepcopy(taught)
    result = verify_on(
        pool, score(base, pool), FineTuner(base), [compared], make_recipe(), seeds=[0], directory=tmp_path
    )
    replayed = result.replayed["naming.random on-policy.0"]
    assert len(replayed) == 4
    assert set(replayed) <= set(own.ids) - set(held_out)
    assert "none is among" in result.audit()
    run = next(run for run in result.runs if run.arm == "top on-policy")
    assert run.generated_tokens == sum(taught.encode(example).targets for example in own)
    assert result.summaries["top on-policy"].endswith("; the base model's own answers")
    forged = {**compared.plans, "top on-policy": plan_for(own, "top", 0.7, forecast=np.arange(float(len(own))))}
    with pytest.raises(DataError, match="held-out example"):
        verify_on(
            pool,
            score(base, pool),
            FineTuner(base),
            [ReplayComparison("naming", TASKS["naming"], make_task("naming", 2), forged, variants=variants)],
            make_recipe(),
            seeds=[0],
            directory=tmp_path / "forged",
        )


def test_commands(tmp_path: Path, taught: LanguageModel, run: RunCommand) -> None:
    save(taught, tmp_path / "taught")
    with_others().save(tmp_path / "pool.jsonl")
    words = ("generate", tmp_path / "taught", "--on-policy", tmp_path / "pool.jsonl", "--max-new-tokens", 6)
    code, out, err = run(*words, "--right-only", "-o", tmp_path / "own.jsonl", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["kept"], facts["of_prompts"], facts["without_prompt"], facts["wrong"]) == (8, 11, 4, 3)
    TEXTS.save(tmp_path / "texts.jsonl")
    code, _, err = run(
        "generate", tmp_path / "taught", *words[2:3], tmp_path / "texts.jsonl", *words[4:], "-o", tmp_path / "x.jsonl"
    )
    assert code == 2
    assert err.splitlines()[-1].startswith("error: the pool has no prompt to answer")
    for given, reason in ((("-n", 3), "-n is for texts without a prompt"), (("--most-likely", 2), "at most 1")):
        code, _, err = run(*words, *given, "-o", tmp_path / "x.jsonl")
        assert code == 2
        assert reason in err
    code, _, err = run("generate", tmp_path / "taught", "--right-only", "-o", tmp_path / "x.jsonl")
    assert code == 2
    assert "are for --on-policy" in err


def test_plan_and_train_and_verify_take_the_file(tmp_path: Path, run: RunCommand) -> None:
    model_files(tmp_path)
    atlas = measured_atlas(tmp_path, make_recipe(steps=2, batch_size=2))
    own = Pool([Example(id_, prompt="Now", completion=f" {id_}") for id_ in atlas.pool.ids[::2]])
    own.save(tmp_path / "own.jsonl")
    words = ("plan", atlas.path, "--ratio", 0.5, "--hold-out", 0.3)
    for name, given in (("plan", ()), ("own", ("--on-policy", tmp_path / "own.jsonl"))):
        code, _, err = run(*words, *given, "-o", tmp_path / f"{name}.parquet")
        assert code == 0, err
    made, usual = ReplayPlan.load(tmp_path / "own.parquet"), ReplayPlan.load(tmp_path / "plan.parquet")
    assert set(made.held_out_ids) == set(usual.held_out_ids) & set(own.ids)
    files = ("--plan", tmp_path / "own.parquet", "--pool", tmp_path / "own.jsonl")
    train = ("train", tmp_path / "model", tmp_path / "task.jsonl", "--recipe", tmp_path / "recipe.yaml")
    code, out, err = run(*train, *files, "-o", tmp_path / "tuned", "--json")
    assert code == 0, err
    assert json.loads(out)["held_out_replayed"] == 0
    verify = ("verify", tmp_path / "model", tmp_path / "task.jsonl", "--atlas", atlas.path, "--seeds", 1)
    code, out, err = run(
        *verify, "--plan", tmp_path / "plan.parquet", "--on-policy", tmp_path / "own.jsonl", "-o", tmp_path / "v.json"
    )
    assert code == 0, err
    assert Verification.load(tmp_path / "v.json").arms == ("none", "random", "top", "random on-policy", "top on-policy")
