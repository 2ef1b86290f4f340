"""Options that several commands share, each declared once, and the choices that an option may have."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Method(StrEnum):
    """Completion methods: the keys of `completion.METHODS`, which would take long to import for a help text."""

    MEAN = "mean"
    ADDITIVE = "additive"
    KNN = "knn"
    MF = "mf"
    SOFT_IMPUTE = "soft-impute"
    LOGISTIC_MF = "logistic-mf"
    BAYESIAN = "bayesian"
    AUTO = "auto"


class DType(StrEnum):
    """Floating-point types that a model is loaded in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Cluster(StrEnum):
    """What examples may have in common, so that they change together."""

    SOURCE = "source"
    DOCUMENT = "document"


class ExportFormat(StrEnum):
    """Formats of an export: `replay.export.FORMATS`."""

    JSONL = "jsonl"
    PARQUET = "parquet"
    DATASETS = "datasets"
    AXOLOTL = "axolotl"
    LLAMA_FACTORY = "llama-factory"


MEASURE, ATLAS, FORECAST, REPLAY, REPORT = "Measure", "Atlas", "Forecast", "Replay", "Report"
"""Groups of commands in the help."""

ModelName = Annotated[str, typer.Argument(help="Hugging Face model directory (or PEFT adapter directory), or hub id.")]
TaskPath = Annotated[Path, typer.Argument(help="Fine-tuning data: JSONL, Parquet, or directory of a saved data set.")]
PoolPath = Annotated[Path, typer.Argument(help="Pool: JSONL, Parquet, or directory of a saved data set.")]
AtlasPath = Annotated[Path, typer.Argument(help="Directory of the atlas.")]
AtlasOption = Annotated[Path, typer.Option("--atlas", help="Atlas with the pool and the base scores.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="File or directory to write.")]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
ByAnswers = Annotated[bool, typer.Option("--exact-match", help="Measure forgetting as flips, not by the loss.")]
Device = Annotated[
    str | None, typer.Option(help="Such as cpu, cuda:0, or auto (all GPUs); default: a GPU if there is one.")
]
TrustCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
RecipeName = Annotated[
    str | None, typer.Option(help="YAML file (method, steps, learning_rate, ...), or a shipped recipe: paper, lora.")
]
Ratio = Annotated[float, typer.Option(help="Replayed examples per new one.")]
HoldOut = Annotated[float, typer.Option(help="Fraction of the pool that is never replayed, to judge on.")]
TestShare = Annotated[float, typer.Option(help="Fraction of a task held out for new-task loss.")]
Strategies = Annotated[
    list[str] | None,
    typer.Option("--strategy", help="Strategy to compare (see `forgetcast strategies`); may be repeated."),
]
Repeat = Annotated[bool, typer.Option("--repeat", help="Reuse examples once all have been replayed.")]
NumberOfProbes = Annotated[int, typer.Option("--probes", min=1, help="Number of probes for each forecast.")]
OnlineAt = Annotated[
    str | None,
    typer.Option(
        "--online", help="Revise the plan from probes after these fractions of training, such as 0.25 or 0.25,0.5."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of all random choices.")]
Seeds = Annotated[int, typer.Option(min=1, help="Number of fine-tunes per arm, each with its own seed.")]
