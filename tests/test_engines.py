"""Cells on a Ray cluster of two nodes, one of which is killed, and under submitit; and where neither is there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from attnbench import engines, record, sweep
from attnbench.errors import Refusal


@dataclass(frozen=True)
class Task:
    """Stands for a cell: a name in a shared folder, and the seconds that its first try would take."""

    folder: Path
    name: str
    seconds: float = 0.0


def work(task: Task) -> str:
    """Notes the try; the first lasts, so that it can be killed, and a later one ends at once."""
    tries = task.folder / f"{task.name}-tries"
    first = not tries.exists()
    with tries.open("a") as file:
        file.write(f"{os.getpid()} {_node()}\n")
    if first:
        time.sleep(task.seconds)
    (task.folder / f"{task.name}-done").touch()
    return task.name


def fail(task: Task) -> str:
    raise ValueError(f"{task.name} cannot be")


def dies(task: Task) -> str:
    """Its worker dies at every try."""
    with (task.folder / f"{task.name}-tries").open("a") as file:
        file.write("once more\n")
    os.kill(os.getpid(), signal.SIGKILL)
    return ""


def _node() -> str:
    ray = sys.modules.get("ray")
    return str(ray.get_runtime_context().get_node_id()) if ray is not None and ray.is_initialized() else ""


def given_up(task: Task, reason: str) -> str:
    return f"{task.name} given up: {reason}"


def tries(task: Task) -> list[list[str]]:
    path = task.folder / f"{task.name}-tries"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(true: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes: the driver's own, whose one core is for what must not be lost, and one with the cores for tasks."""
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_health_check_failure_threshold", "2")
        patch.setenv("RAY_health_check_period_ms", "500")
        patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent))
        small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **small})
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        yield nodes
        ray.shutdown()
        nodes.shutdown()


@pytest.mark.timeout(180)
def test_ray_outlives_a_worker_and_a_node(cluster: Any, tmp_path: Path) -> None:
    """A task on each of two nodes; a worker is killed with -9, then the other node as a whole. Both end elsewhere."""
    node = cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    tasks = [Task(tmp_path, name, seconds=100.0) for name in ("a", "b")]
    found = engines.ray(0, given_up)([*tasks, Task(tmp_path, "c")], work)
    outcomes: list[str] = []
    thread = threading.Thread(target=lambda: outcomes.extend(found), daemon=True)
    thread.start()
    wait_for(lambda: all(tries(task) for task in tasks))
    here, there = sorted(tasks, key=lambda task: tries(task)[0][1] == node.node_id)
    assert tries(here)[0][1] != node.node_id and tries(there)[0][1] == node.node_id
    os.kill(int(tries(here)[0][0]), signal.SIGKILL)
    wait_for(lambda: len(tries(here)) == 2)
    cluster.remove_node(node, allow_graceful=False)
    thread.join(90)
    assert sorted(outcomes) == ["a", "b", "c"]
    assert len(tries(there)) == 2 and tries(there)[1][1] != node.node_id
    assert all((tmp_path / f"{name}-done").exists() for name in "abc")


@pytest.mark.timeout(120)
def test_ray_gives_up_what_cannot_be_saved(cluster: Any, tmp_path: Path) -> None:
    """A call that raises is not tried again; one that kills its worker is, RETRIES times. The others go on."""
    raised = list(engines.ray(0, given_up)([Task(tmp_path, "a")], fail))
    assert len(raised) == 1 and raised[0].startswith("a given up: ") and "ValueError" in raised[0]
    died = list(engines.ray(0, given_up)([Task(tmp_path, "b")], dies))
    assert died[0].startswith("b given up: WorkerCrashedError")
    assert len(tries(Task(tmp_path, "b"))) == 1 + engines.RETRIES


def test_ray_refuses_gpus_that_no_node_has(cluster: Any) -> None:
    with pytest.raises(Refusal, match="wants 1 GPU and the Ray cluster has 0"):
        engines.ray(1, given_up)


SUITE = """\
question: Does a cell run elsewhere?
blocks:
  - name: only
    variants: [dense1d]
    seeds: 1
    settings:
      data: {name: digits}
      model: {dim: 8, depth: 1, heads: 1}
      train: {steps: 2, batch: 4, warmup: 0, validation_images: 8}
      evaluate: {images: 8}
      probe: {enabled: false}
      sample: {count: 0}
      measure: false
"""


@pytest.mark.timeout(180)
def test_a_sweep_on_ray_leaves_records_in_the_shared_folder(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is named from where the sweep stands, which is not where its cells run."""
    monkeypatch.chdir(tmp_path)
    Path("suite.yaml").write_text(SUITE)
    assert sweep.main(["suite.yaml", "--engine", "ray", "--out", "results", "--device", "cpu"]) == 0
    (path,) = (tmp_path / "results" / "runs").glob("*.json")
    assert record.read(path)["status"] == "ok"


@pytest.mark.timeout(120)
def test_submitit_runs_every_task_and_gives_up_what_fails(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="needs the extra slurm")
    make = lambda: engines.slurm(2, 0, tmp_path / "slurm", {"partition": "x"}, given_up, "local")  # noqa: E731
    tasks = [Task(tmp_path, name) for name in "ab"]
    assert sorted(make()(tasks, work)) == ["a", "b"]
    assert all(len(tries(task)) == 1 for task in tasks)
    (said,) = make()([Task(tmp_path, "c")], fail)
    assert said.startswith("c given up: ") and "\n" not in said
    assert (tmp_path / "slurm").stat().st_mode & 0o077 == 0


def test_slurm_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="needs the extra slurm")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Refusal, match="needs sbatch"):
        engines.slurm(1, 0, tmp_path / "slurm", {}, given_up)
    assert not (tmp_path / "slurm").exists()


@pytest.mark.parametrize(("extra", "library"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_library_that_is_absent_is_named_with_its_extra(
    extra: str, library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(Refusal, match=rf"engine {extra} needs {library}: pip install 'attnbench\[{extra}\]'"):
        engines.ray(0, given_up) if extra == "ray" else engines.slurm(1, 0, tmp_path, {}, given_up)


def test_neither_library_is_imported_by_a_sweep_that_stays_here() -> None:
    code = (
        "import sys, attnbench.sweep, attnbench.engines; sys.exit(any(m in sys.modules for m in ('ray', 'submitit')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
