"""Many launchers on one folder: no cell is lost, none is run twice, and what the dead held is taken over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from attnbench import claim, record, storage, suite, sweep
from attnbench.claim import Claim, Launcher, Observer
from tests import synthetic_records as synthetic
from tests.test_attempt import TINY, wait_for

ID = "cell-s0-0123456789"


def ticket(out: Path, number: int = 1, **owner: object) -> Path:
    """A claim, as a launcher on another machine leaves it."""
    told = {"token": "theirs", "machine": "elsewhere", "pid": 1, "started": "1"} | owner
    path = out / "claims" / f"{ID}.{number}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"token": "t", "owner": told}))
    return path


def beats(out: Path, beat: int) -> None:
    """The heartbeat of that launcher."""
    owner = {"token": "theirs", "machine": "elsewhere", "pid": 1, "started": "1"}
    told = {"owner": owner, "beat": beat, "jobs": 1, "ended": 0, "seconds": 0.0, "lines": {ID: "train 3"}}
    path = out / "launchers" / "theirs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told))


@pytest.mark.promise("sweeps")
def test_one_of_many_gets_a_cell(tmp_path: Path) -> None:
    launchers = [Launcher(tmp_path) for _ in range(16)]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda one: one.acquire(ID), launchers))
    assert sum(mine is not None for mine in found) == 1


@pytest.mark.promise("sweeps")
def test_one_of_many_takes_over_what_the_dead_held(tmp_path: Path) -> None:
    """Each round a stale claim more, and sixteen who see it."""
    for number in range(1, 9):
        ticket(tmp_path, number)
        launchers = [Launcher(tmp_path, stale=-1.0) for _ in range(16)]
        assert [one.acquire(ID) for one in launchers] == [None] * 16, "the first look only begins to count"
        with ThreadPoolExecutor(16) as pool:
            found = [mine for mine in pool.map(lambda one: one.acquire(ID), launchers) if mine is not None]
        # One that comes later sees a launcher of this process, which lives.
        assert [mine.number for mine in found] == [number + 1]
        assert found[0].held()


def test_what_is_given_back_is_free_and_leaves_nothing(tmp_path: Path) -> None:
    with Launcher(tmp_path) as first, Launcher(tmp_path) as second:
        mine = first.acquire(ID)
        assert mine is not None and mine.held()
        assert second.acquire(ID) is None
        first.give_back(ID)
        assert not mine.held()
        assert second.acquire(ID) is not None
    assert not [*(tmp_path / "claims").iterdir(), *(tmp_path / "launchers").iterdir()]


def test_the_dead_of_this_machine_are_seen_at_once(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as child:
        started = claim._started(child.pid)
        ticket(tmp_path, machine=claim.MACHINE, pid=child.pid, started=started)
        assert Launcher(tmp_path).acquire(ID) is None
        child.kill()
        wait_for(lambda: claim._started(child.pid) == "")  # not even waited for
        assert Launcher(tmp_path).acquire(ID) is not None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process's number is all that is known of it")
def test_another_process_of_the_same_number_is_another(tmp_path: Path) -> None:
    ticket(tmp_path, machine=claim.MACHINE, pid=os.getpid(), started="1")
    assert Launcher(tmp_path).acquire(ID) is not None


@pytest.mark.promise("sweeps")
def test_a_heartbeat_that_changes_keeps_a_claim_whatever_its_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the observer's own clock counts, and files may say what time they want."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    path = ticket(tmp_path)
    mine = Launcher(tmp_path, stale=60.0)
    for beat in range(5):
        beats(tmp_path, beat)
        for file in (path, tmp_path / "launchers" / "theirs.json"):
            os.utime(file, (0, 0) if beat % 2 else (4e9, 4e9))
        assert mine.acquire(ID) is None
        now += 59.0
        assert mine.acquire(ID) is None
        now += 59.0
    now += 2.0  # 61 after the last change
    assert mine.acquire(ID) is not None


def test_a_claim_that_cannot_be_read_is_taken_over_when_it_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill leaves on a file system without hard links."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    ticket(tmp_path).write_text("")
    mine = Launcher(tmp_path, stale=60.0)
    assert mine.acquire(ID) is None
    now = 61.0
    assert mine.acquire(ID) is not None


@pytest.mark.promise("sweeps")
def test_who_was_paused_finds_its_claim_lost_and_destroys_nothing(tmp_path: Path) -> None:
    paused, other, third = (Launcher(tmp_path, stale=-1.0) for _ in range(3))
    lost = paused.acquire(ID)
    assert lost is not None
    assert [other.acquire(ID)] == [None]
    taken = other.acquire(ID)
    assert taken is not None and taken.held() and not lost.held()
    paused.give_back(ID)
    assert taken.held()
    other.give_back(ID)
    again = third.acquire(ID)
    assert again is not None and again.path == lost.path
    assert again.held() and not lost.held(), "the file's name is the same, the claim is not"


@pytest.mark.promise("sweeps")
@pytest.mark.parametrize("meanwhile", ["given back", "given back and claimed again"])
def test_a_take_over_that_comes_too_late_retreats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    """Between looking at a dead launcher's claim and creating the next, another has taken it, run it, and gone."""
    path = ticket(tmp_path)
    mine, third = Launcher(tmp_path, stale=-1.0), Launcher(tmp_path)
    assert mine.acquire(ID) is None
    held: list[Claim | None] = []
    real = storage.create_exclusive

    def late(target: Path, data: bytes) -> bool:
        monkeypatch.setattr(storage, "create_exclusive", real)
        path.unlink()
        if meanwhile.endswith("again"):
            held.append(third.acquire(ID))
        return real(target, data)

    monkeypatch.setattr(storage, "create_exclusive", late)
    assert mine.acquire(ID) is None
    assert [one.name for one in (tmp_path / "claims").iterdir()] == [path.name] * len(held)
    assert all(one is not None and one.held() for one in held)


def test_an_observer_lists_the_living(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    observer = Observer(tmp_path, stale=60.0)
    beats(tmp_path, 1)
    assert [beat.lines for beat in observer.alive()] == [{ID: "train 3"}]
    now = 61.0
    assert observer.alive() == []
    beats(tmp_path, 2)
    assert len(observer.alive()) == 1


FAKE = """
import json, os, select, sys
order = json.loads(sys.stdin.readline())
folder, name = sys.argv[1], order["claim"]["id"]
def note(word):
    with open(folder + "/ledger", "a") as file: file.write(f"{word} {name} {os.environ['LAUNCHER']}\\n")
note("start")
if select.select([0], [], [], 0.03)[0]: sys.exit(9)
try:
    os.link(f"{folder}/ready/runs/{name}.json", f"{folder}/out/runs/{name}.json")
    note("end")
except FileExistsError: pass
print(f"{folder}/out/runs/{name}.json")
"""
"""Stands for a cell: takes 30 ms, dies with its launcher, and leaves a record that was made before, but only once."""

LAUNCH = """
import os, sys
from attnbench import attempt, claim, report, sweep
import attnbench.experiment, attnbench.schedule, attnbench.budget
folder, fake, launchers = sys.argv[1], sys.argv[2], int(sys.argv[3])
attempt.COMMAND = (sys.executable, "-I", "-S", "-c", fake, folder)
report.write = lambda out, page: page
sweep.draw_fields = lambda out, names: None
sweep.POLL = 0.05
children = []
for number in range(launchers):
    if (child := os.fork()) == 0:
        os.setsid()
        os.environ["LAUNCHER"] = str(os.getpid())  # a cell's parent is another once its launcher is dead
        sys.stdout = open(os.devnull, "w")
        status = sweep.main([folder + "/own.yaml", "--out", folder + "/out", "--device", "cpu", "--jobs", "2"])
        os._exit(status)
    children.append(child)
print(*children, flush=True)
statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
print(*statuses, flush=True)
"""
"""So many launchers, each a process with `sweep` in it; forked, because that is what importing torch once costs."""


def launch(folder: Path, count: int, launchers: int) -> tuple[int, list[int]]:
    """Lets many launchers run a suite of so many cells and kills one of them: which, and the exit statuses of all."""
    block = {"name": "a", "variants": ["dense1d"], "seeds": count, "settings": TINY}
    (folder / "own.yaml").write_text(yaml.safe_dump({"question": "?", "blocks": [block]}))
    (folder / "out" / "runs").mkdir(parents=True)
    config = sweep.SweepConfig(suite=str(folder / "own.yaml"), out=folder / "out", device="cpu")
    ready = sweep.ledger(config, suite.load(config.suite)).stand().ready
    for one in ready:
        done = synthetic.one("dense1d", seed=one.config.seed)
        record.write(folder / "ready", done | {"id": record.identify(one.config)})
    command = [sys.executable, "-c", LAUNCH, str(folder), FAKE, str(launchers)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(claim.__file__).parent.parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        assert len(child.stdout.readline().split()) == launchers
        killed = kill_one(folder / "ledger")
        return killed, [int(word) for word in child.stdout.readline().split()]


def lines(ledger: Path) -> list[list[str]]:
    return [line.split() for line in ledger.read_text().splitlines()] if ledger.exists() else []


def kill_one(ledger: Path) -> int:
    """kill -9 to a launcher while a cell of its runs, when some have ended; its number."""

    def busy() -> int:
        noted = lines(ledger)
        ended = {name for word, name, _ in noted if word == "end"}
        running = [int(pid) for word, name, pid in noted if word == "start" and name not in ended]
        return running[-1] if running and len(ended) > 3 else 0

    end = time.monotonic() + 60
    while not (pid := busy()):
        assert time.monotonic() < end, "no cell ran"
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    return pid


@pytest.mark.promise("sweeps")
@pytest.mark.skipif(sys.platform != "linux", reason="forks with threads of torch about")
@pytest.mark.timeout(240)
@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.soak)])
def test_eight_launchers_lose_no_cell_and_run_none_twice(
    count: int, tmp_path: Path, injected: Callable[[int], None]
) -> None:
    """One of them is killed on the way; what it ran is taken over at once."""
    injected(count)
    killed, statuses = launch(tmp_path, count, 8)
    assert sorted(statuses) == [-signal.SIGKILL, *[0] * 7]
    noted = lines(tmp_path / "ledger")
    starts, ends = (Counter(name for word, name, _ in noted if word == kind) for kind in ("start", "end"))
    assert len(ends) == count and set(ends.values()) == {1}
    again = {name for name in starts if starts[name] > 1}
    assert len(again) <= 2, "only what the killed one ran, two at a time, was begun again"
    first = {name: pid for word, name, pid in reversed(noted) if word == "start"}
    assert {first[name] for name in again} <= {str(killed)}, "a cell that lives is nobody else's"
    records, problems = record.read_all(tmp_path / "out")
    assert (len(records), problems) == (count, [])
    assert len({pid for _, _, pid in noted}) > 2, "they shared the work"
    left = [json.loads(path.read_text())["owner"]["pid"] for path in (tmp_path / "out" / "claims").iterdir()]
    assert set(left) <= {killed}, "the dead alone give nothing back"
