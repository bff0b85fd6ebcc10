"""`python -m attnbench.sweep SUITE --out DIR`: every cell of a suite, each in a process of its own, skipping the done.

An engine is a function from tasks to outcomes: `Engine = (tasks, run_one) -> iterator of Outcome`. It decides where and
in what order `run_one` is called and nothing else; `local` calls it here. It takes a task when it has room for it, and
only then is the cell claimed, so that any number of sweeps share a folder: here, or submitted elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import Field, NonNegativeInt, PositiveInt

from attnbench import attempt, cli, engines, record, storage
from attnbench.attempt import Ending, LimitsConfig, Outcome, Task, run_cell
from attnbench.board import Board, follow, title
from attnbench.claim import Launcher, Observer
from attnbench.config import RunConfig, Scalar, Settings, threads
from attnbench.suite import Cell, Suite

if TYPE_CHECKING:
    from attnbench.schedule import Schedule

POLL = 1.0
"""Seconds between two looks at cells that other launchers hold."""

Kind = Literal["crash", "timeout", "oom"]
"""What may end otherwise when it is tried again."""


class SweepConfig(Settings):
    """Every cell of a suite, skipping what is done."""

    suite: Annotated[str, tyro.conf.Positional]
    """A suite that comes with attnbench (quick, digits, clothes, colours, c1 … c5, findings, replica, replica-tenth,
    reference) or FILE.yaml."""
    out: Path = Path("results")
    """Folder of results."""
    engine: Literal["local", "ray", "slurm"] = "local"
    """local: this machine; ray: a Ray cluster (RAY_ADDRESS, or one that runs here); slurm: jobs, through submitit. The
    latter two need `out` in a folder that all machines share."""
    slurm: Annotated[dict[str, Scalar], tyro.conf.arg(metavar="NAME VALUE")] = Field(default_factory=dict)
    """What sbatch is told: --slurm.partition NAME, --slurm.account NAME, --slurm.time MINUTES, …"""
    jobs: PositiveInt = 1
    """Cells at a time, which share the cores; throughput is then measured beside a neighbour and is worth little."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    limits: LimitsConfig = LimitsConfig()
    retries: NonNegativeInt = 1
    """Times that a cell is tried again at once after a crash, a kill or a timeout; it goes on from its checkpoint."""
    retry: tyro.conf.UseAppendAction[tuple[Kind, ...]] = ()
    """Run again what ended so in an earlier sweep."""
    list: bool = False
    """Only say what is done and what is to do."""
    watch: bool = False
    """Only watch what sweeps on this folder do, from any terminal, until they are done."""


RunOne = Callable[[Task], Outcome]
Engine = Callable[[Iterable[Task], RunOne], Iterator[Outcome]]


def local(jobs: int) -> Engine:
    """The engine of one machine: `jobs` cells at a time."""

    def engine(tasks: Iterable[Task], run_one: RunOne) -> Iterator[Outcome]:
        left = iter(tasks)
        running: set[Future[Outcome]] = set()
        with ThreadPoolExecutor(jobs) as pool:
            try:
                while True:
                    while len(running) < jobs and (task := next(left, None)) is not None:
                        running.add(pool.submit(run_one, task))
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        running.discard(future)
                        yield future.result()
            except BaseException:
                # Those that run save a checkpoint and end.
                attempt.stopping.set()
                pool.shutdown(wait=True)
                attempt.stopping.clear()
                raise

    return engine


def _engine(config: SweepConfig) -> Engine:
    """The engine that was asked for."""

    def give_up(task: Task, reason: str) -> Outcome:
        held = task.claim is None or task.claim.held()
        status = attempt.write_failure(task.cell, Ending("crash", reason, (reason,))) if held else "stopped"
        return Outcome(task.cell, status, 0.0, (reason,))

    gpus = int(config.device == "cuda")
    if config.engine == "ray":
        return engines.ray(gpus, give_up)
    if config.engine == "slurm":
        return engines.slurm(config.jobs, gpus, config.out / "slurm", config.slurm, give_up)
    return local(config.jobs)


def declare(whole: Suite, out: Path) -> Path:
    """Writes the suite and its rules down in out/suites before anything runs, once; the path.

    The name carries a hash of the content: a rule that is changed later stands beside the first one, with its own time.
    """
    content = whole.model_dump(mode="json")
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
    path = out / "suites" / f"{Path(whole.name).name}-{digest}.json"
    told = {"declared": datetime.now(UTC).isoformat(timespec="seconds"), "suite": content}
    storage.create_exclusive(path, (json.dumps(told, separators=(",", ":")) + "\n").encode())
    return path


@dataclass(frozen=True)
class Ledger:
    """What is known of a suite's cells: `find` gives the record of an id that counts; `stand` says where all stands."""

    find: Callable[[str], dict[str, Any] | None]
    stand: Callable[[], Schedule]


def main(argv: list[str] | None = None) -> int:
    config = cli.parse(SweepConfig, argv, prog="attnbench.sweep")
    from rich.console import Console
    from rich.live import Live

    from attnbench import report, suite

    console = Console()
    whole = suite.load(config.suite)
    if config.engine != "local":  # another process stands in another folder
        config = config.model_copy(update={"out": config.out.absolute()})
    books = ledger(config, whole)
    board = Board(f"{whole.name}: {whole.question}", config.jobs, books.stand())
    if config.list:
        console.print(board)
        return 0
    if config.watch:
        board.jobs = 0  # nothing runs here
        with Live(board, console=console, refresh_per_second=2):
            now = follow(board, books.stand, Observer(config.out))
        return _close(console, config, now)
    storage.check_writable(config.out)
    _interruptible()
    engine = _engine(config)
    declare(whole, config.out)
    with Live(board, console=console, refresh_per_second=2), Launcher(config.out, config.jobs) as launcher:
        now = _run(config, engine, launcher, board, books, console)
    draw_fields(config.out, sorted({cell.config.variant for cell in now.done}))
    page = report.write(config.out, config.out / "report")
    status = _close(console, config, now)
    console.print(f"report  {page}", soft_wrap=True)
    return status


def _interruptible() -> None:
    """A terminated sweep stops as an interrupted one does: its cells must not outlive it. A shell's background jobs
    ignore SIGINT unless told otherwise."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def ledger(config: SweepConfig, whole: Suite) -> Ledger:
    """The ledger of a suite. Failures that are to be run again count as unknown: those that stand now, and not what
    becomes of them in this sweep or in another one beside it."""
    from attnbench import budget, experiment, schedule, suite, verdicts
    from models import VARIANTS

    verdicts.check(whole, VARIANTS)
    # What the machine that a cell will run on has, this one cannot know.
    resolve = partial(experiment.resolve, cuda=True if config.engine != "local" and config.device == "cuda" else None)
    base = resolve(RunConfig(out=config.out, device=config.device))
    known = {name: variant.family for name, variant in VARIANTS.items()}
    cells = [cell.model_copy(update={"config": resolve(cell.config)}) for cell in suite.cells(whole, known, base)]
    fitted: dict[tuple[str, str], RunConfig] = {}
    again: dict[str, str] = {}
    keep = not (config.list or config.watch)
    if config.retry:
        again = {
            done["id"]: done["sha256"] for done in record.read_all(config.out)[0] if done["status"] in config.retry
        }

    def find(name: str) -> dict[str, Any] | None:
        found = record.find(config.out, name)
        return None if found is not None and again.get(name) == found["sha256"] else found

    def fit(run: RunConfig, limit: suite.Budget) -> RunConfig | None:
        key = run.model_dump_json(), limit.model_dump_json()
        if key not in fitted and (found := budget.fit(run, limit, config.out, keep=keep)) is not None:
            fitted[key] = found  # it may have been measured, and the next look must find the same cells
        return fitted.get(key)

    return Ledger(find, lambda: schedule.schedule(whole, cells, find, fit))


def _run(
    config: SweepConfig, engine: Engine, launcher: Launcher, board: Board, ledger: Ledger, console: Any
) -> Schedule:
    """Runs what is ready until nothing is, leaving to other launchers what they hold as long as they live."""
    share = {} if "OMP_NUM_THREADS" in os.environ else {"threads": max(1, threads() // config.jobs)}
    run_one = partial(run_cell, limits=config.limits, retries=config.retries)

    def told(cell: Cell, line: str) -> None:
        board.watch(cell, line)
        launcher.note(record.identify(cell.config), line)

    if config.engine == "local":
        run_one = partial(run_one, watch=told, **share)
    now = ledger.stand()
    while now.ready:
        ended = False
        for outcome in engine(_claimed(now.ready, launcher, ledger), run_one):
            launcher.give_back(record.identify(outcome.cell.config), outcome.seconds)
            board.end(outcome)
            if outcome.status != "ok":
                words = f"{title(outcome.cell)}: {outcome.status}: {' '.join(outcome.tail[-1:])}"
                console.print(words, markup=False, highlight=False)
            ended |= outcome.status != "stopped"
        now = ledger.stand()
        board.stand(now, (beat for beat in launcher.others.alive() if beat.owner != launcher.owner))
        if now.ready and not ended:
            time.sleep(POLL)
    return now


def _claimed(cells: Iterable[Cell], launcher: Launcher, ledger: Ledger) -> Iterator[Task]:
    """Of these cells those that nobody else runs or has run by now, each claimed when it is asked for."""
    for cell in cells:
        name = record.identify(cell.config)
        claim = launcher.acquire(name)
        if claim is not None and ledger.find(name) is None:
            yield Task(cell, claim)
        elif claim is not None:
            launcher.give_back(name)


def draw_fields(out: Path, names: list[str]) -> None:
    """The receptive field of each variant, found from its gradients, as out/fields/NAME.png; drawn once."""
    from attnbench import receptive, variants
    from attnbench.checks import Subject

    for name in names:
        path = out / "fields" / f"{name}.png"
        if ":" not in name and not path.exists() and "ar" in variants.find(name).objectives:
            storage.write_bytes(path, receptive.picture(Subject(name)))


def _close(console: Any, config: SweepConfig, now: Schedule) -> int:
    """Says how it ended: a line for every way in which cells failed, with the command that does something about it."""
    if not console.is_terminal:
        console.print()  # a table that cannot be redrawn stands there without its line's end
    ends = Counter(done["status"] for cell in (*now.failed, *now.done) if (done := _record(config, cell)))
    twice = {
        "memory": config.limits.bytes and f"{2 * config.limits.bytes}B",
        "time": config.limits.time and f"{2 * config.limits.seconds:g}s",
    }
    lines = {
        "crash": ("crashed or were killed; the report has their last words", command(config, "crash")),
        "timeout": (
            f"took more than {config.limits.time or 'they were given'} and go on from their checkpoints",
            command(config, "timeout", time=twice["time"]),
        ),
        "oom": (
            f"ran out of memory{f' at {config.limits.memory}' if config.limits.memory else ''}",
            command(config, "oom", memory=twice["memory"])
            + ("" if twice["memory"] else " (with more memory, or smaller batches in the suite)"),
        ),
        "nan": ("diverged, which is a result", f"{command(config)} (after lower learning rates in the suite)"),
    }
    for status, (words, way) in lines.items():
        if ends[status]:
            console.print(f"{ends[status]} {words}: {way}", soft_wrap=True, markup=False, highlight=False)
    if now.waiting:
        way = command(config, "crash", "timeout", "oom")
        words = f"{now.waiting} wait for a measurement or a tuning run that failed: {way}"
        console.print(words, soft_wrap=True, markup=False, highlight=False)
    return 1 if now.failed or now.waiting else 0


def _record(config: SweepConfig, cell: Cell) -> dict[str, Any] | None:
    return record.find(config.out, record.identify(cell.config), warn=False)


def command(config: SweepConfig, *retry: str, **limits: Any) -> str:
    """The command line that says this, with other limits where they are given."""
    told = config.model_dump(mode="json", exclude_defaults=True, exclude={"suite", "retry", "list", "watch"})
    told["limits"] = told.get("limits", {}) | {name: value for name, value in limits.items() if value}
    words = ["python", "-m", "attnbench.sweep", config.suite]
    for name, value in told.items():
        items = value.items() if isinstance(value, dict) else [("", value)]
        words += [w for key, v in items for w in (f"--{name}.{key}".rstrip(".").replace("_", "-"), str(v))]
    return shlex.join([*words, *(w for kind in retry for w in ("--retry", kind))])


if __name__ == "__main__":
    sys.exit(cli.command(main)())
