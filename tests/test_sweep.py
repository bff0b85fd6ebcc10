"""A sweep runs every cell once, in a process of its own, tunes with equal tries, and records what fails."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from attnbench import board, budget, cli, experiment, measure, record, report, schedule, suite, sweep, train
from attnbench.attempt import Outcome, Task
from attnbench.claim import Launcher
from attnbench.config import RunConfig
from attnbench.suite import Cell
from tests import synthetic_records as synthetic
from tests.test_attempt import wait_for

TINY = {"model": {"dim": 16, "depth": 1, "heads": 2}, "train": {"steps": 2, "batch": 4},
        "evaluate": {"images": 8}, "probe": {"enabled": False}, "sample": {"count": 0}, "measure": False}  # fmt: skip
KNOWN = {"dense1d": "dense", "local2d": "local"}


def written(folder: Path, **told: Any) -> str:
    block = {"name": "a", "variants": ["dense1d"], "seeds": 2, "settings": TINY}
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({"question": "?", "blocks": [block | told]}), encoding="utf-8")
    return str(path)


def swept(name: str, out: Path, *flags: str) -> int:
    return cli.command(sweep.main)([name, "--out", str(out), "--device", "cpu", *flags])


def test_a_sweep_runs_every_cell_and_the_next_one_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sweep, "draw_fields", lambda out, names: None)
    name, out = written(tmp_path), tmp_path / "out"
    assert swept(name, out) == 0
    records, problems = record.read_all(out)
    assert [(done["status"], done["seed"]) for done in records] == [("ok", 0), ("ok", 1)]
    assert problems == []
    assert (out / "report" / "index.html").exists()
    assert "time left" in capsys.readouterr().out
    declared = json.loads(next((out / "suites").glob("own-*.json")).read_text(encoding="utf-8"))
    assert suite.Suite.model_validate(declared["suite"]) == suite.load(name)

    def never(task: Task, **_: Any) -> Outcome:
        raise AssertionError("a cell that is done ran again")

    monkeypatch.setattr(sweep, "run_cell", never)
    assert swept(name, out) == 0


def test_a_cell_that_cannot_run_is_recorded_and_the_sweep_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sweep, "draw_fields", lambda out, names: None)
    name = written(tmp_path, seeds=1, grid={"model.options.colour": ["red"], "data.name": ["digits"]})
    assert swept(name, tmp_path / "out") == 1
    (done,) = record.read_all(tmp_path / "out")[0]
    assert done["status"] == "crash"
    assert "colour" in done["reason"]
    said = capsys.readouterr().out
    assert "1 crashed or were killed" in said and said.count("--device cpu --retry crash\n") == 1
    assert done["tries"] == 1, "what is refused once is refused always"
    assert "colour" in (tmp_path / "out" / "report" / "index.html").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the children")
@pytest.mark.parametrize("signalled", [pytest.param(signal.SIGINT, marks=pytest.mark.soak), signal.SIGTERM])
def test_a_sweep_that_is_told_to_stop_leaves_no_record_and_no_process(tmp_path: Path, signalled: int) -> None:
    """The cell saves its checkpoint and ends with its sweep; the next sweep resumes it."""
    steps = {"train": {"steps": 100_000, "batch": 4, "checkpoint_every": 10}}
    name, out = written(tmp_path, seeds=1, settings=TINY | steps), tmp_path / "out"
    command = [sys.executable, "-m", "attnbench.sweep", name, "--out", str(out), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        deadline = time.monotonic() + 120
        while not list(out.glob("checkpoints/*/*.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.1)
        cells = children(child.pid)
        child.send_signal(signalled)
        _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "the same command resumes" in said
    assert cells and not any(Path(f"/proc/{pid}").exists() for pid in cells)
    assert record.read_all(out) == ([], [])
    assert list(out.glob("checkpoints/*/*.safetensors"))


def children(pid: int) -> list[int]:
    """Processes started by a process, by Linux's own list."""
    return [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]


def cell(out: Path, seed: int = 0) -> Cell:
    config = RunConfig.model_validate(TINY | {"variant": "dense1d", "seed": seed, "out": out, "device": "cpu"})
    return Cell(config=config, block="a", key="a/dense1d/")


class Ledger:
    """Records by id, as a schedule asks for them; a run is a stroke of the pen."""

    def __init__(self, loss: dict[float, float]) -> None:
        self.loss = loss
        self.done: dict[str, dict[str, Any]] = {}

    def run(self, cells: Iterable[Cell]) -> list[tuple[int, float]]:
        ran = []
        for one in cells:
            value = self.loss[one.config.train.lr]
            status = "ok" if value < 9 else "nan"
            metrics = {"validation_nats_per_token": value} if status == "ok" else {}
            self.done[record.identify(one.config)] = {"status": status, "metrics": metrics}
            ran.append((one.config.seed, one.config.train.lr))
        return ran


def test_tuning_tries_every_rate_equally_and_repeats_the_best(tmp_path: Path) -> None:
    whole = suite.load(written(tmp_path, seeds=4, variants=["dense1d", "local2d"], tune={"lr": [1e-3, 1e-2, 0.1]}))
    cells = suite.cells(whole, KNOWN, RunConfig(device="cpu"))
    ledger = Ledger({1e-3: 1.5, 1e-2: 1.3, 0.1: 99.0})

    def stand() -> schedule.Schedule:
        return schedule.schedule(whole, cells, ledger.done.get, lambda run, limit: run)

    first = stand()
    assert (len(first.ready), first.waiting, first.total) == (6, 6, 12)
    assert Counter(ledger.run(first.ready)) == {(0, 1e-3): 2, (0, 1e-2): 2, (0, 0.1): 2}
    second = stand()
    assert sorted(ledger.run(second.ready)) == [(s, 1e-2) for s in (1, 1, 2, 2, 3, 3)]
    last = stand()
    assert (len(last.ready), last.waiting, len(last.done)) == (0, 0, 12)


def test_cells_that_blocks_share_are_one_run(tmp_path: Path) -> None:
    block = {"variants": ["dense1d"], "seeds": 2, "settings": TINY}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"question": "?", "blocks": [block | {"name": "a"}, block | {"name": "b"}]}))
    whole = suite.load(str(path))
    cells = suite.cells(whole, KNOWN, RunConfig(device="cpu"))
    found = schedule.schedule(whole, cells, lambda name: None, lambda run, limit: run)
    assert (len(cells), len(found.ready), found.total) == (4, 2, 2)


def test_where_every_rate_fails_nothing_is_repeated(tmp_path: Path) -> None:
    whole = suite.load(written(tmp_path, seeds=3, tune={"lr": [1e-2, 0.1]}))
    cells = suite.cells(whole, KNOWN, RunConfig(device="cpu"))
    ledger = Ledger({1e-2: 99.0, 0.1: 99.0})
    ledger.run(schedule.schedule(whole, cells, ledger.done.get, lambda run, limit: run).ready)
    last = schedule.schedule(whole, cells, ledger.done.get, lambda run, limit: run)
    assert (last.ready, last.waiting) == ((), 0)


def test_failed_cells_are_told_from_those_that_are_done(tmp_path: Path) -> None:
    whole = suite.load(written(tmp_path, seeds=3))
    cells = suite.cells(whole, KNOWN, RunConfig(device="cpu"))
    statuses = dict(zip((record.identify(c.config) for c in cells), ("ok", "oom", "nan"), strict=True))
    found = schedule.schedule(whole, cells, lambda name: {"status": statuses[name]}, lambda run, limit: run)
    assert (len(found.done), len(found.failed), len(found.ready)) == (2, 1, 0)


def test_equal_flops_become_steps(tmp_path: Path) -> None:
    config = cell(tmp_path).config
    cost = budget.flops_per_image(config)
    assert cost > 0
    fitted = budget.fit(config, suite.Budget(flops=cost * 4 * 60), tmp_path)
    assert fitted is not None
    assert (fitted.train.steps, fitted.train.warmup) == (60, 5)


def test_equal_seconds_wait_for_a_measured_throughput(tmp_path: Path) -> None:
    done = synthetic.one("dense1d", steps=1, cost=True)
    config = RunConfig.model_validate(done["config"] | {"seed": 3})
    limit = suite.Budget(seconds=10)
    assert budget.fit(config, limit, tmp_path) is None
    synthetic.write(tmp_path, [done])
    fitted = budget.fit(config, limit, tmp_path)
    speed = done["metrics"]["train_images_per_second"]
    assert fitted is not None and fitted.train.steps == round(10 * speed / 32)
    other = config.model_copy(update={"variant": "local2d"})
    assert budget.fit(other, limit, tmp_path) is None, "another variant's throughput says nothing"


def test_what_a_budget_allows_stays_when_more_is_measured(tmp_path: Path) -> None:
    """The cells that it made are measured too; and all seeds and rates have equally much."""
    done = synthetic.one("dense1d", steps=1, cost=True)
    synthetic.write(tmp_path, [done])
    config, limit = RunConfig.model_validate(done["config"] | {"seed": 3}), suite.Budget(seconds=10)
    assert budget.fit(config, limit, tmp_path) is not None and not (tmp_path / "budgets").exists()
    first = budget.fit(config, limit, tmp_path, keep=True)
    for seed in (1, 2):
        faster = synthetic.one("dense1d", seed=seed, steps=7, cost=True)
        faster["metrics"]["train_images_per_second"] *= 3
        synthetic.write(tmp_path, [faster])
    assert budget.fit(config, limit, tmp_path, keep=True) == first
    other = budget.fit(suite.at_rate(config, 0.5).model_copy(update={"seed": 8}), limit, tmp_path)
    assert first is not None and other is not None and other.train.steps == first.train.steps
    more = budget.fit(config, suite.Budget(seconds=20), tmp_path)
    assert more is not None and more.train.steps > 5 * first.train.steps, "another budget is another question"
    (kept,) = (tmp_path / "budgets").iterdir()
    kept.write_text("{}")
    assert budget.fit(config, limit, tmp_path, keep=True) != first


def test_pictures_in_colour_cost_what_their_model_counts(tmp_path: Path) -> None:
    told = {"variant": "resnet", "data": {"name": "photos", "side": 8}, "model": TINY["model"], "device": "cpu"}
    config = experiment.resolve(RunConfig.model_validate(told | {"out": tmp_path}))
    prepared = experiment.prepare(config)
    model: Any = train.make_model(config, *prepared.shape, channels=3, classes=10)
    assert budget.flops_per_image(config) == 3 * model.flops()


def test_a_width_that_cannot_be_measured_does_not_fit(tmp_path: Path) -> None:
    def peak(run: RunConfig) -> int:
        if run.model.dim > 50:
            raise measure.ChildFailed("memory", "was ended by SIGKILL", [])
        return 1

    fitted = budget.fit(cell(tmp_path).config, suite.Budget(bytes=1000), tmp_path, peak=peak)
    assert fitted is not None and fitted.model.dim == 48


def test_equal_bytes_become_the_widest_model_that_fits(tmp_path: Path) -> None:
    config = cell(tmp_path).config
    fitted = budget.fit(config, suite.Budget(bytes=1000), tmp_path, peak=lambda run: run.model.dim * 10)
    assert fitted is not None and fitted.model.dim == 100
    assert fitted.model.dim % config.model.heads == 0
    narrow = budget.fit(config, suite.Budget(bytes=1), tmp_path, peak=lambda run: run.model.dim * 10)
    assert narrow is not None and narrow.model.dim == 4


def test_another_engine_is_a_function_over_cells(tmp_path: Path) -> None:
    """What the local engine promises to any: each cell once, outcomes as they come."""
    seen: list[int] = []

    def run_one(task: Task) -> Outcome:
        seen.append(task.cell.config.seed)
        return Outcome(task.cell, "ok", 0.0)

    def backwards(tasks: Iterable[Task], run: sweep.RunOne) -> Iterator[Outcome]:
        return (run(task) for task in reversed(list(tasks)))

    engines: list[sweep.Engine] = [sweep.local(1), sweep.local(3), backwards]
    for engine in engines:
        seen.clear()
        outcomes = list(engine([Task(cell(tmp_path, seed)) for seed in range(5)], run_one))
        assert sorted(seen) == [0, 1, 2, 3, 4]
        assert {outcome.status for outcome in outcomes} == {"ok"}


def test_declaring_twice_keeps_the_first_time(tmp_path: Path) -> None:
    whole = suite.load(written(tmp_path))
    path = sweep.declare(whole, tmp_path / "out")
    before = path.read_bytes()
    assert sweep.declare(whole, tmp_path / "out") == path
    assert path.read_bytes() == before
    changed = whole.model_copy(update={"question": "another?"})
    assert sweep.declare(changed, tmp_path / "out") != path


def test_an_engine_takes_a_cell_only_when_it_has_room(tmp_path: Path) -> None:
    """What it has not taken, another sweep on the same folder can claim."""
    taken: list[int] = []

    def tasks() -> Iterator[Task]:
        for seed in range(4):
            taken.append(seed)
            yield Task(cell(tmp_path, seed))

    outcomes = sweep.local(2)(tasks(), lambda task: Outcome(task.cell, "ok", 0.0))
    next(outcomes)
    assert taken == [0, 1]
    assert len(list(outcomes)) == 3


def test_the_board_counts_and_estimates() -> None:
    cells = [cell(Path("x"), seed) for seed in range(13)]
    shown = board.Board("t", 2, schedule.Schedule(tuple(cells[:3]), (), tuple(cells[3:]), 0))
    assert shown.left is None
    shown.watch(cells[3], "train 5")
    shown.end(Outcome(cells[3], "ok", 10.0))
    shown.end(Outcome(cells[4], "oom", 20.0))
    shown.end(Outcome(cells[5], "stopped", 20.0))
    assert (shown.done, shown.failed, shown.running) == (4, 1, {})
    assert shown.left == pytest.approx(8 * 15 / 2)


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Cells that end at once, as `status` says and by `count` of them, and what they were told; no report."""
    found: dict[str, Any] = {"status": "ok", "count": 0}

    def run_cell(task: Task, **told: Any) -> Outcome:
        found.update(told, count=found["count"] + 1)
        done = synthetic.one("dense1d", seed=task.cell.config.seed, status=found["status"])
        record.write(task.cell.config.out, done | {"id": record.identify(task.cell.config), "nth": found["count"]})
        return Outcome(task.cell, found["status"], 1.0)

    monkeypatch.setattr(sweep, "run_cell", run_cell)
    monkeypatch.setattr(sweep, "draw_fields", lambda out, names: None)
    monkeypatch.setattr(report, "write", lambda out, page: page)
    return found


def test_cells_at_a_time_share_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faked: dict[str, Any]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sweep, "threads", lambda: 7)
    assert swept(written(tmp_path), tmp_path / "a", "--jobs", "3") == 0
    assert faked["threads"] == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    faked.pop("threads")
    assert swept(written(tmp_path), tmp_path / "b", "--jobs", "3") == 0
    assert "threads" not in faked, "who sets it means it"


@pytest.mark.promise("cells")
@pytest.mark.parametrize("kind", ["crash", "timeout", "oom", "nan"])
def test_a_sweep_says_what_to_do_and_doing_it_runs_those_again_once(
    tmp_path: Path, faked: dict[str, Any], capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    name, out = written(tmp_path), tmp_path / "out"
    limits = ["--limits.memory", "1GB", "--limits.time", "1m"]
    faked["status"] = kind
    assert swept(name, out, *limits) == (0 if kind == "nan" else 1)
    said = [line for line in capsys.readouterr().out.splitlines() if "python -m attnbench.sweep" in line]
    assert len(said) == 1 and said[0].startswith("2 ")
    assert faked["count"] == 2
    assert swept(name, out, *limits) == (0 if kind == "nan" else 1)
    assert faked["count"] == 2, "not without being asked"
    words = shlex.split(said[0].partition("python -m attnbench.sweep ")[2].partition(" (")[0])
    capsys.readouterr()
    assert cli.command(sweep.main)(words) == (0 if kind == "nan" else 1)
    assert faked["count"] == (2 if kind == "nan" else 4), "a second failure is not run a third time"
    if kind in ("oom", "timeout"):
        assert faked["limits"].bytes == (2 if kind == "oom" else 1) * 10**9
        assert faked["limits"].seconds == (120 if kind == "timeout" else 60)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_watching_shows_what_others_run_ends_with_them_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faked: dict[str, Any]
) -> None:
    monkeypatch.setattr(board, "PERIOD", 0.02)
    boards: list[board.Board] = []

    def follow(shown: board.Board, *rest: Any) -> schedule.Schedule:
        boards.append(shown)
        return board.follow(shown, *rest)

    monkeypatch.setattr(sweep, "follow", follow)
    name, out = written(tmp_path), tmp_path / "out"
    whole = suite.load(name)
    config = sweep.SweepConfig(suite=name, out=out, device="cpu")
    cells = sweep.ledger(config, whole).stand().ready
    statuses: list[int] = []
    watcher = threading.Thread(target=lambda: statuses.append(swept(name, out, "--watch")))
    watcher.start()
    wait_for(lambda: boards and "nobody runs it" in boards[0].note)
    assert not out.exists()
    with Launcher(out, 2, beat=0.02) as launcher:
        for one in cells:
            assert launcher.acquire(record.identify(one.config)) is not None
            launcher.note(record.identify(one.config), "train 7")
        wait_for(lambda: boards[0].lines() == {board.title(one): "train 7" for one in cells})
        assert not boards[0].note and watcher.is_alive()
        for one in cells:
            record.write(out, synthetic.one("dense1d") | {"id": record.identify(one.config)})
            launcher.give_back(record.identify(one.config), 3.0)
    watcher.join(30)
    assert statuses == [0]
    assert (boards[0].done, boards[0].total) == (2, 2)
    before = contents(out)
    assert swept(name, out, "--watch") == 0
    assert contents(out) == before and before


def test_sweeps_beside_one_another_wait_for_what_the_other_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faked: dict[str, Any]
) -> None:
    monkeypatch.setattr(sweep, "POLL", 0.02)
    name, out = written(tmp_path), tmp_path / "out"
    first, second = sweep.ledger(sweep.SweepConfig(suite=name, out=out, device="cpu"), suite.load(name)).stand().ready
    statuses: list[int] = []
    with Launcher(out) as other:
        assert other.acquire(record.identify(first.config)) is not None
        beside = threading.Thread(target=lambda: statuses.append(swept(name, out)))
        beside.start()
        wait_for(lambda: record.find(out, record.identify(second.config)))
        time.sleep(0.1)
        assert beside.is_alive() and faked["count"] == 1
    beside.join(30)
    assert (statuses, faked["count"]) == ([0], 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["quik"],
        ["quick", "--jobs", "0"],
        ["quick", "--engine", "magic"],
        [],
        ["quick", "--oops"],
        ["quick", "--limits.memory", "much"],
        ["quick", "--limits.time", "soon"],
        ["quick", "--limits.time", "0s"],
        ["quick", "--retry", "nan"],
        ["quick", "--retries", "-1"],
    ],
)
def test_bad_input_is_refused_in_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.command(sweep.main)(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_an_unwritable_folder_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert swept("quick", tmp_path / "file" / "out") == 2
    assert capsys.readouterr().err.count("\n") == 1
