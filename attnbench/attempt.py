"""One cell in a process of its own, under limits of memory and time, tried again where that is worth it, and the record
of how it ended. A failure is a result too."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from pydantic import PositiveFloat, TypeAdapter, field_validator

from attnbench import measure, record
from attnbench.cell import STOPPED, TAIL, Order
from attnbench.claim import Claim
from attnbench.config import Memory, Settings, size_of
from attnbench.errors import Refusal
from attnbench.suite import Cell

COMMAND = (sys.executable, "-m", "attnbench.cell")

TICK = 0.2
"""Seconds between two looks at a running cell."""

GRACE = 30.0
"""Seconds that a cell has to save its checkpoint when it is told to end; then it is killed."""

NEAR = 0.9
"""Share of its limit of memory from which on a kill is put down to memory."""

stopping = threading.Event()
"""Set where a sweep ends early: running cells are told to end, and none is tried again."""

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class LimitsConfig(Settings):
    """What a cell may use before it is ended. Not part of a run's identity."""

    memory: Memory | None = None
    """Bytes that a cell may have beyond what its libraries take, such as 4GB: on CPU of the process (Linux only;
    more than the measured peak of training, for malloc keeps some of what is freed), on CUDA of the GPU."""
    time: str | None = None
    """How long a try may take, such as 90s, 30m or 2h; a further try goes on from where it stood."""

    @field_validator("time")
    @classmethod
    def _duration(cls, value: str | None) -> str | None:
        if value is not None:
            TypeAdapter(PositiveFloat).validate_python(_seconds(value))
        return value

    @property
    def bytes(self) -> int | None:
        """The limit of memory."""
        return None if self.memory is None else size_of(self.memory)

    @property
    def seconds(self) -> float:
        """The limit of time; infinity where there is none."""
        return math.inf if self.time is None else _seconds(self.time)


UNLIMITED = LimitsConfig()


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip().lower())
    if match is None:
        raise ValueError("a time is a number and its unit: 90s, 30m, 2h")
    return float(match[1]) * _SECONDS[match[2] or "s"]


@dataclass(frozen=True)
class Task:
    """A cell that its launcher may run: it has the claim."""

    cell: Cell
    claim: Claim | None = None


@dataclass(frozen=True)
class Outcome:
    """How a cell ended. `tail`: the last lines that it printed. "stopped": told to end, and there is no record."""

    cell: Cell
    status: str
    seconds: float
    tail: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ending:
    """How one try ended. `worth`: whether another might end otherwise; `told`: whether the cell left a record."""

    status: str
    reason: str
    tail: tuple[str, ...] = ()
    worth: bool = False
    told: bool = False


Progress = Callable[[Cell, str], None]
"""Told a cell and what it is doing ("train 120")."""


def run_cell(
    task: Task,
    watch: Progress = lambda cell, line: None,
    limits: LimitsConfig = UNLIMITED,
    retries: int = 0,
    threads: int | None = None,
) -> Outcome:  # fmt: skip
    """Runs a cell in a process of its own, again after a crash, a kill or a timeout (which resumes), `retries` times.

    Afterwards a record stands in out/runs, whatever happened; but for a cell that was told to stop, which leaves its
    checkpoint and resumes the next time, and one whose claim was lost, which is another launcher's. `threads`: of the
    CPU, for the cell and what it starts; none: as here.
    """
    began, tries = time.monotonic(), 1
    ending = _try(task, watch, limits, threads)
    while ending.worth and tries <= retries and not stopping.is_set():
        tries += 1
        watch(task.cell, f"try {tries}, after: {ending.status}: {ending.reason}")
        ending = _try(task, watch, limits, threads)
    status = ending.status
    if not ending.told and task.claim is not None and not task.claim.held():
        status = "stopped"
    elif not ending.told and status != "stopped":
        status = write_failure(task.cell, ending, tries)
    return Outcome(task.cell, status, time.monotonic() - began, ending.tail)


def _try(task: Task, watch: Progress, limits: LimitsConfig, threads: int | None) -> Ending:
    """One process, from its order to its end."""
    config, tail = task.cell.config, deque[str](maxlen=TAIL)
    order = Order(config=config, memory=limits.bytes, claim=task.claim)
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    kills = _kernel_kills()
    with (
        subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", env=environment, start_new_session=True,
        ) as child,
        Guard(child, limits) as guard,
    ):  # fmt: skip
        assert child.stdin is not None and child.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died before it listened; what it said is still there
            child.stdin.write(order.model_dump_json() + "\n")
            child.stdin.flush()  # and it stays open: the cell ends with whoever holds it
        for line in child.stdout:
            tail.append(line.rstrip())
            watch(task.cell, line.strip())
        code = child.wait()
        with contextlib.suppress(BrokenPipeError):  # what it never listened to is still waiting to be written
            child.stdin.close()
    said = tuple(tail)
    name = record.identify(config)
    if code in (0, 1) and said and said[-1].endswith(f"{name}.json"):
        done = record.find(config.out, name)
        if done is not None:
            return Ending(done["status"], str(done.get("reason", "")), said, told=True)
    if guard.late:
        return Ending("timeout", f"took more than {limits.time}", said, worth=True)
    if stopping.is_set() or code in (STOPPED, -signal.SIGINT):
        return Ending("stopped", "", said)
    return _failed(code, said, guard.near or _kernel_kills() > kills)


def _failed(code: int, tail: tuple[str, ...], pressed: bool) -> Ending:
    """What a process that ended without a record died of. `pressed`: whether memory was short when it was killed."""
    reason = next((line for line in reversed(tail) if line), "") or f"ended with status {code}"
    if code in (1, -signal.SIGABRT) and measure.about_memory("\n".join(tail)):
        return Ending("oom", reason, tail)
    if code == -signal.SIGKILL and pressed:
        return Ending("oom", "killed by signal 9 (SIGKILL) when memory was short", tail)
    if code < 0:
        return Ending("crash", f"killed by signal {-code} ({signal.Signals(-code).name})", tail, worth=True)
    return Ending("crash", reason, tail, worth=code != 2)  # what is refused once is refused always


def write_failure(cell: Cell, ending: Ending, tries: int = 1) -> str:
    """Writes the record of a cell that ended without one of its own; the status that stands in out/runs then.

    A finished record that somebody else wrote in the meantime stays, and counts.
    """
    name = record.identify(cell.config)
    found = {
        "id": name,
        "status": ending.status,
        "reason": ending.reason,
        "variant": cell.config.variant,
        "code": cell.config.code,
        "family": None,
        "backend": None,
        "seed": cell.config.seed,
        "config": cell.config.identity(),
        "environment": record.environment(),
        "data": {"name": cell.config.data.name},
        "metrics": {},
        "tries": tries,
        "tail": list(ending.tail),
    }
    try:
        record.write(cell.config.out, found)
    except Refusal:
        if record.find(cell.config.out, name, "ok") is None:
            raise
        return "ok"
    return ending.status


class Guard:
    """Beside a running cell, as a context: ends it when its time is up or the sweep stops, with all that it started,
    and sees how near its limit of memory it comes.

    `late`: its time was up; `near`: when it was last looked at, it had NEAR of the memory that it may have.
    """

    def __init__(self, child: subprocess.Popen[str], limits: LimitsConfig) -> None:
        self.late = False
        self.near = False
        self._child, self._limits = child, limits
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Guard:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._signal(signal.SIGKILL)

    def _look(self) -> None:
        deadline, told = time.monotonic() + self._limits.seconds, math.inf
        while not self._ended.wait(TICK):
            now = time.monotonic()
            if self._limits.bytes is not None:
                self.near = _near(self._child.pid, self.near)
            if self._child.poll() is not None or now - told > GRACE:
                self._signal(signal.SIGKILL)  # whatever is left of it keeps its output open
            elif told == math.inf and (stopping.is_set() or now > deadline):
                self.late, told = not stopping.is_set(), now
                self._signal(signal.SIGINT)

    def _signal(self, number: int) -> None:
        """Tells the cell and everything that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, number)


def _near(pid: int, before: bool) -> bool:
    """Whether a process has NEAR of the data that it may have; as `before` where it has ended, or is not on Linux."""
    if sys.platform.startswith("linux"):
        import resource

        with contextlib.suppress(OSError):
            limit, _ = resource.prlimit(pid, resource.RLIMIT_DATA)
            held = re.search(r"^VmData:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"), re.M)
            if held is not None:
                return limit != resource.RLIM_INFINITY and int(held[1]) * 1024 > NEAR * limit
    return before


def _kernel_kills() -> int:
    """Processes that this machine's kernel has killed because memory was short. Linux; elsewhere 0."""
    with contextlib.suppress(OSError):
        found = re.search(r"^oom_kill (\d+)", Path("/proc/vmstat").read_text(encoding="utf-8"), re.M)
        return int(found[1]) if found else 0
    return 0
