"""Each way in which a cell can end, done to a real process: the record that stands then, and that the sweep goes on."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attnbench import attempt, checkpoint, experiment, record, sweep
from attnbench.attempt import LimitsConfig, Outcome, Task
from attnbench.cell import Order
from attnbench.claim import Launcher
from attnbench.config import RunConfig
from attnbench.suite import Cell
from tests import synthetic_records as synthetic

TINY: dict[str, Any] = {
    "model": {"dim": 16, "depth": 1, "heads": 2}, "train": {"steps": 2, "batch": 4}, "evaluate": {"images": 8},
    "probe": {"enabled": False}, "sample": {"count": 0}, "measure": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def cell(out: Path, **told: Any) -> Cell:
    config = RunConfig.model_validate(TINY | {"variant": "dense1d", "seed": 0, "out": out, "device": "cpu"} | told)
    return Cell(config=experiment.resolve(config), block="a", key="a/dense1d/")


def stand_in(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Another program in place of the cell's own."""
    monkeypatch.setattr(attempt, "COMMAND", (sys.executable, "-I", "-S", "-c", program))


def ended(out: Path, outcome: Outcome, status: str) -> dict[str, Any]:
    """The one record that stands after an outcome of that status."""
    assert outcome.status == status
    (done,) = record.read_all(out)[0]
    assert done["status"] == status
    assert done["tail"] == list(outcome.tail[: len(done["tail"])])
    return done


@pytest.mark.promise("cells")
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import ctypes; print('train 7', flush=True); ctypes.string_at(0)", "killed by signal 11 (SIGSEGV)"),
        ("import os; print('train 7', flush=True); os.kill(os.getpid(), 9)", "killed by signal 9 (SIGKILL)"),
        ("import os; print('train 7', flush=True); os.abort()", "killed by signal 6 (SIGABRT)"),
        ("print('train 7', flush=True); raise SystemExit('no luck')", "no luck"),
    ],
)
def test_a_cell_that_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, reason: str) -> None:
    stand_in(monkeypatch, program)
    lines: list[str] = []
    done = ended(tmp_path, attempt.run_cell(Task(cell(tmp_path)), lambda _, line: lines.append(line)), "crash")
    assert done["reason"] == reason
    assert done["tail"][0] == lines[0] == "train 7"


@pytest.mark.promise("cells")
def test_a_cell_that_takes_too_long_ends_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It will not listen, and has a process of its own that will not either."""
    deaf = "import signal, time; signal.signal(2, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    child = f"import subprocess, sys; c = subprocess.Popen([sys.executable, '-S', '-c', {deaf!r}]); print(c.pid)"
    stand_in(monkeypatch, f"{child}; {deaf}")
    monkeypatch.setattr(attempt, "GRACE", 0.2)
    began = time.monotonic()
    done = ended(tmp_path, attempt.run_cell(Task(cell(tmp_path)), limits=LimitsConfig(time="0.5s")), "timeout")
    assert time.monotonic() - began < 30
    assert done["reason"] == "took more than 0.5s"
    pid = next(int(line) for line in done["tail"] if line.isdigit())
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or zombie(pid))


@pytest.mark.promise("cells")
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no limit")
def test_a_cell_that_wants_too_much_memory(tmp_path: Path) -> None:
    """The real cell: the first batch alone needs a gigabyte of logits."""
    big = cell(tmp_path, train={"steps": 2, "batch": 512, "accumulate": 1}, model={"dim": 256, "depth": 4, "heads": 4})
    done = ended(tmp_path, attempt.run_cell(Task(big), limits=LimitsConfig(memory="100MB"), retries=3), "oom")
    assert "allocate memory" in done["reason"]
    assert done["backend"] is not None, "the cell itself wrote what it was"


@pytest.mark.promise("cells")
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no limit")
@pytest.mark.parametrize(("share", "status"), [(0.95, "oom"), (0.1, "crash")])
def test_a_kill_near_the_limit_of_memory_is_put_down_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, status: str
) -> None:
    program = f"""
import os, resource, time
limit = 400 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
held = bytearray(int({share} * limit) - 8 * 2**20)
time.sleep(0.5)
os.kill(os.getpid(), 9)
"""
    stand_in(monkeypatch, program)
    monkeypatch.setattr(attempt, "TICK", 0.05)
    done = ended(tmp_path, attempt.run_cell(Task(cell(tmp_path)), limits=LimitsConfig(memory="400MB")), status)
    assert "SIGKILL" in done["reason"]


@pytest.mark.promise("cells")
def test_a_kill_by_the_kernel_for_want_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel counts them; a real one would take this test along."""
    stand_in(monkeypatch, "import os; os.kill(os.getpid(), 9)")
    counts = iter((3, 4))
    monkeypatch.setattr(attempt, "_kernel_kills", lambda: next(counts))
    assert ended(tmp_path, attempt.run_cell(Task(cell(tmp_path))), "oom")["reason"].endswith("when memory was short")


@pytest.mark.promise("cells")
def test_a_loss_that_is_no_number_is_not_tried_again(tmp_path: Path) -> None:
    wild = cell(tmp_path, train={"steps": 30, "batch": 4, "lr": 1e38, "warmup": 0})
    lines: list[str] = []
    outcome = attempt.run_cell(Task(wild), lambda _, line: lines.append(line), retries=3)
    done = ended(tmp_path, outcome, "nan")
    assert "the loss is" in done["reason"] and done["tail"] == ["start 0"]
    assert lines.count("start 0") == 1


@pytest.mark.promise("cells")
@pytest.mark.parametrize(
    ("program", "retries", "tries", "status"),
    [
        ("os.kill(os.getpid(), 11)", 2, 3, "crash"),
        ("time.sleep(60)", 1, 2, "timeout"),
        ("sys.exit(2)", 2, 1, "crash"),
        ("sys.exit('MemoryError')", 2, 1, "oom"),
    ],
)
def test_what_is_worth_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, retries: int, tries: int, status: str
) -> None:
    stand_in(monkeypatch, f"import os, sys, time; open({str(tmp_path / 'tries')!r}, 'a').write('x'); {program}")
    limits = LimitsConfig(time="0.3s") if status == "timeout" else LimitsConfig()
    done = ended(tmp_path, attempt.run_cell(Task(cell(tmp_path)), limits=limits, retries=retries), status)
    assert len((tmp_path / "tries").read_text()) == done["tries"] == tries


def test_a_new_failure_is_not_taken_for_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = cell(tmp_path)
    record.write(tmp_path, synthetic.one("dense1d", status="oom") | {"id": record.identify(one.config)})
    stand_in(monkeypatch, "raise SystemExit('another end')")
    assert ended(tmp_path, attempt.run_cell(Task(one)), "crash")["reason"] == "another end"


def test_a_record_made_by_hand_in_the_meantime_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = cell(tmp_path)
    record.write(tmp_path, synthetic.one("dense1d") | {"id": record.identify(one.config)})
    before = record.read_all(tmp_path)
    stand_in(monkeypatch, "raise SystemExit('is finished already')")
    assert attempt.run_cell(Task(one)).status == "ok"
    assert record.read_all(tmp_path) == before


@pytest.mark.promise("sweeps")
def test_a_cell_whose_claim_is_lost_stops_and_nobody_writes_its_record(tmp_path: Path) -> None:
    """The real cell, which would train for hours; another launcher takes it over meanwhile, and saves later steps."""
    one = cell(tmp_path, train={"steps": 1_000_000, "batch": 4, "checkpoint_every": 1_000_000})
    name = record.identify(one.config)
    with Launcher(tmp_path) as mine:
        claim = mine.acquire(name)
        assert claim is not None

        def take_over(_: Cell, line: str) -> None:
            if line.startswith("train"):
                claim.path.with_name(f"{name}.{claim.number + 1}.json").touch()
                checkpoint.save(experiment.checkpoints(one.config), 999_999, {}, {})

        assert attempt.run_cell(Task(one, claim), take_over).status == "stopped"
    assert record.read_all(tmp_path) == ([], [])
    (kept,) = tmp_path.glob("checkpoints/*/*.safetensors")
    assert kept.name.startswith("step-00999999"), "the other one's"


@pytest.mark.promise("sweeps")
def test_a_failure_under_a_lost_claim_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = cell(tmp_path)
    name = record.identify(one.config)
    with Launcher(tmp_path) as mine:
        claim = mine.acquire(name)
        assert claim is not None
        taken = claim.path.with_name(f"{name}.{claim.number + 1}.json")
        stand_in(monkeypatch, f"open({str(taken)!r}, 'w'); import os; os.kill(os.getpid(), 11)")
        assert attempt.run_cell(Task(one, claim)).status == "stopped"
    assert record.read_all(tmp_path) == ([], [])


ORPHAN = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-m", "attnbench.cell"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         text=True, start_new_session=True)
child.stdin.write(sys.argv[1] + "\\n"); child.stdin.flush()
for line in child.stdout:
    if line.startswith("train"):
        print(child.pid, flush=True); os.kill(os.getpid(), 9)
"""


@pytest.mark.promise("kill")
def test_a_cell_ends_with_its_launcher(tmp_path: Path) -> None:
    order = Order(config=cell(tmp_path, train={"steps": 1_000_000, "batch": 4}).config)
    done = subprocess.run([sys.executable, "-c", ORPHAN, order.model_dump_json()], capture_output=True, text=True)
    pid = int(done.stdout)
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or zombie(pid))
    assert record.read_all(tmp_path) == ([], [])


@pytest.mark.promise("cells")
def test_stopping_lets_a_cell_save_and_no_other_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = tmp_path / "started"
    program = f"""
import signal, sys, time
def stop(*_): print("saved"); sys.exit(130)
signal.signal(2, stop)
open({str(started)!r}, "a").write("x")
time.sleep(60)
"""
    stand_in(monkeypatch, program)

    def tasks() -> Iterator[Task]:
        yield Task(cell(tmp_path))
        wait_for(lambda: started.exists() and started.read_text() == "x")
        raise KeyboardInterrupt

    seen: list[Outcome] = []

    def run_one(task: Task) -> Outcome:
        seen.append(attempt.run_cell(task, retries=3))
        return seen[-1]

    with pytest.raises(KeyboardInterrupt):
        list(sweep.local(2)(tasks(), run_one))
    assert [(one.status, one.tail) for one in seen] == [("stopped", ("saved",))]
    assert not attempt.stopping.is_set() and record.read_all(tmp_path) == ([], [])


@pytest.mark.parametrize(
    ("told", "seconds"), [("90s", 90.0), ("90", 90.0), ("30m", 1800.0), ("1.5h", 5400.0), ("1d", 86400.0)]
)
def test_times_are_read_as_people_write_them(told: str, seconds: float) -> None:
    assert LimitsConfig(time=told).seconds == seconds


def test_memory_is_read_as_people_write_it() -> None:
    assert [LimitsConfig(memory=told).bytes for told in ("4GB", "4GiB", "100")] == [4 * 10**9, 4 * 2**30, 100]


def wait_for(true: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def zombie(pid: int) -> bool:
    """Whether a process has ended and only waits for somebody to ask how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
