"""Every code block of the tutorial and the how-to pages runs, in the order of the page.

A block is marked by a comment on the line above its fence: `<!-- no-run: why -->`, or `<!-- exit: 1 -->` for a command
that fails on purpose. A block with a title is first written to the file of that name.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pydantic import BaseModel

from forgetcast import Atlas, make_plan
from forgetcast.cli import main
from forgetcast.demo import run as demo
from forgetcast.demo.corpus import demo_pool
from forgetcast.experiments.collect import CollectConfig
from forgetcast.experiments.procedural import KNOWN_TASKS, procedural_task
from forgetcast.lm import Recipe, load, score
from support.data import make_scores, planted

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MODEL = files("forgetcast.demo") / "model"
SMALL = demo.DemoSettings(
    known=7, new=3, examples=40, task_size=32, test_size=8, steps=2, batch_size=4, ratio=0.5, seeds=1
)
HOW_TO = sorted((DOCS / "how-to").glob("*.md"))

FENCE = re.compile(
    r"(?:^<!-- (?P<mark>no-run|exit):(?P<value>.*?)-->\n)?"
    r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^```$',
    flags=re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    title: str | None = None
    no_run: str | None = None
    exit_code: int = 0


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    found = list(FENCE.finditer(text))
    assert len(re.findall(r"^```", text, flags=re.MULTILINE)) == 2 * len(found), f"{page}: a fence cannot be read"
    for match in found:
        mark, value = match["mark"], (match["value"] or "").strip()
        yield Block(
            match["language"],
            match["code"],
            match["title"],
            no_run=value if mark == "no-run" else None,
            exit_code=int(value) if mark == "exit" else 0,
        )


def run_page(page: Path) -> None:
    """Run a page's blocks in the working directory; Python blocks share their names, as on one prompt."""
    names: dict[str, object] = {"__name__": "__docs__"}
    for block in blocks(page):
        if block.title is not None:
            # The tutorial's fine-tunes are short enough for a reader, but not for a test.
            Path(block.title).write_text(re.sub(r"^steps: 16$", "steps: 4", block.code, flags=re.MULTILINE))
        check_data(block)
        if block.no_run is not None:
            assert len(block.no_run.split()) > 1, f"{page}: a block that is not run needs a reason"
            folder = re.match(r"cd (\S+) && ", block.code)
            for file in re.findall(r"[\w./-]+\.ya?ml", block.code if block.language == "sh" else ""):
                path = Path(folder[1] if folder else "", file)
                assert yaml.safe_load(path.read_text()), f"{page}: {path} is empty"
        elif block.language == "python" and block.title is None:
            exec(compile(block.code, str(page), "exec"), names)
        elif block.language == "sh":
            for command in block.code.replace("\\\n", " ").splitlines():
                assert run_command(command) == block.exit_code, f"{page}: {command}"


def check_data(block: Block) -> None:
    """Parse what is written in a language for data."""
    if block.language == "yaml":
        assert yaml.safe_load(block.code)
    elif block.language == "json":
        for line in block.code.splitlines():
            json.loads(line)
    elif block.language == "python":
        compile(block.code, str(block.title), "exec")


def run_command(command: str) -> int:
    """Run one line of a shell; Python and forgetcast run in this process, which saves their start."""
    words = shlex.split(command)
    if words[:2] == ["python", "-c"]:
        return subprocess.run([sys.executable, *words[1:]], check=False).returncode
    if words[0] not in ("forgetcast", "python"):
        return subprocess.run(["bash", "-c", command], check=False).returncode
    target = None
    if ">" in words:
        target = words[words.index(">") + 1]
        words = words[: words.index(">")]
    with pytest.MonkeyPatch.context() as patch, Path(target or os.devnull).open("w") as file:
        patch.setattr(sys, "argv", words if words[0] == "forgetcast" else words[1:])
        with redirect_stdout(file if target else sys.stdout):
            try:
                main() if words[0] == "forgetcast" else runpy.run_path(words[1], run_name="__main__")
            except SystemExit as exit_:
                return int(exit_.code or 0)
    return 0


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in a folder of its own, in which what a page writes can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a reader sees those of other packages too
        yield


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make what the how-to pages start from: model, candidate, pool, tasks, atlas, recipe and plan."""
    folder = tmp_path_factory.mktemp("project")
    pool = demo_pool(40)
    pool.save(folder / "pool.jsonl")
    (folder / "tasks").mkdir()
    for name in KNOWN_TASKS[:2]:
        procedural_task(name, 32).save(folder / "tasks" / f"{name}.jsonl")
    procedural_task("family_relationships", 32).save(folder / "new-task.jsonl")
    recipe = Recipe(steps=2, learning_rate=1e-3, batch_size=4, max_length=64)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump()))
    base = load(str(MODEL))
    before = score(base, pool)
    atlas = Atlas.create(folder / "runs.atlas", pool, before, model="./model", recipe=recipe.model_dump())
    for i, row in enumerate(planted(6, len(pool), 1, 0.05)):
        atlas.add(f"t{i}", make_scores(pool, before.nll + np.abs(row)))
    make_plan(pool, "random", ratio=0.5, held_out=pool.hold_out(0.2)).save(folder / "plan.parquet")
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter.mul_(1.01)
    base.model.save_pretrained(folder / "candidate")
    base.tokenizer.save_pretrained(folder / "candidate")
    return folder


@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.stem)
def test_how_to(page: Path, project: Path, tmp_path: Path) -> None:
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model").symlink_to(str(MODEL))
    run_page(page)


def test_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "STANDARD", SMALL)
    run_page(DOCS / "tutorial" / "demo.md")
    run_page(DOCS / "tutorial" / "own-model.md")
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(("model", "heading"), [(Recipe, "Recipe"), (CollectConfig, "Configuration of a sweep")])
def test_every_setting_is_in_the_reference(model: type[BaseModel], heading: str) -> None:
    section = (DOCS / "reference" / "files.md").read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    first_cells = " ".join(re.findall(r"^\| (.*?) \|", section, flags=re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", first_cells)) == set(model.model_fields)


@pytest.mark.parametrize("name", ["own-trainer", "trl"])
def test_the_scripts_shown_are_those_in_examples(name: str) -> None:
    shown = [block for block in blocks(DOCS / "how-to" / f"{name}.md") if block.language == "python"]
    assert [block.code for block in shown] == [(ROOT / "examples" / str(block.title)).read_text() for block in shown]
    assert shown


def test_the_figures_of_the_strategies_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("griffe")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from docs_pages import MEASURED

    measured = dict.fromkeys(MEASURED, "")
    rows = re.findall(
        r"^\| ([\w-]+) \| ([\d.]+)(?: \(.*?\))? \| ([\d.]+)",
        (DOCS / "explanation/results.md").read_text(),
        re.MULTILINE,
    )
    for name, mean, tail in rows:
        if not measured.get(name, "-"):  # the first table with a row of this name
            measured[name] = f"{mean} / {tail}" if name != "random" else "1"
    assert {name: figures for name, (figures, _) in MEASURED.items()} == measured


def test_faults_of_a_site_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("griffe")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from check_docs import broken_links, undocumented

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "index.html").write_text('<h1 id="top"></h1><a href="../#there">up</a><a href="#top">top</a>')
    front = '<a id="there" href="a/#top">a</a><a href="https://example.org">out</a>'
    (tmp_path / "index.html").write_text(front)
    assert not list(broken_links(tmp_path))
    (tmp_path / "index.html").write_text(
        f'{front}<a href="b/">b</a><a href="a/#no">no</a><script src="https://example.org/x.js"></script>'
    )
    assert [fault.partition(": ")[2] or fault for fault in broken_links(tmp_path)] == [
        "b/ does not exist",
        "a/#no has no such anchor",
        "index.html loads https://example.org/x.js from the network",
    ]
    assert "forgetcast.Pool has no entry in docs/reference/api/" in list(undocumented(tmp_path, ROOT / "src"))
