from . import atlas, completion, data, evaluation, experiments, lm, measure, probes, replay, report
from .atlas import Atlas, ForgettingMatrix
from .completion.forecast import TaskForecast, measured_probes
from .completion.structure import Structure, analyze
from .data import Example, Pool, Recipe, load_task, split_task
from .errors import ConfigError, DataError, ForgetcastError, MismatchError, MissingExtraError
from .experiments import (
    ReplayComparison,
    SequenceResult,
    SequenceSettings,
    Verification,
    arms,
    collect,
    pilot_comparison,
    prepare_atlas,
    run_sequence,
    verify,
)
from .measure import Scores, difference, read_lm_eval
from .replay import (
    Advice,
    ReplayLaw,
    ReplayPlan,
    Selection,
    Signals,
    Strategy,
    advise,
    get_strategy,
    make_plan,
)
from .report import write_report

__version__: str
__all__ = [
    "Advice",
    "Atlas",
    "ConfigError",
    "DataError",
    "Example",
    "ForgetcastError",
    "ForgettingMatrix",
    "MismatchError",
    "MissingExtraError",
    "Pool",
    "Recipe",
    "ReplayComparison",
    "ReplayLaw",
    "ReplayPlan",
    "Scores",
    "Selection",
    "SequenceResult",
    "SequenceSettings",
    "Signals",
    "Strategy",
    "Structure",
    "TaskForecast",
    "Verification",
    "advise",
    "analyze",
    "arms",
    "atlas",
    "collect",
    "completion",
    "data",
    "difference",
    "evaluation",
    "experiments",
    "get_strategy",
    "lm",
    "load_task",
    "make_plan",
    "measure",
    "measured_probes",
    "pilot_comparison",
    "prepare_atlas",
    "probes",
    "read_lm_eval",
    "replay",
    "report",
    "run_sequence",
    "split_task",
    "verify",
    "write_report",
]
