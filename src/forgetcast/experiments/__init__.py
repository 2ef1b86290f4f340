"""Resumable experiments: collect an atlas, verify plans, learn tasks in sequence."""

from forgetcast.experiments.add import FoundModels, Outcome, add_models, add_scores, create_atlas, find_models
from forgetcast.experiments.collect import (
    CollectConfig,
    PlannedRow,
    Sweep,
    collect,
    load_tasks,
    prepare_atlas,
    run_sweep,
)
from forgetcast.experiments.command import CommandTrainer, TrainerSettings
from forgetcast.experiments.dry_run import DryRun, plan_sweep
from forgetcast.experiments.interpolation import AlphaPoint, ChosenAlpha, choose_alpha
from forgetcast.experiments.on_ray import run_on_ray
from forgetcast.experiments.reproduce import (
    Reproduction,
    ReproductionSettings,
    TaskSplit,
    draw_split,
    load_split,
    replay_arms,
    reproduce,
)
from forgetcast.experiments.sequence import SequenceSettings, run_sequence
from forgetcast.experiments.sequence_result import SequenceResult, Stage
from forgetcast.experiments.start import StartPlan, StartSettings, plan_start, start_atlas
from forgetcast.experiments.tradeoff import RecipeAdvice, Tradeoff, recipe_advice, tradeoffs
from forgetcast.experiments.variants import AskedArm, Interpolating, Variant, add_arms, parse_arm
from forgetcast.experiments.verify import ReplayComparison, Verification, arms, pilot_comparison, verify

__all__ = [
    "AlphaPoint",
    "AskedArm",
    "ChosenAlpha",
    "CollectConfig",
    "CommandTrainer",
    "DryRun",
    "FoundModels",
    "Interpolating",
    "Outcome",
    "PlannedRow",
    "RecipeAdvice",
    "ReplayComparison",
    "Reproduction",
    "ReproductionSettings",
    "SequenceResult",
    "SequenceSettings",
    "Stage",
    "StartPlan",
    "StartSettings",
    "Sweep",
    "TaskSplit",
    "Tradeoff",
    "TrainerSettings",
    "Variant",
    "Verification",
    "add_arms",
    "add_models",
    "add_scores",
    "arms",
    "choose_alpha",
    "collect",
    "create_atlas",
    "draw_split",
    "find_models",
    "load_split",
    "load_tasks",
    "parse_arm",
    "pilot_comparison",
    "plan_start",
    "plan_sweep",
    "prepare_atlas",
    "recipe_advice",
    "replay_arms",
    "reproduce",
    "run_on_ray",
    "run_sequence",
    "run_sweep",
    "start_atlas",
    "tradeoffs",
    "verify",
]
