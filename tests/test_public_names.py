from __future__ import annotations

import subprocess
import sys

import forgetcast


def test_public_names() -> None:
    assert sorted(forgetcast.__all__) == [
        "Atlas",
        "ConfigError",
        "DataError",
        "Example",
        "ForgetcastError",
        "ForgettingMatrix",
        "MismatchError",
        "MissingExtraError",
        "Pool",
        "ReplayPlan",
        "Scores",
        "Structure",
        "analyze",
        "completion",
        "evaluation",
        "load_task",
        "make_plan",
        "probes",
    ]
    assert sorted(forgetcast.completion.__all__) == [
        "Additive",
        "Auto",
        "Bayesian",
        "Completion",
        "Forecast",
        "KNN",
        "LinearGaussian",
        "LogisticMF",
        "METHODS",
        "MatrixFactorization",
        "Mean",
        "SoftImpute",
    ]
    for name in forgetcast.__all__:
        assert hasattr(forgetcast, name)


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_core_never_imports_torch_or_the_report() -> None:
    code = "import sys, forgetcast.cli; print([m for m in ('torch', 'transformers', 'plotly') if m in sys.modules])"
    assert run(code).stdout.strip() == "[]"


def test_a_missing_extra_prints_the_line_that_installs_it() -> None:
    for package, module, extra in (("torch", "forgetcast.lm", "lm"), ("plotly", "forgetcast.report", "report")):
        done = run(f"import sys; sys.modules[{package!r}] = None; import {module}")
        assert f"pip install 'forgetcast[{extra}]'" in done.stderr
