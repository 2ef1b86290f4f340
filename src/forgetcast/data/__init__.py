"""What goes in: pools, tasks and recipes."""

from forgetcast.data.pool import Example, Pool, load_task, split_task
from forgetcast.data.recipe import Recipe
from forgetcast.data.rendering import Rendering

__all__ = ["Example", "Pool", "Recipe", "Rendering", "load_task", "split_task"]
