"""What a person watches while a sweep runs: one table, in the sweep's own terminal or, with --watch, in any other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from attnbench import record
from attnbench.attempt import Outcome
from attnbench.claim import Heartbeat, Observer
from attnbench.suite import Cell

if TYPE_CHECKING:
    from attnbench.schedule import Schedule

PERIOD = 1.0
"""Seconds between two looks at a folder that others write."""


class Board:
    """How many cells are done, running, failed, waiting, and the time left; below, what each running cell does.

    `jobs`: cells at a time here. Other launchers on the same folder are seen by their heartbeats.
    """

    def __init__(self, title: str, jobs: int, now: Schedule) -> None:
        self.title, self.jobs = title, jobs
        self.done, self.failed, self.total = 0, 0, 0
        self.running: dict[str, str] = {}
        self.ended, self.seconds = 0, 0.0
        self.note = ""
        self._others: list[Heartbeat] = []
        self._titles: dict[str, str] = {}
        self._lock = threading.Lock()
        self.stand(now)

    def stand(self, now: Schedule, others: Iterable[Heartbeat] = ()) -> None:
        """Where the suite stands by its records, and what other launchers tell."""
        with self._lock:
            self.done, self.failed, self.total = len(now.done), len(now.failed), now.total
            self._others = list(others)
            self._titles = {record.identify(cell.config): title(cell) for cell in now.ready}

    def watch(self, cell: Cell, line: str) -> None:
        """A line that a cell printed here."""
        with self._lock:
            self.running[title(cell)] = line[:60]

    def end(self, outcome: Outcome) -> None:
        """A cell that ended here."""
        with self._lock:
            self.running.pop(title(outcome.cell), None)
            if outcome.status == "stopped":
                return
            self.ended += 1
            self.seconds += outcome.seconds
            if outcome.status in ("ok", "nan"):
                self.done += 1
            else:
                self.failed += 1

    @property
    def left(self) -> float | None:
        """Seconds left, from the mean of what has run here and with the others; None before the first."""
        ended = self.ended + sum(beat.ended for beat in self._others)
        seconds = self.seconds + sum(beat.seconds for beat in self._others)
        jobs = self.jobs + sum(beat.jobs for beat in self._others)
        if not ended or not jobs:
            return None
        return (self.total - self.done - self.failed) * seconds / ended / jobs

    def lines(self) -> dict[str, str]:
        """What each running cell does, by its title."""
        theirs = [(id, line) for beat in self._others for id, line in beat.lines.items()]
        return self.running | {self._titles.get(id, id): line for id, line in theirs}

    def __rich__(self) -> Any:
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=escape(self.title), title_justify="left")
        for name in ("done", "running", "failed", "to do", "time left"):
            table.add_column(name, justify="right")
        with self._lock:
            left, running = self.left, self.lines()
            waiting = max(0, self.total - self.done - self.failed - len(running))
            clock = "–" if left is None else f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
            table.add_row(str(self.done), str(len(running)), str(self.failed), str(waiting), clock)
        lines = [f"{name}: {line}" for name, line in running.items()]
        table.caption = escape("\n".join([*lines, self.note] if self.note else lines))
        table.caption_justify = "left"
        return table


def title(cell: Cell) -> str:
    """A cell in a few words."""
    return f"{cell.key} seed {cell.config.seed} lr {cell.config.train.lr:g}"


def follow(board: Board, stand: Callable[[], Schedule], observer: Observer) -> Schedule:
    """Keeps a board up to date with what launchers elsewhere do, until nothing is left to run; changes nothing."""
    while True:
        now, others = stand(), observer.alive()
        board.stand(now, others)
        board.note = "" if others else "nobody runs it now; the same command without --watch does"
        if not now.ready:
            return now
        time.sleep(PERIOD)
