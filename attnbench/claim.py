"""Which of many launchers runs a cell: claims in out/claims, heartbeats in out/launchers, on a shared file system.

A claim is a file `<id>.<n>.json`, created exclusively, and the highest n holds the cell. A dead launcher's claim n is
taken over by creating n + 1, which only one can. Nobody writes a file that another made, so a launcher that was merely
paused destroys nothing when it comes back: it asks `held` before it writes a checkpoint or a record, and finds that it
has lost.

A launcher is dead when its process is gone, which a neighbour on the same machine sees at once, or when its heartbeat
has not changed for STALE seconds of the observer's own clock; clocks of two machines are never compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from pydantic import ValidationError

from attnbench import storage
from attnbench.config import Settings
from attnbench.errors import Refusal

BEAT = 5.0
"""Seconds between two heartbeats."""

STALE = 120.0
"""Seconds without one after which a launcher is taken for dead. NFS may show an old file for a minute."""

Model = TypeVar("Model", bound=Settings)


def _machine() -> str:
    """This machine as process numbers mean it: a reboot or another container makes another one."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


MACHINE = _machine()


class Owner(Settings):
    """A launcher: a name that no other has, and its process. `started`: when, in the kernel's ticks."""

    token: str
    machine: str
    pid: int
    started: str

    @property
    def gone(self) -> bool:
        """Whether its process has ended, as far as can be seen from here."""
        if self.machine != MACHINE:
            return False
        return _started(self.pid) != self.started if sys.platform == "linux" else not storage.alive(self.pid)


class Heartbeat(Settings):
    """What a launcher tells of itself: `lines` has the id of every cell that it runs and what that printed last."""

    owner: Owner
    beat: int
    jobs: int
    ended: int
    """Cells that it has run."""
    seconds: float
    """What these took together."""
    lines: dict[str, str]


class Ticket(Settings):
    """What stands in a claim's file."""

    token: str
    owner: Owner


class Claim(Settings):
    """The right to run a cell and to write its record, as long as it is `held`."""

    out: Path
    id: str
    number: int
    token: str

    @property
    def path(self) -> Path:
        """Its file."""
        return _path(self.out, self.id, self.number)

    def held(self) -> bool:
        """Whether it still stands and nobody has taken it over."""
        found = _read(self.path, Ticket)
        taken = _path(self.out, self.id, self.number + 1).exists()
        return found is not None and found.token == self.token and not taken


class Observer:
    """Who of the launchers of a folder is alive, by what is seen of them from here."""

    def __init__(self, out: Path, stale: float = STALE) -> None:
        self._out = out
        self._stale = stale
        self._seen: dict[str, tuple[object, float]] = {}

    def dead(self, owner: Owner) -> bool:
        """Whether its process is gone or its heartbeat stands still."""
        if owner.gone:
            return True
        found = _read(_launcher(self._out, owner.token), Heartbeat)
        return self.still(owner.token, found and found.beat)

    def still(self, name: str, value: object) -> bool:
        """Whether what goes by this name has had this value for STALE seconds."""
        now = time.monotonic()
        before, since = self._seen.get(name, (value, now))
        if name not in self._seen or before != value:
            self._seen[name] = (value, now)
            return False
        return now - since > self._stale

    def alive(self) -> list[Heartbeat]:
        """The heartbeats of the launchers that are not dead."""
        found = (_read(path, Heartbeat) for path in sorted((self._out / "launchers").glob("*.json")))
        return [beat for beat in found if beat is not None and not self.dead(beat.owner)]


class Launcher:
    """One process that runs cells of a folder. As a context it beats, and in the end gives back what it still holds."""

    def __init__(self, out: Path, jobs: int = 1, beat: float = BEAT, stale: float = STALE) -> None:
        self.owner = Owner(token=secrets.token_hex(8), machine=MACHINE, pid=os.getpid(), started=_started(os.getpid()))
        self.others = Observer(out, stale)
        self._out, self._jobs, self._period = out, jobs, beat
        self._beats, self._ended, self._seconds = 0, 0, 0.0
        self._held: dict[str, Claim] = {}
        self._lines: dict[str, str] = {}
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Launcher:
        for path in (self._out / "launchers").glob("*.json"):
            beat = _read(path, Heartbeat)
            if beat is not None and beat.owner.gone:
                storage.remove(path)
        self._tell()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for id in list(self._held):
            self.give_back(id)
        self._end.set()
        self._thread.join()
        storage.remove(_launcher(self._out, self.owner.token))

    def acquire(self, id: str) -> Claim | None:
        """The claim of a cell; None where another launcher that lives has it. The record is to be looked for *after*
        this: whoever had the claim before may have written it."""
        number = max(_numbers(self._out, id), default=0)
        before = _read(_path(self._out, id, number), Ticket) if number else None
        if number and not self._free(id, number, before):
            return None
        claim = Claim(out=self._out, id=id, number=number + 1, token=secrets.token_hex(8))
        ticket = Ticket(token=claim.token, owner=self.owner)
        if not storage.create_exclusive(claim.path, ticket.model_dump_json().encode()):
            return None
        # The one that was looked at may have come back, or been given back by who took it over, in the meantime.
        now = _read(_path(self._out, id, number), Ticket) if number else None
        if now != before or not claim.held():
            storage.remove(claim.path)
            return None
        with self._lock:
            self._held[id] = claim
            self._lines[id] = ""
        return claim

    def give_back(self, id: str, seconds: float | None = None) -> None:
        """Gives a cell's claim back, if it is still held; `seconds`: what the cell took, if it ran."""
        with self._lock:
            claim = self._held.pop(id)
            self._lines.pop(id)
            if seconds is not None:
                self._ended += 1
                self._seconds += seconds
        if claim.held():
            for number in sorted(n for n in _numbers(self._out, id) if n <= claim.number):
                storage.remove(_path(self._out, id, number))

    def note(self, id: str, line: str) -> None:
        """What a cell printed, for who watches."""
        with self._lock:
            if id in self._lines:
                self._lines[id] = line

    def _free(self, id: str, number: int, ticket: Ticket | None) -> bool:
        """Whether a claim may be taken over; one that cannot be read has nobody to ask, and must stand still."""
        return self.others.still(f"{id}.{number}", None) if ticket is None else self.others.dead(ticket.owner)

    def _beat(self) -> None:
        while not self._end.wait(self._period):
            with contextlib.suppress(Refusal):  # a full disk may have room again next time
                self._tell()

    def _tell(self) -> None:
        self._beats += 1
        with self._lock:
            told = Heartbeat(
                owner=self.owner, beat=self._beats, jobs=self._jobs, ended=self._ended, seconds=self._seconds,
                lines=dict(self._lines),
            )  # fmt: skip
        storage.write_json(_launcher(self._out, self.owner.token), told.model_dump(mode="json"))


def _path(out: Path, id: str, number: int) -> Path:
    return out / "claims" / f"{id}.{number}.json"


def _launcher(out: Path, token: str) -> Path:
    return out / "launchers" / f"{token}.json"


def _numbers(out: Path, id: str) -> Iterator[int]:
    """Of the claims of a cell that stand."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(out / "claims"):
            stem, _, number = name.removesuffix(".json").rpartition(".")
            if stem == id and number.isdigit():
                yield int(number)


def _read(path: Path, model: type[Model]) -> Model | None:
    """What a file says; None where it is gone, or is not (or not yet) what it should be."""
    try:
        return model.model_validate(json.loads(path.read_bytes()))
    except (OSError, ValueError, ValidationError):
        return None


def _started(pid: int) -> str:
    """When a process started, which tells it from a later one of its number; empty if it has ended, or not on Linux."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
