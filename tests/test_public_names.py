from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from types import ModuleType

import pytest

import forgetcast
import forgetcast.errors


def packages() -> list[ModuleType]:
    """Packages that state their public names in `__all__`."""
    names = [module.name for module in walk_packages(forgetcast.__path__, "forgetcast.") if module.ispkg]
    return [package for package in (forgetcast, *map(import_module, names)) if hasattr(package, "__all__")]


@pytest.fixture(scope="module", params=packages(), ids=lambda package: package.__name__)
def package(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


def names_in_source(package: ModuleType) -> set[str]:
    """Public classes and functions that a package's `__init__` defines, and names that it imports to re-export.

    The source is read, so that names which are imported on first use count too.
    """
    assert package.__file__ is not None
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    found = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "forgetcast":
            found |= {alias.asname or alias.name for alias in node.names} - used
    return {name for name in found if not name.startswith("_")}


def test_exported_names_exist(package: ModuleType) -> None:
    assert len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        assert hasattr(package, name), name
        assert name in dir(package)


def test_public_names_are_exported(package: ModuleType) -> None:
    assert names_in_source(package) <= set(package.__all__)


def test_every_exception_can_be_caught_by_its_public_name() -> None:
    named = {name for name, value in vars(forgetcast.errors).items() if isinstance(value, type)}
    assert named <= set(forgetcast.__all__)
    for name in named:
        assert getattr(forgetcast, name) is getattr(forgetcast.errors, name)


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_core_never_imports_torch_or_the_report() -> None:
    code = "import sys, forgetcast.cli; print([m for m in ('torch', 'transformers', 'plotly') if m in sys.modules])"
    assert run(code).stdout.strip() == "[]"


def test_a_missing_extra_prints_the_line_that_installs_it() -> None:
    for package, module, extra in (("torch", "forgetcast.lm", "lm"), ("plotly", "forgetcast.report", "report")):
        done = run(f"import sys; sys.modules[{package!r}] = None; import {module}")
        assert f"pip install 'forgetcast[{extra}]'" in done.stderr
