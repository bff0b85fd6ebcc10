"""`python -m attnbench.sweep SUITE --out DIR`: every cell of a suite, each in a process of its own, skipping the done.

An engine is a function from ready cells to outcomes: `Engine = (cells, run_one) -> iterator of Outcome`. It decides
where and in what order `run_one` is called and nothing else; `local` calls it here. A cell that ends without a record
gets one that says so: a failure is a result too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field, PositiveInt

from attnbench import cli, engines, storage
from attnbench.cell import STOPPED
from attnbench.config import RunConfig, Scalar, Settings
from attnbench.suite import Cell, Suite

TAIL = 20
"""Last lines of a cell's output that are kept."""

_live: set[subprocess.Popen[str]] = set()
_stopping = threading.Event()


class SweepConfig(Settings):
    """Every cell of a suite, skipping what is done."""

    suite: Annotated[str, tyro.conf.Positional]
    """A suite that comes with attnbench (quick, c1 … c5, findings, replica, replica-tenth, reference) or FILE.yaml."""
    out: Path = Path("results")
    """Folder of results."""
    engine: Literal["local", "ray", "slurm"] = "local"
    """local: this machine; ray: a Ray cluster (RAY_ADDRESS, or one that runs here); slurm: jobs, through submitit. The
    latter two need `out` in a folder that all machines share."""
    slurm: Annotated[dict[str, Scalar], tyro.conf.arg(metavar="NAME VALUE")] = Field(default_factory=dict)
    """What sbatch is told: --slurm.partition NAME, --slurm.account NAME, --slurm.time MINUTES, …"""
    jobs: PositiveInt = 1
    """Cells at a time; with more than one, throughput is measured beside a neighbour and is worth little."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    retry: bool = False
    """Run again what ended in a crash, out of memory or a timeout."""
    list: bool = False
    """Only say what is done and what is to do."""


@dataclass(frozen=True)
class Outcome:
    """How a cell ended. `tail`: the last lines that it printed."""

    cell: Cell
    status: str
    seconds: float
    tail: tuple[str, ...] = ()


Progress = Callable[[Cell, str], None]
"""Told a cell and what it is doing ("train 120")."""
RunOne = Callable[[Cell], Outcome]
Engine = Callable[[Iterable[Cell], RunOne], Iterator[Outcome]]


def run_cell(cell: Cell, watch: Progress = lambda cell, line: None) -> Outcome:
    """Runs one cell in a process of its own; afterwards a record stands in out/runs, whatever happened.

    But for a cell that was told to stop: it leaves its checkpoint and no record, and resumes the next time.
    """
    from attnbench import record

    began = time.monotonic()
    name = record.identify(cell.config)
    command = [sys.executable, "-m", "attnbench.cell"]
    tail: deque[str] = deque(maxlen=TAIL)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        _live.add(child)
        try:
            with contextlib.suppress(BrokenPipeError):  # it died before it listened; what it said is still there
                child.stdin.write(cell.config.model_dump_json())
                child.stdin.close()
            for line in child.stdout:
                tail.append(line.rstrip())
                watch(cell, line.strip())
        finally:
            _live.discard(child)
    if _stopping.is_set() or child.returncode in (STOPPED, -signal.SIGINT):
        return Outcome(cell, "stopped", time.monotonic() - began, tuple(tail))
    ended = child.returncode in (0, 1) and bool(tail) and tail[-1].endswith(f"{name}.json")
    done = record.find(cell.config.out, name) if ended else None
    if done is None:
        done = _failure(cell, name, child.returncode, tuple(tail))
    return Outcome(cell, done["status"], time.monotonic() - began, tuple(tail))


def _failure(cell: Cell, name: str, code: int, tail: tuple[str, ...]) -> dict[str, Any]:
    """Writes and returns the record of a cell that ended without one of its own."""
    from attnbench import record

    reason = next((line for line in reversed(tail) if line), "") or f"ended with status {code}"
    found = {
        "id": name,
        "status": "crash",
        "reason": f"killed by signal {-code}" if code < 0 else reason,
        "variant": cell.config.variant,
        "family": None,
        "backend": None,
        "seed": cell.config.seed,
        "config": cell.config.identity(),
        "environment": record.environment(),
        "data": {"name": cell.config.data.name},
        "metrics": {},
        "tail": list(tail),
    }
    record.write(cell.config.out, found)
    return found


def local(jobs: int) -> Engine:
    """The engine of one machine: `jobs` cells at a time."""

    def engine(cells: Iterable[Cell], run_one: RunOne) -> Iterator[Outcome]:
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(run_one, cell) for cell in cells]
            try:
                for future in as_completed(futures):
                    yield future.result()
            except BaseException:
                _stop(pool)
                raise

    return engine


def _engine(config: SweepConfig) -> Engine:
    """The engine that was asked for."""

    def give_up(cell: Cell, reason: str) -> Outcome:
        from attnbench import record

        name = record.identify(cell.config)
        done = record.find(cell.config.out, name) or _failure(cell, name, 1, (reason,))
        return Outcome(cell, done["status"], 0.0, (reason,))

    gpus = int(config.device == "cuda")
    if config.engine == "ray":
        return engines.ray(gpus, give_up)
    if config.engine == "slurm":
        return engines.slurm(config.jobs, gpus, config.out / "slurm", config.slurm, give_up)
    return local(config.jobs)


def _stop(pool: ThreadPoolExecutor) -> None:
    """Lets no further cell start and tells the running ones to save a checkpoint and end; waits for them."""
    _stopping.set()
    pool.shutdown(wait=False, cancel_futures=True)
    for child in list(_live):
        child.send_signal(signal.SIGINT)
    pool.shutdown(wait=True)
    _stopping.clear()


def declare(whole: Suite, out: Path) -> Path:
    """Writes the suite and its rules down in out/suites before anything runs, once; the path.

    The name carries a hash of the content: a rule that is changed later stands beside the first one, with its own time.
    """
    content = whole.model_dump(mode="json")
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
    path = out / "suites" / f"{Path(whole.name).name}-{digest}.json"
    told = {"declared": datetime.now(UTC).isoformat(timespec="seconds"), "suite": content}
    storage.create_exclusive(path, (json.dumps(told, indent=1) + "\n").encode())
    return path


@dataclass
class Board:
    """What a person watches: how many are done, running, failed, waiting, and the time left."""

    title: str
    jobs: int
    done: int = 0
    failed: int = 0
    total: int = 0

    def __post_init__(self) -> None:
        self.running: dict[str, str] = {}
        self.seconds: list[float] = []
        self.lock = threading.Lock()

    def watch(self, cell: Cell, line: str) -> None:
        """A line that a cell printed."""
        with self.lock:
            self.running[_title(cell)] = line[:60]

    def end(self, outcome: Outcome) -> None:
        """A cell that ended."""
        with self.lock:
            self.running.pop(_title(outcome.cell), None)
            self.seconds.append(outcome.seconds)
            if outcome.status in ("ok", "nan"):
                self.done += 1
            elif outcome.status != "stopped":
                self.failed += 1

    @property
    def left(self) -> float | None:
        """Seconds left, from the mean of what has run here; None before the first."""
        if not self.seconds:
            return None
        return (self.total - self.done - self.failed) * sum(self.seconds) / len(self.seconds) / self.jobs

    def __rich__(self) -> Any:
        from rich.table import Table

        left = self.left
        table = Table(title=self.title, title_justify="left")
        for name in ("done", "running", "failed", "to do", "time left"):
            table.add_column(name, justify="right")
        with self.lock:
            running = len(self.running)
            waiting = self.total - self.done - self.failed - running
            clock = "–" if left is None else f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
            table.add_row(str(self.done), str(running), str(self.failed), str(waiting), clock)
            table.caption = "\n".join(f"{name}: {line}" for name, line in self.running.items())
        table.caption_justify = "left"
        return table


def _title(cell: Cell) -> str:
    return f"{cell.key} seed {cell.config.seed} lr {cell.config.train.lr:g}"


def main(argv: list[str] | None = None) -> int:
    config = cli.parse(SweepConfig, argv, prog="attnbench.sweep")
    from rich.console import Console
    from rich.live import Live

    from attnbench import budget, experiment, record, report, schedule, suite
    from models import VARIANTS

    console = Console()
    whole = suite.load(config.suite)
    afar = config.engine != "local"
    if afar:  # another process stands in another folder
        config = config.model_copy(update={"out": config.out.absolute()})
    # What the machine that a cell will run on has, this one cannot know.
    resolve = partial(experiment.resolve, cuda=True if afar and config.device == "cuda" else None)
    base = resolve(RunConfig(out=config.out, device=config.device))
    known = {name: variant.family for name, variant in VARIANTS.items()}
    cells = [cell.model_copy(update={"config": resolve(cell.config)}) for cell in suite.cells(whole, known, base)]
    storage.check_writable(config.out)
    tried: set[str] = set()

    def find(name: str) -> dict[str, Any] | None:
        found = record.find(config.out, name)
        if found is None or found["status"] in schedule.FINISHED or name in tried or not config.retry:
            return found
        return None

    def stand() -> schedule.Schedule:
        return schedule.schedule(whole, cells, find, lambda run, limit: budget.fit(run, limit, config.out))

    if threading.current_thread() is threading.main_thread():
        # A terminated sweep stops as an interrupted one does: its cells must not outlive it. A shell's background jobs
        # ignore SIGINT unless told otherwise.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    now = stand()
    board = Board(f"{whole.name}: {whole.question}", config.jobs, len(now.done), len(now.failed), now.total)
    if config.list:
        console.print(board)
        return 0
    engine = _engine(config)
    declare(whole, config.out)
    run_one = run_cell if afar else partial(run_cell, watch=board.watch)
    with Live(board, console=console, refresh_per_second=2):
        while now.ready:
            tried.update(record.identify(cell.config) for cell in now.ready)
            for outcome in engine(now.ready, run_one):
                board.end(outcome)
                if outcome.status != "ok":
                    console.print(f"{_title(outcome.cell)}: {outcome.status}: {' '.join(outcome.tail[-1:])}")
            now = stand()
    draw_fields(config.out, sorted({cell.config.variant for cell in now.done}))
    return _close(console, now, report.write(config.out, config.out / "report"))


def draw_fields(out: Path, names: list[str]) -> None:
    """The receptive field of each variant, found from its gradients, as out/fields/NAME.png; drawn once."""
    from attnbench import receptive, variants
    from attnbench.checks import Subject

    for name in names:
        path = out / "fields" / f"{name}.png"
        if ":" not in name and not path.exists() and "ar" in variants.find(name).objectives:
            storage.write_bytes(path, receptive.picture(Subject(name)))


def _close(console: Any, now: Any, page: Path) -> int:
    """Says how it ended, and what to do."""
    if now.failed:
        console.print(f"{len(now.failed)} failed; --retry runs them again")
    if now.waiting:
        console.print(f"{now.waiting} wait for a measurement or a tuning run that failed; --retry, or mend the suite")
    console.print(f"report  {page}", soft_wrap=True)
    return 1 if now.failed or now.waiting else 0


if __name__ == "__main__":
    sys.exit(cli.command(main)())
