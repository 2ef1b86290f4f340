"""Scores are compared only where they are of the same tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forgetcast import Atlas, Example, MismatchError, Pool, Scores
from forgetcast.data import Rendering
from forgetcast.lm import FineTuner, LanguageModel, Recipe, load, score
from forgetcast.measure import check_tokens
from support.cli import RunCommand
from support.experiments import collect_into
from support.models import save, tiny

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
DATED = "Today is {{ strftime_now('%d %B %Y, %A 100%%') }}.{{ strftime_now('%-d') }}" + TEMPLATE


def chats(n: int = 6) -> Pool:
    return Pool(
        Example(
            f"c{i}",
            messages=[{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}],
        )
        for i in range(n)
    )


def model(template: str = TEMPLATE, **options: Any) -> LanguageModel:
    language_model = tiny(**options)
    language_model.tokenizer.chat_template = template
    return language_model


def test_another_template_is_refused() -> None:
    """The same weights with another chat template differ in loss, which is no forgetting."""
    pool = Pool([*chats(), Example("text", text="the loss of a model")])
    before, after = score(model(), pool), score(model("Hello. " + TEMPLATE), pool)
    assert before.metadata["model_hash"] == after.metadata["model_hash"]
    assert np.abs(before.nll - after.nll)[:6].max() > 0.01
    with pytest.raises(MismatchError, match=r"6 of 7 examples .* other tokens .* 'c0': different: the chat template;"):
        check_tokens(before, after)
    assert check_tokens(before, after, allow_different=True) == 6
    assert check_tokens(before, before) == 0


def test_targets_are_part_of_a_digest() -> None:
    messages = chats(1)[0].messages or ()
    asked = [*messages, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Nothing."}]
    counted, silent = (
        Pool([Example("c", messages=[asked[0], dict(asked[1]) | {"weight": weight}, *asked[2:]])]) for weight in (1, 0)
    )
    one, other = score(model(), counted), score(model(), silent)
    assert one.tokens[0] > other.tokens[0]
    assert check_tokens(one, other, allow_different=True) == 1


def test_files_without_digests_are_of_unknown_tokens(tmp_path: Path) -> None:
    scores = score(model(), chats())
    bare = Scores(scores.ids, scores.nll, scores.tokens, scores.truncated, scores.reasons, scores.metadata)
    bare.save(tmp_path / "old.parquet")
    assert check_tokens(Scores.load(tmp_path / "old.parquet"), scores) is None
    scores.save(tmp_path / "new.parquet")
    loaded = Scores.load(tmp_path / "new.parquet")
    assert loaded.digests == scores.digests
    assert loaded.subset(["c3"]).digests == scores.digests[3:4]  # type: ignore[index]


def test_windows_are_part_of_a_digest() -> None:
    pool = Pool([Example("long", text="the loss of a model " * 30), Example("short", text="the loss")])
    whole, strided = score(tiny(), pool), score(tiny(), pool, max_length=40, stride=20)
    cut = score(tiny(), pool, max_length=40)
    for other in (strided, cut):
        with pytest.raises(MismatchError, match=r"1 of 2 .* 'long': different: the longest input"):
            check_tokens(whole, other)


def test_the_date_of_a_template_is_fixed_and_recorded() -> None:
    first = score(model(DATED), chats())
    tokenizer = model(DATED).tokenizer
    text = "Today is 26 July 2024, Friday 100%.26"
    assert first.metadata["text"]["date"] == "2024-07-26"
    assert datetime(2024, 7, 26).strftime("%A") == "Friday"
    language_model = model(DATED)
    encoded = language_model.encode(chats()[0])
    assert language_model.tokenizer.decode(encoded.ids).startswith(text)
    undated = tokenizer.apply_chat_template(list(chats()[0].messages or ()), tokenize=False)
    assert undated.startswith("Today is ")
    other = LanguageModel(language_model.model, tokenizer, rendering=Rendering(date="2025-01-01"))
    with pytest.raises(MismatchError, match="the date that the template writes"):
        check_tokens(first, score(other, chats()))


@pytest.mark.parametrize("change", ["template", "tokenizer", "thinking"])
def test_an_interrupted_run_is_not_resumed_with_other_tokens(change: str, tmp_path: Path) -> None:
    pool, partial = chats(), tmp_path / "s.partial"

    class StopEarlyError(Exception):
        pass

    def stop(_: int) -> None:
        raise StopEarlyError

    with pytest.raises(StopEarlyError):
        score(model(), pool, partial=partial, batch_tokens=20, on_progress=stop)
    stored = partial.read_text()
    changed = model()
    if change == "template":
        changed.tokenizer.chat_template = "{# another #}" + TEMPLATE
    elif change == "tokenizer":
        changed.tokenizer.add_tokens(["What is"])
    else:
        changed = LanguageModel(changed.model, changed.tokenizer, changed.name, Rendering(thinking=False))
    if change == "tokenizer":
        changed.model.resize_token_embeddings(len(changed.tokenizer))
    with pytest.raises(MismatchError, match="unfinished scores of another"):
        score(changed, pool, partial=partial)
    assert partial.read_text() == stored


def test_collect_refuses_another_template_before_any_fine_tune(tmp_path: Path) -> None:
    recipe, tasks = Recipe(steps=1, batch_size=2), {"a": chats(4), "b": chats(5)}
    atlas = collect_into(tmp_path / "a.atlas", model(), chats(), {"a": tasks["a"]}, recipe)
    with pytest.raises(MismatchError, match=r"6 of 6 examples .* the chat template"):
        collect_into(tmp_path / "a.atlas", model("Hi. " + TEMPLATE), chats(), tasks, recipe)
    assert Atlas.open(atlas.path).tasks == ("a",)
    # A template that gives the same tokens is no other.
    collect_into(tmp_path / "a.atlas", model("{# same #}" + TEMPLATE), chats(), tasks, recipe)
    assert Atlas.open(atlas.path).tasks == ("a", "b")


def test_an_atlas_and_its_forecast_refuse_other_tokens(tmp_path: Path, run: RunCommand) -> None:
    base, pool = model(), chats(8)
    recipe = Recipe(steps=2, batch_size=2)
    atlas = collect_into(tmp_path / "a.atlas", base, pool, {"a": chats(4), "b": chats(6)}, recipe)
    tuned = FineTuner(base).tune(chats(3), recipe).language_model
    tuned.tokenizer.chat_template = "Hi. " + TEMPLATE
    probes = pool.subset(pool.ids[:4])
    scores = score(tuned, probes)
    scores.save(tmp_path / "probes.parquet")
    with pytest.raises(MismatchError, match="4 of 4 examples"):
        atlas.add("c", scores)
    words = ["forecast", atlas.path, "--scores", tmp_path / "probes.parquet", "-o", tmp_path / "f.parquet", "--json"]
    code, _, err = run(*words)
    assert code == 2
    assert "4 of 4 examples were scored on other tokens" in err
    assert not (tmp_path / "f.parquet").exists()
    code, out, _ = run(*words, "--allow-different-tokens")
    assert code == 0
    assert json.loads(out)["different_tokens"] == 4
    atlas.add("c", scores, allow_different_tokens=True)
    assert Atlas.open(atlas.path).provenance("c")["different_tokens"] == 4


def test_score_records_how_it_rendered(tmp_path: Path, run: RunCommand) -> None:
    folder, pool = save(model(DATED), tmp_path / "model"), tmp_path / "pool.jsonl"
    chats().save(pool)
    code, _, err = run("score", folder, pool, "-o", tmp_path / "s.parquet", "--date", "2025-03-01", "--no-thinking")
    assert code == 0, err
    text = Scores.load(tmp_path / "s.parquet").metadata["text"]
    assert (text["date"], text["thinking"]) == ("2025-03-01", False)
    assert text["tokenizer"]
    assert text["template"]
    code, _, err = run("score", folder, pool, "-o", tmp_path / "t.parquet", "--date", "tomorrow")
    assert (code, "the date must be of the form" in err) == (2, True)


def test_train_counts_thinking_unless_asked_not_to(run: RunCommand, tmp_path: Path) -> None:
    """Oracle: the library with the same rendering."""
    save(model(), tmp_path / "model")
    asked = {"role": "user", "content": "Say yes"}
    chat = [asked, {"role": "assistant", "content": "<think>\nit is yes\n</think>\n\nyes"}]
    task = Pool([Example(str(i), messages=chat) for i in range(4)])
    task.save(tmp_path / "task.jsonl")
    (tmp_path / "recipe.yaml").write_text("steps: 2\nbatch_size: 2\nlearning_rate: 0.01\n")
    recipe, hashes = Recipe.load(tmp_path / "recipe.yaml"), []
    for options, thinking in (((), True), (("--no-thinking",), False)):
        out = tmp_path / f"tuned {thinking}"
        words = ("train", tmp_path / "model", tmp_path / "task.jsonl", "--recipe", tmp_path / "recipe.yaml", *options)
        assert run(*words, "-o", out)[0] == 0
        base = replace(load(str(tmp_path / "model")), rendering=Rendering(thinking=thinking))
        tuned = FineTuner(base).tune(task, recipe)
        hashes.append(load(str(out)).weights_hash)
        assert hashes[-1] == tuned.language_model.weights_hash
    assert hashes[0] != hashes[1]
