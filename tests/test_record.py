"""Records: ids that last, no finished record lost, every damaged byte noticed."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import Field, create_model

from attnbench import experiment, record, storage
from attnbench.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from attnbench.errors import Refusal

PROJECT = Path(record.__file__).parent.parent


def example(id: str = "local2d-digits-s0-0123456789", status: str = "ok", **more: Any) -> dict[str, Any]:
    """A record of the usual kind: nested, with floats of many digits, exponents, nulls and other alphabets."""
    metrics = {"nats_per_token": 1.3567891234567891, "regret_nats_per_token": None, "steps": 600, "lr": 3e-05}
    nats = np.random.default_rng(0).gamma(2.0, 30.0, 50).tolist()
    return {"id": id, "status": status, "metrics": metrics, "per_image_nats": nats, "note": "Größe 8×8", **more}


# --- identity ---------------------------------------------------------------------------------------------------------


def test_id_says_what_it_is() -> None:
    assert record.identify(RunConfig(variant="local2d", seed=3)).startswith("local2d-digits-s3-")
    folder = RunConfig(data=DataConfig(name="folder:/home/someone/My Pictures"))
    assert record.identify(folder).startswith("dense1d-folder-my-pictures-s0-")


def test_id_is_the_same_every_time() -> None:
    """A literal: a change here renames every record there is, and must be meant (see record.ERA)."""
    assert record.identify(RunConfig()) == record.identify(
        RunConfig.model_validate(RunConfig().model_dump(mode="json"))
    )
    assert record.identify(RunConfig()) == "dense1d-digits-s0-3ddde6f2e3"


@pytest.mark.parametrize(
    "change",
    [
        {"variant": "linear"},
        {"seed": 1},
        {"position": "none"},
        {"data": DataConfig(name="photos")},
        {"data": DataConfig(side=4)},
        {"data": DataConfig(name="folder:/a/pictures")},
        {"data": DataConfig(name="folder:/b/pictures")},
        {"model": ModelConfig(options={"radius": 5})},
        {"model": ModelConfig(options={"radius": 6})},
        {"model": ModelConfig(objective="bert")},
        {"train": TrainConfig(steps=601)},
        {"train": TrainConfig(lr=3.0000001e-3)},
        {"device": "cpu"},
    ],
)
def test_a_different_setting_is_a_different_id(change: dict[str, Any]) -> None:
    base, other = record.identify(RunConfig()), record.identify(RunConfig(**change))
    assert base != other
    assert base.rpartition("-")[2] != other.rpartition("-")[2]


def test_where_it_is_written_is_not_identity() -> None:
    assert record.identify(RunConfig(out=Path("/elsewhere"), force=True)) == record.identify(RunConfig())


def test_a_run_told_what_it_would_have_untold_has_the_same_id() -> None:
    def named(**told: Any) -> str:
        return record.identify(experiment.resolve(RunConfig(variant="local2d", **told)))

    radii = {radius: named(model={"options": {"radius": radius}}) for radius in (2, 3)}
    assert named() == radii[3] == named(position="learned1d") != radii[2]
    assert named(position="learned2d") != named()


def test_a_new_setting_does_not_rename_old_records() -> None:
    data = create_model("Data", __base__=DataConfig, augment=(bool, False))
    extra: Any = {"limit": (int | None, None), "tags": (list[str], Field(default_factory=list)), "data": (data, data())}
    wider: Any = create_model("Wider", __base__=RunConfig, **extra)
    old = record.identify(RunConfig(seed=1))
    assert record.identify(wider(seed=1)) == old
    assert record.identify(wider(seed=1, limit=3)) != old
    assert record.identify(wider(seed=1, data={"augment": True})) != old


def test_another_default_variant_does_not_rename_old_records() -> None:
    other = create_model("Other", __base__=RunConfig, variant=(str, "linear"))
    assert record.identify(other(variant="dense1d")) == record.identify(RunConfig(variant="dense1d"))
    assert record.identify(other()) == record.identify(RunConfig(variant="linear"))


def test_an_era_renames_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    before = record.identify(RunConfig())
    monkeypatch.setattr(record, "ERA", record.ERA + 1)
    assert record.identify(RunConfig()) != before


# --- write, read, find ------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    path = record.write(tmp_path, example())
    assert path == tmp_path / "runs" / "local2d-digits-s0-0123456789.json"
    found = record.read(path)
    assert {key: found[key] for key in example()} == example()
    assert found == record.find(tmp_path, example()["id"])


def test_checksum_can_be_checked_by_anyone(tmp_path: Path) -> None:
    import hashlib

    found = json.loads(record.write(tmp_path, example()).read_text())
    claimed = found.pop("sha256")
    assert claimed == hashlib.sha256(json.dumps(found, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def test_what_json_does_not_have(tmp_path: Path) -> None:
    odd = {
        "nan": float("nan"),
        "inf": [np.float32("inf"), torch.tensor([1.0, float("-inf")])],
        "array": np.arange(3),
        "path": Path("a") / "b",
        "bool": np.bool_(True),
        "tuple": (1, 2.5),
        "config": TrainConfig(steps=7),
        3: "key",
    }
    path = record.write(tmp_path, example(odd=odd))
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()
    found = record.read(path)["odd"]
    assert found["nan"] is None and found["inf"] == [None, [1.0, None]] and found["array"] == [0, 1, 2]
    assert found["path"] == "a/b" and found["bool"] is True and found["tuple"] == [1, 2.5]
    assert found["config"]["steps"] == 7 and found["3"] == "key"
    with pytest.raises(TypeError, match="object"):
        record.write(tmp_path, example("other", odd=object()))


def test_a_finished_record_is_not_replaced(tmp_path: Path) -> None:
    path = record.write(tmp_path, example(seconds=1))
    before = path.read_bytes()
    for status in record.STATUSES:
        with pytest.raises(Refusal, match="--force"):
            record.write(tmp_path, example(status=status))
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_replaced_record_is_kept_aside(tmp_path: Path) -> None:
    for seconds in range(3):
        path = record.write(tmp_path, example(seconds=seconds), replace=True)
    assert record.read(path)["seconds"] == 2
    aside = path.parent / "superseded"
    kept = [record.read(aside / f"{path.stem}.{number}.json")["seconds"] for number in (1, 2)]
    assert kept == [0, 1]
    assert len(record.read_all(tmp_path)[0]) == 1


@pytest.mark.parametrize("status", ["oom", "nan", "timeout", "crash"])
def test_a_failure_may_be_followed_by_a_success(tmp_path: Path, status: str) -> None:
    record.write(tmp_path, example(status=status))
    assert record.find(tmp_path, example()["id"], status="ok") is None
    path = record.write(tmp_path, example())
    assert record.read(path)["status"] == "ok"
    assert record.read(path.parent / "superseded" / f"{path.stem}.1.json")["status"] == status


KILLED_AT = """
import os, signal, sys
from pathlib import Path
from attnbench import record, storage
step, left = sys.argv[2], int(sys.argv[3])
def at(now):
    global left
    left -= now == step
    if left == 0: os.kill(os.getpid(), signal.SIGKILL)
storage.at = at
record.write(Path(sys.argv[1]), {"id": "a", "status": "ok", "number": 2}, replace=True)
"""


@pytest.mark.promise("kill")
@pytest.mark.parametrize("step", storage.STEPS)
@pytest.mark.parametrize("time", [1, 2, 3])
def test_a_kill_while_replacing_loses_neither(tmp_path: Path, step: str, time: int) -> None:
    """Replacing is three writes (try to create, keep the old aside, write); killed at each step of each."""
    path = record.write(tmp_path, {"id": "a", "status": "ok", "number": 1})
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT, str(tmp_path), step, str(time)],
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        timeout=60,
    )
    # The first write does not come to "sync folder": it finds the file there already.
    assert done.returncode == (0 if (step, time) == ("sync folder", 3) else -signal.SIGKILL)
    records, problems = record.read_all(tmp_path)
    assert problems == [] and len(records) == 1
    if records[0]["number"] == 2:
        assert record.read(path.parent / "superseded" / "a.1.json")["number"] == 1


@pytest.mark.parametrize("id", ["../escape", "a/b", "/etc/passwd", "", ".", "a.json", "a\n"])
def test_an_id_cannot_leave_the_folder(tmp_path: Path, id: str) -> None:
    with pytest.raises(Refusal, match="id"):
        record.write(tmp_path / "out", example(id))
    with pytest.raises(Refusal, match="id"):
        record.find(tmp_path / "out", id)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_status_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fine"):
        record.write(tmp_path, example(status="fine"))


@pytest.mark.promise("disk")
def test_read_only_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Refusal, match="--out"):
        record.write(tmp_path / "file", example())
    assert record.read_all(tmp_path / "file") == ([], [])


# --- corruption -------------------------------------------------------------------------------------------------------


def damaged(data: bytes, random: random.Random) -> bytes:
    """One bit flipped, or the end cut off."""
    if random.random() < 0.3:
        return data[: random.randrange(len(data))]
    place = random.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << random.randrange(8))]) + data[place + 1 :]


@pytest.mark.promise("corruption")
@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.soak)])
def test_flips_and_truncations_are_found(tmp_path: Path, count: int, injected: Callable[[int], None]) -> None:
    injected(count)
    path = record.write(tmp_path, example())
    record.write(tmp_path, example("sound"))
    data = path.read_bytes()
    assert b"e-05" in data
    for seed in range(count):
        path.write_bytes(damaged(data, random.Random(seed)))
        with pytest.raises(record.Corrupt, match=path.name):
            record.read(path)
        records, problems = record.read_all(tmp_path)
        assert [found["id"] for found in records] == ["sound"]
        assert len(problems) == 1 and path.name in problems[0] and "\n" not in problems[0]
    path.write_bytes(data)
    assert record.read(path)["status"] == "ok"


@pytest.mark.promise("corruption")
def test_every_single_bit_counts(tmp_path: Path, injected: Callable[[int], None]) -> None:
    path = record.write(tmp_path, {"id": "a", "status": "ok", "é": [1e-05, 0.30000000000000004]})
    data = path.read_bytes()
    injected(len(data) * 8)
    for bit in range(len(data) * 8):
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ (1 << bit % 8)]) + data[bit // 8 + 1 :])
        with pytest.raises(record.Corrupt):
            record.read(path)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"id": "a"}', '{"id": "a", "x": NaN}', "[" * 100000, "\xff"])
def test_what_never_was_a_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(record.Corrupt, match=r"a\.json"):
        record.read(tmp_path / "a.json")


def test_a_record_under_another_name(tmp_path: Path) -> None:
    path = record.write(tmp_path, example())
    path.rename(path.with_name("other.json"))
    with pytest.raises(record.Corrupt, match="another file"):
        record.read(path.with_name("other.json"))


def test_a_damaged_record_is_named_skipped_and_kept(tmp_path: Path) -> None:
    path = record.write(tmp_path, example())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(UserWarning, match=path.name):
        assert record.find(tmp_path, path.stem) is None
    record.write(tmp_path, example())
    assert record.read(path)["status"] == "ok"
    assert (path.parent / "superseded" / f"{path.stem}.1.json").exists()


# --- environment ------------------------------------------------------------------------------------------------------


def test_environment() -> None:
    found = record.environment()
    assert found["packages"]["torch"] == torch.__version__ and found["packages"]["numpy"] == np.__version__
    assert found["threads"] == torch.get_num_threads() and found["cpu"]
    assert (found["gpu"] is not None) == torch.cuda.is_available()
    assert found["time"].endswith("+00:00")
    record.canonical(found)


def git(folder: Path, *arguments: str) -> str:
    author = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    command = ["git", "-C", str(folder), *author, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_and_dirt(tmp_path: Path) -> None:
    assert record._checkout(tmp_path) == (None, None)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.py").write_text("1")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "a")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert record._checkout(tmp_path) == (commit, False)
    (tmp_path / "results.csv").write_text("made by a run, not code")
    assert record._checkout(tmp_path) == (commit, False)
    (tmp_path / "models" / "a.py").write_text("2")
    assert record._checkout(tmp_path) == (commit, True)
    assert record._checkout(tmp_path / "models") == (None, None)


def test_command_tells_no_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--out", "/home/me/results", "--config=/home/me/a b.yaml", "--data", "folder:/home/me/cats", "--lr", "1/3"]
    monkeypatch.setattr(sys, "argv", ["/home/me/attnbench/run.py", *words])
    # A worker of a test runner is no module that was run; a command is.
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", importlib.util.find_spec("attnbench.run"))
    command = record._command()
    assert "/home" not in command and command.startswith("python -m ")
    assert command.endswith("--out results '--config=a b.yaml' --data folder:cats --lr 1/3")
