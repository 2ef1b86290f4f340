from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from forgetcast import ConfigError
from forgetcast.experiments.collect import CollectConfig
from forgetcast.settings import check_settings
from forgetcast.text import did_you_mean


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    steps: int = Field(default=1, ge=1)
    rate: float = Field(default=0.1, gt=0, allow_inf_nan=False)


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    kind: Literal["full", "lora"] = "full"
    on: bool = True
    inner: Inner = Inner()
    several: list[Inner] | None = None
    where: Path | list[Path] = Path()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"nmae": "x"}, "there is no field 'nmae'; did you mean name?"),
        ({}, "the field 'name' is missing"),
        (
            {"name": "x", "inner": {"stepz": 3, "zzz": 1}, "kinds": 3},
            "there is no field 'inner.stepz'; did you mean steps?; there is no field 'inner.zzz'; "
            "there is no field 'kinds'; did you mean kind?",
        ),
        ({"name": "x", "several": [{"rat": 1}]}, "there is no field 'several.0.rat'; did you mean rate?"),
        ({"name": "x", "inner": {"steps": 0}}, "inner.steps: must be at least 1, not 0"),
        ({"name": "x", "inner": {"steps": "a"}}, "inner.steps: must be a whole number, not 'a'"),
        ({"name": "x", "inner": {"steps": 1.5}}, "inner.steps: must be a whole number, not 1.5"),
        ({"name": "x", "inner": {"rate": float("inf")}}, "inner.rate: must be a finite number, not inf"),
        ({"name": "x", "inner": {"rate": None}}, "inner.rate: must be a number, not null"),
        ({"name": 3, "on": "perhaps"}, "name: must be text, not 3; on: must be true or false, not 'perhaps'"),
        ({"name": "x", "kind": "lorra"}, "kind: must be one of full, lora, not 'lorra'; did you mean lora?"),
        ({"name": "x", "where": 3}, "where: must be a path or a list, not 3"),
        ({"name": "x", "inner": [1]}, "inner: must be an object, not a list"),
        ([], "must be an object, not a list"),
        ({"name": "x", "\x1b[2Jevil": 1}, "there is no field '\\u001b[2Jevil'"),
    ],
)
def test_each_fault_is_said_in_our_words(content: Any, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_settings(content, Outer, where="settings.yaml")
    assert str(raised.value) == f"settings.yaml: {said}"


def test_many_faults_are_counted() -> None:
    with pytest.raises(ConfigError, match=r"'x7'; and 3 more$"):
        check_settings({"name": "x", **{f"x{i}": 1 for i in range(11)}}, Outer, where="settings.yaml")


def test_a_configuration_names_everything_at_once(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: m\npools: p\ntask: t\natlas: a\nrecipe: {learnig_rate: 1e-3, methd: lora}\n")
    with pytest.raises(ConfigError) as raised:
        CollectConfig.load(file)
    for words in ("'recipe.learnig_rate'; did you mean learning_rate?", "'recipe.methd'; did you mean method?",
                  "'pools'; did you mean pool?", "'task'; did you mean tasks?"):  # fmt: skip
        assert words in str(raised.value)
    assert "missing" not in str(raised.value)


@pytest.mark.parametrize(
    ("word", "known", "hint"),
    [
        ("colect", ["collect", "score"], "; did you mean collect?"),
        ("LORA", ["lora", "paper"], "; did you mean lora?"),
        ("xyz", ["collect", "score"], ""),
        ("x", [], ""),
    ],
)
def test_did_you_mean(word: str, known: list[str], hint: str) -> None:
    assert did_you_mean(word, known) == hint
