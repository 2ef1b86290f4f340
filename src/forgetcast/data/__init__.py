"""What goes in: pools, tasks and recipes."""

from forgetcast.data.build import BuildReport, Splitter, build_pool
from forgetcast.data.pool import Example, Pool, load_task, split_task
from forgetcast.data.reader import ReadOptions, ReadReport
from forgetcast.data.recipe import Recipe
from forgetcast.data.rendering import Rendering

__all__ = [
    "BuildReport",
    "Example",
    "Pool",
    "ReadOptions",
    "ReadReport",
    "Recipe",
    "Rendering",
    "Splitter",
    "build_pool",
    "load_task",
    "split_task",
]
