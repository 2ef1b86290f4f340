"""A sweep on Ray: a task per row, which does in a worker what `collect --only` does in a process."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from forgetcast.atlas.index import check_writable, is_atlas
from forgetcast.atlas.store import Atlas
from forgetcast.data.pool import Pool
from forgetcast.errors import ConfigError, ForgetcastError, IncompleteError, MissingExtraError
from forgetcast.experiments.collect import CollectConfig, prepare_sweep, run_sweep, unfinished
from forgetcast.progress import OnProgress

WORKER_RETRIES = 3
"""How often a row is started again whose worker was lost."""


def run_on_ray(
    config: CollectConfig,
    pool: Pool,
    tasks: Mapping[str, Pool],
    loading: Mapping[str, Any],
    *,
    address: str | None = None,
    gpus: float = 0.0,
    memory: float = 0.0,
    only: Collection[str] = (),
    on_progress: OnProgress | None = None,
) -> Atlas:
    """Do what the configuration of a sweep says, with a Ray task per row; the result is that of `run_sweep`.

    Parameters
    ----------
    config : CollectConfig
        Its paths must be those of all machines.
    pool : Pool
    tasks : mapping of str to Pool
    loading : mapping
        Arguments of `lm.load`.
    address : str, optional
        Of a cluster; default: one of this machine, for the time of the call.
    gpus, memory : float
        What a row needs: GPUs, and memory in GiB; 0: not declared.
    only : collection of str
        Tasks or rows to make; default: all.
    on_progress : callable, optional
        Called with finished and all rows.

    Raises
    ------
    MissingExtraError
        If Ray is not installed.
    ConfigError
        If there is no cluster at the address.
    IncompleteError
        If rows failed; all others were made.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("ray", error) from None
    import torch

    where = {"atlas": config.atlas if isinstance(config.atlas, str) else config.atlas.absolute()}
    if Path(config.model).exists():
        where["model"] = str(Path(config.model).absolute())
    if config.keep_models is not None:
        where["keep_models"] = config.keep_models.absolute()
    config = config.model_copy(update=where)
    check_writable(config.atlas)
    sweep = config.sweep(only)
    rows = sweep.rows(tasks, config.recipe.seed)
    if is_atlas(config.atlas):
        recipe = (config.trainer or config.recipe).model_dump()
        rows = unfinished(Atlas.open(config.atlas), rows, recipe, sweep)
    if not rows:
        return Atlas.open(config.atlas)
    ours = not ray.is_initialized()
    if ours:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            ray.init(address=address or "local", **quiet)
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            # What Ray says of a token is in the cause, and `ray start` asks for one unless it is told otherwise.
            wants = "; it asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" * (
                "Token" in repr(error.__cause__)
            )
            raise ConfigError(f"--address {address}: {str(error).split(chr(10))[0]}{wants}") from None
    failures: dict[str, str] = {}
    try:
        needs = {"num_gpus": gpus, "memory": int(memory * 2**30) or None, "max_retries": WORKER_RETRIES}
        # Threads share out sums, so their number changes the last digits.
        given = [ray.put(each) for each in (config, pool, dict(tasks))]
        remote: Any = ray.remote  # its overloads know no settings in a dictionary
        work = partial(remote(**needs)(_work).remote, *given, dict(loading), torch.get_num_threads())
        report = on_progress or (lambda *_: None)
        report("base model", 0, len(rows))
        failures |= _outcome(ray, work(None), "base model")
        # Without base scores, no row can be made.
        pending = {work(row.name): row.name for row in rows} if not failures else {}
        while pending:
            (ready, *_), _ = ray.wait(list(pending))
            name = pending.pop(ready)
            failures |= _outcome(ray, ready, name)
            report(f"{name}: {'failed' if name in failures else 'finished'}", len(rows) - len(pending), len(rows))
    finally:
        if ours:
            ray.shutdown()
    if failures:
        raise IncompleteError(f"{config.atlas}: {len(rows)} rows were to be made", failures)
    return Atlas.open(config.atlas)


def _work(
    config: CollectConfig,
    pool: Pool,
    tasks: Mapping[str, Pool],
    loading: Mapping[str, Any],
    threads: int,
    row: str | None,
) -> dict[str, str]:
    """Make a row, or score the base model if it is None; return why it failed, an empty dictionary if it did not."""
    import torch

    from forgetcast.lm import load

    torch.set_num_threads(threads)
    try:
        if row is None:
            prepare_sweep(config, pool, partial(load, **loading))
        else:
            run_sweep(config, pool, tasks, partial(load, **loading), only=[row])
    except IncompleteError as error:
        return error.failures
    except ForgetcastError as error:
        return {row or "base model": str(error)}
    return {}


def _outcome(ray: Any, task: Any, name: str) -> dict[str, str]:
    """Return why a Ray task failed, an empty dictionary if it did not."""
    try:
        return dict(ray.get(task))
    except ray.exceptions.RayError as error:  # a worker lost too often, or an exception of other code
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return {name: lines[-1] if isinstance(error, ray.exceptions.RayTaskError) else lines[0]}
