"""A full disk, a folder that may not be written to, a file in the way: at each place that writes, one line and no
half-written file. Every write goes through storage.py (a house rule); here it fails under the commands themselves."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from attnbench import (
    attention_map,
    catalogue,
    cli,
    cost,
    experiment,
    record,
    report,
    sample,
    scale,
    storage,
    suite,
    surgery,
    sweep,
    transfer,
)  # fmt: skip
from attnbench.config import RunConfig
from attnbench.errors import Refusal
from tests import killed
from tests import synthetic_records as synthetic

ROOT = Path(__file__).resolve().parent.parent


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Disk:
    """Full from the `full`-th write on; counts them."""

    def __init__(self, full: int | None) -> None:
        self.full, self.writes = full, 0

    def at(self, step: str) -> None:
        self.writes += step == "write"
        if step == "write" and self.full is not None and self.writes >= self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of a finished run of a dense model, with what it left."""
    out = tmp_path_factory.mktemp("trained")
    told = killed.SETTINGS | {"variant": "dense1d", "out": out, "train": {"steps": 2, "batch": 4}}
    return experiment.execute(experiment.resolve(RunConfig.model_validate(told)))


@pytest.mark.promise("disk")
def test_a_disk_that_fills_up_at_any_write_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, injected: Callable[[int], None]
) -> None:
    """What was written before stays and is whole; with room again the run goes on from there."""
    disk, full = Disk(None), 0
    monkeypatch.setattr(storage, "at", lambda step: disk.at(step))
    while True:
        full += 1
        disk = Disk(full)
        try:
            path = experiment.execute(killed.config(tmp_path))
        except Refusal as refusal:
            assert "No space left on device; free some space" in str(refusal) and "\n" not in str(refusal)
            assert not [name for name in tree(tmp_path) if name.endswith(".staged")]
            assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
            continue
        assert record.read(path)["status"] == "ok"
        break
    assert full > 5
    injected(full - 1)


def writers(run: Path) -> Iterator[tuple[str, Callable[[list[str] | None], int], list[str]]]:
    """Every command that writes, besides run, with arguments that take it there fast; OUT stands for the folder."""
    given = str(run)
    yield "report", report.main, [str(run.parent.parent), "--out", "OUT"]
    yield "sample", sample.main, [given, "--count", "1", "--out", "OUT/sample.png"]
    yield "surgery", surgery.main, [given, "--radii", "1", "--images", "2", "--out", "OUT"]
    yield "transfer", transfer.main, [given, "--sides", "3", "--images", "2", "--out", "OUT"]
    yield "catalogue", catalogue.main, ["--no-pictures", "--out", "OUT"]
    yield "scale", scale.main, ["dense1d", "--presets", "igpt-s", "--sides", "8", "--gpus", "1", "--out", "OUT/s.md"]
    yield "cost", cost.main, ["--variants", "dense1d", "--sides", "4", "--limit", "1e-3", "--out", "OUT"]
    yield "attention map", attention_map.main, [given, "--images", "2"]


NAMES = ["report", "sample", "surgery", "transfer", "catalogue", "scale", "cost", "attention map"]


@pytest.mark.promise("disk")
@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_under_each_command(
    name: str, run_of: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Full after the look whether anything can be written at all, which is when it hurts."""
    ((main, arguments),) = [(m, a) for n, m, a in writers(run_of) if n == name]
    before = tree(run_of.parent.parent)
    monkeypatch.setattr(storage, "at", Disk(1 if name in ("report", "catalogue", "scale", "attention map") else 2).at)
    assert cli.command(main)([a.replace("OUT", str(tmp_path / "out")) for a in arguments]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device; free some space" in said, said
    assert tree(tmp_path) == {} and tree(run_of.parent.parent) == before


@pytest.mark.promise("disk")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "attention map"])
def test_a_file_where_a_folder_should_be_under_each_command(
    name: str, run_of: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before anything is worked out, but for what takes no time."""
    ((main, arguments),) = [(m, a) for n, m, a in writers(run_of) if n == name]
    (tmp_path / "out").write_bytes(b"mine")
    assert cli.command(main)([a.replace("OUT", str(tmp_path / "out" / "below")) for a in arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "move what stands in the way" in said
    assert tree(tmp_path) == {"out": b"mine"}


def declare(folder: Path) -> None:
    sweep.declare(suite.load("quick"), folder)


def write_record(folder: Path) -> None:
    record.write(folder, synthetic.one("dense1d"))


def replace_record(folder: Path) -> None:
    record.write(folder, synthetic.one("dense1d"), replace=True)


@pytest.mark.promise("disk")
@pytest.mark.parametrize("step", storage.STEPS[:4])
@pytest.mark.parametrize("write", [declare, write_record, replace_record])
def test_what_a_sweep_writes_is_whole_or_absent(
    write: Callable[[Path], None], step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if write is replace_record:
        write_record(tmp_path)
    before = tree(tmp_path)

    def at(now: str) -> None:
        if now == step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage, "at", at)
    with pytest.raises(Refusal, match="free some space"):
        write(tmp_path)
    assert tree(tmp_path) == before


# --- what the system itself refuses, not a stand-in for it ------------------------------------------------------------

UNPRIVILEGED = """
import os, resource, sys
from pathlib import Path
from attnbench import storage
from attnbench.errors import Refusal
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
kind, folder = sys.argv[1], Path(sys.argv[2])
if kind == "large":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for write in (storage.write_bytes, storage.create_exclusive):
    try:
        write(folder / "file", b"new" * 1000)
    except Refusal as refusal:
        print(refusal)
if kind != "large":
    try:
        storage.check_writable(folder)
    except Refusal as refusal:
        print(refusal)
"""


@pytest.mark.promise("disk")
@pytest.mark.skipif(sys.platform == "win32", reason="needs Unix permissions")
@pytest.mark.parametrize(
    ("kind", "mode", "said"),
    [("read-only", 0o555, "Permission denied; choose a folder that you may write to"),
     ("closed", 0o000, "Permission denied; choose a folder that you may write to"),
     ("large", 0o777, "File too large; free some space")],
)  # fmt: skip
def test_the_system_refuses(kind: str, mode: int, said: str, open_folder: Path) -> None:
    """As a user without privileges, in a folder that is not theirs; and beyond the size that a file may have."""
    place = open_folder / "place"
    place.mkdir()
    place.chmod(mode)
    command = [sys.executable, "-c", UNPRIVILEGED, kind, str(place)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    place.chmod(0o755)
    lines = done.stdout.splitlines()
    assert len(lines) == (2 if kind == "large" else 3) and all(said in line for line in lines), done
    assert done.stderr == "" and list(place.iterdir()) == []


@pytest.fixture
def open_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that every user can reach, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        yield Path(place)


@pytest.mark.promise("disk")
def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(Refusal, match="move what stands in the way"):
        storage.write_bytes(tmp_path / "file", b"new")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
