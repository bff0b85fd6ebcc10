"""Where a sweep's cells run when not here: `--engine ray`, a task a cell; `--engine slurm`, a job a cell.

Both find the results in a folder that all machines share, and attnbench installed on each. The launcher claims a cell
before it submits it, and the cell looks whether that claim still stands before it begins and before it writes. A cell
whose machine dies is tried again, RETRIES times, and goes on from its last checkpoint; one that cannot be saved is
given up, with a record.

Both libraries pass a call and its result as pickles between their own processes (submitit through out/slurm, which only
its user may enter); nothing of attnbench's is ever unpickled.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from attnbench.config import Scalar, threads
from attnbench.errors import Refusal

Cell = TypeVar("Cell")
Outcome = TypeVar("Outcome")
Engine = Callable[[Iterable[Cell], Callable[[Cell], Outcome]], Iterator[Outcome]]
"""From ready cells and what runs one of them (importable by name: it is called elsewhere) to outcomes as they come."""

RETRIES = 3
"""Times that a cell is tried again whose worker or node died."""

POLL = 1.0
"""Seconds between two looks at jobs that are running."""


def ray(gpus: int, give_up: Callable[[Cell, str], Outcome]) -> Engine[Cell, Outcome]:
    """The Ray cluster that this process is connected to, or that RAY_ADDRESS or `ray start` tell of.

    A cell takes `threads()` cores and `gpus` GPUs; `give_up` makes the outcome of a cell that no try has brought to an
    end.  Raises Refusal without Ray or a cluster.
    """
    cluster = _module("ray")
    if not cluster.is_initialized():
        try:
            cluster.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise Refusal(f"no Ray cluster: {_line(error)}; start one with ray start --head") from error
    if (there := cluster.cluster_resources().get("GPU", 0)) < gpus:
        raise Refusal(
            f"a cell wants {gpus} GPU and the Ray cluster has {there:g}; add a node that has, or --device cpu"
        )

    def engine(cells: Iterable[Cell], run_one: Callable[[Cell], Outcome]) -> Iterator[Outcome]:
        def call(cell: Cell) -> Outcome:  # a function, which alone can be made remote
            return run_one(cell)

        task = cluster.remote(call).options(num_cpus=threads(), num_gpus=gpus, max_retries=RETRIES)
        waiting = {task.remote(cell): cell for cell in cells}
        try:
            while waiting:
                (done, *_), _ = cluster.wait(list(waiting), num_returns=1)
                cell = waiting.pop(done)
                try:
                    outcome = cluster.get(done)
                except cluster.exceptions.RayError as error:
                    outcome = give_up(cell, _line(error))
                yield outcome
        finally:
            for left in waiting:
                cluster.cancel(left, force=True)

    return engine


def slurm(
    jobs: int, gpus: int, folder: Path, options: dict[str, Scalar], give_up: Callable[[Cell, str], Outcome],
    cluster: str = "slurm",
) -> Engine[Cell, Outcome]:  # fmt: skip
    """Slurm through submitit: jobs of an array of which `jobs` run at a time, each `threads()` cores and `gpus` GPUs.

    `folder` is submitit's own.  `options` are those of sbatch (partition, account, time in minutes, …).  `cluster`
    "local" runs the jobs here.  Raises Refusal without submitit or sbatch.
    """
    submitit = _module("submitit")
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise Refusal("engine slurm needs sbatch, which is not on this machine; start from a login node")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster, slurm_max_num_timeout=RETRIES)
    told: dict[str, Any] = {f"slurm_{name}": value for name, value in options.items()}
    executor.update_parameters(
        name="attnbench", cpus_per_task=threads(), gpus_per_node=gpus, slurm_array_parallelism=jobs, **told
    )

    def engine(cells: Iterable[Cell], run_one: Callable[[Cell], Outcome]) -> Iterator[Outcome]:
        listed = list(cells)
        if not listed:
            return
        with executor.batch():
            submitted = [executor.submit(Resumable(run_one), cell) for cell in listed]
        waiting = dict(zip(submitted, listed, strict=True))
        try:
            for done in submitit.helpers.as_completed(submitted, poll_frequency=POLL):
                cell = waiting.pop(done)
                error = done.exception()
                yield done.result() if error is None else give_up(cell, _line(error))
        finally:
            for left in waiting:
                left.cancel()

    return engine


class Resumable:
    """A call that submitit makes again where Slurm preempts it or its time is up."""

    def __init__(self, call: Callable[[Any], Any]) -> None:
        self.call = call

    def __call__(self, cell: Any) -> Any:
        return self.call(cell)

    def checkpoint(self, cell: Any) -> Any:
        """What to do next time: the same, from the run's own checkpoint."""
        return _module("submitit").helpers.DelayedSubmission(self, cell)


def _module(name: str) -> Any:
    """That library, imported only when asked for.  Raises Refusal where it is not installed."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = {"submitit": "slurm"}.get(name, name)
        raise Refusal(f"engine {extra} needs {name}: pip install 'attnbench[{extra}]'") from error


def _line(error: BaseException) -> str:
    """What happened, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
