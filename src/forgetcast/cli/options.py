"""Options that several commands share, each declared once, and the choices that an option may have."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from forgetcast.defaults import MAX_SEED
from forgetcast.errors import ConfigError
from forgetcast.files import decode_json


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


class LoadIn(StrEnum):
    """Precisions to which weights are quantised while they are loaded."""

    FOUR_BIT = "4bit"
    EIGHT_BIT = "8bit"


class ExportFormat(StrEnum):
    """Formats of an export: `replay.export.FORMATS`."""

    JSONL = "jsonl"
    PARQUET = "parquet"
    DATASETS = "datasets"
    AXOLOTL = "axolotl"
    LLAMA_FACTORY = "llama-factory"


class DataFormat(StrEnum):
    """Formats of data: the keys of `data.formats.FORMATS`."""

    TEXT = "text"
    PROMPT_COMPLETION = "prompt-completion"
    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    ALPACA = "alpaca"
    PROMPT_RESPONSE = "prompt-response"


class Engine(StrEnum):
    """What makes the rows of a sweep."""

    LOCAL = "local"
    RAY = "ray"


class By(StrEnum):
    """What gives equal shares of a pool."""

    SOURCE = "source"


MEASURE, ATLAS, FORECAST, REPLAY, REPORT = "Measure", "Atlas", "Forecast", "Replay", "Report"
"""Groups of commands in the help."""

ModelName = Annotated[
    str, typer.Argument(help="Directory of a Hugging Face model or PEFT adapter, GGUF file, or hub id.")
]
_DATA = "JSONL, JSON, CSV, Parquet, Arrow, a folder of these, a saved data set, or hf://name:configuration@split."
TaskPath = Annotated[Path, typer.Argument(help=f"Fine-tuning data: {_DATA}")]
PoolPath = Annotated[Path, typer.Argument(help=f"Pool: {_DATA}")]
Format = Annotated[DataFormat | None, typer.Option(help="Format of the data; default: each row's, by its fields.")]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", help="What the data call a field, such as prompt=frage; repeatable. Empty: not read."),
]
NamedColumns = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        help="What the data call a field, such as prompt=frage, or of one file law:prompt=frage; repeatable.",
    ),
]
PoolFormat = Annotated[DataFormat | None, typer.Option(help="Format of the pool; default: each row's, by its fields.")]
PoolColumns = Annotated[
    list[str] | None,
    typer.Option("--pool-column", help="What the pool calls a field, such as prompt=frage; repeatable."),
]
Strict = Annotated[bool, typer.Option("--strict", help="Fail on a row that cannot be used, instead of skipping it.")]
AtlasPath = Annotated[str, typer.Argument(help="Directory of the atlas, or its URL, such as s3://bucket/runs.atlas.")]
MatrixPath = Annotated[str, typer.Argument(help="An atlas, its URL, or a matrix as .npy, .json or .pkl.")]
AtlasOption = Annotated[str, typer.Option("--atlas", help="Atlas with the pool and the base scores.")]
NewAtlas = Annotated[str, typer.Option("-o", "--output", help="Directory or URL of the new atlas.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="File or directory to write.")]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
ByAnswers = Annotated[bool, typer.Option("--exact-match", help="Measure forgetting as flips, not by the loss.")]
AllowDifferentTokens = Annotated[
    bool,
    typer.Option("--allow-different-tokens", help="Compare scores even of examples that had other tokens or targets."),
]
Date = Annotated[str | None, typer.Option(help="Date for chat templates that write today's, YYYY-MM-DD; it is fixed.")]
NoThinking = Annotated[bool, typer.Option("--no-thinking", help="Do not count thinking that an answer contains.")]
RecipeName = Annotated[
    str | None, typer.Option(help="YAML file (method, steps, learning_rate, ...), or a shipped recipe: paper, lora.")
]
Ratio = Annotated[float, typer.Option(help="Replayed examples per new one.")]
HoldOut = Annotated[float, typer.Option(help="Fraction of the pool that is never replayed, to judge on.")]
Margin = Annotated[
    float,
    typer.Option(
        min=0, help="Nats per target token by which the new-task loss may be higher and still count as equal."
    ),
]
TestShare = Annotated[float, typer.Option(help="Fraction of a task held out for new-task loss.")]
Strategies = Annotated[
    list[str] | None,
    typer.Option("--strategy", help="Strategy to compare (see `forgetcast strategies`); may be repeated."),
]
Repeat = Annotated[bool, typer.Option("--repeat", help="Reuse examples once all have been replayed.")]
NumberOfProbes = Annotated[int, typer.Option("--probes", min=1, help="Number of probes for each forecast.")]
Arms = Annotated[
    list[str] | None,
    typer.Option("--arm", help="A further arm, such as interpolation or learning-rate=0.3; may be repeated."),
]
OnlineAt = Annotated[
    str | None,
    typer.Option(
        "--online", help="Revise the plan from probes after these fractions of training, such as 0.25 or 0.25,0.5."
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of all random choices.")]
Seeds = Annotated[int, typer.Option(min=1, max=1000, help="Number of fine-tunes per arm, each with its own seed.")]


@dataclass(frozen=True)
class Loading:
    """How a model is loaded: the options of every command that loads one."""

    device: Annotated[
        str | None, typer.Option(help="Such as cpu, cuda:0, or auto (all GPUs); default: a GPU if there is one.")
    ] = None
    dtype: Annotated[
        DType | None, typer.Option(help="Type of the weights; default: float32, or what a quantised model needs.")
    ] = None
    load_in: Annotated[LoadIn | None, typer.Option(help="Quantise the weights while loading, by bitsandbytes.")] = None
    model_kwargs: Annotated[
        str | None,
        typer.Option(help='Further arguments of from_pretrained, as JSON: \'{"attn_implementation": "sdpa"}\'.'),
    ] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the model's blocks: faster after the first batches.")
    ] = False

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `lm.load`.

        Raises
        ------
        ConfigError
            If the further arguments are no JSON object.
        """
        try:
            further = decode_json(self.model_kwargs or "{}")
        except ValueError as error:
            raise ConfigError(f"--model-kwargs is not JSON: {error}") from None
        if not isinstance(further, dict):
            raise ConfigError(f"--model-kwargs must be a JSON object, such as {{}}, not {self.model_kwargs}")
        return {
            "device": self.device,
            "dtype": self.dtype.value if self.dtype is not None else None,
            "load_in": self.load_in.value if self.load_in is not None else None,
            "model_kwargs": further,
            "trust_remote_code": self.trust_remote_code,
            "compile": self.compile,
        }


def loads_a_model(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `Loading` in place of its parameter `loading`."""
    hints = get_type_hints(Loading, include_extras=True)
    options = [
        inspect.Parameter(
            option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=hints[option.name]
        )
        for option in fields(Loading)
    ]
    signature = inspect.signature(command, eval_str=True)
    others = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in signature.parameters.values()
        if parameter.name != "loading"
    ]

    @wraps(command)
    def with_options(**given: Any) -> None:
        loading = Loading(**{option.name: given.pop(option.name) for option in options})
        command(loading=loading, **given)

    parameters = [*others, *options]
    with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options
