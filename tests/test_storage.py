"""Every write is whole or absent: an exception or SIGKILL at each step, full disks, folders that refuse."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from attnbench import storage
from attnbench.errors import Refusal

PROJECT = Path(storage.__file__).parent.parent
OLD, NEW = b"old" * 1000, b"new!" * 1000
BEFORE_RENAME = ("stage", "write", "sync", "rename")

KILLED_AT = """
import os, signal, sys
from pathlib import Path
from attnbench import storage
operation, step, path = sys.argv[1:]
def kill(): os.kill(os.getpid(), signal.SIGKILL)
def at(now):
    if now == step: kill()
real = os.write
def half(handle, data):
    real(handle, data[: len(data) // 2]); kill()
if step == "half":
    os.write = half
storage.at = at
getattr(storage, operation)(Path(path), b"new!" * 1000)
"""

WRITES_FOR_EVER = """
import sys
from pathlib import Path
from attnbench import storage
path, number = Path(sys.argv[1]), 0
while True:
    number += 1
    storage.write_bytes(path, f"{number}\\n".encode() * 2000)
    print(number, flush=True)
"""


def python(script: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", script, *arguments]


def child_environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(PROJECT)}


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    steps: list[str] = []
    monkeypatch.setattr(storage, "at", steps.append)
    return steps


@pytest.mark.parametrize("write", [storage.write_bytes, storage.create_exclusive])
def test_steps_come_in_their_order(tmp_path: Path, trace: list[str], write: Callable[[Path, bytes], object]) -> None:
    write(tmp_path / "a" / "b" / "file", NEW)
    assert tuple(trace) == storage.STEPS
    assert (tmp_path / "a" / "b" / "file").read_bytes() == NEW


def test_both_syncs_happen_and_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def noted_replace(source: Path, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    storage.write_bytes(tmp_path / "file", NEW)
    assert events == ["file", "rename", "folder"]


@pytest.mark.parametrize("old", [OLD, None])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.promise("disk")
@pytest.mark.parametrize("step", storage.STEPS)
def test_exception_at_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException, old: bytes | None
) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    monkeypatch.setattr(storage, "at", lambda now: failing(error)() if now == step else None)
    with pytest.raises(Refusal if isinstance(error, OSError) else type(error)):
        storage.write_bytes(path, NEW)
    assert content(path) == (old if step in BEFORE_RENAME else NEW)
    assert hidden(tmp_path) == []


@pytest.mark.promise("kill")
@pytest.mark.parametrize("old", [OLD, None])
@pytest.mark.parametrize("step", [*storage.STEPS, "half"])
def test_sigkill_at_a_step(tmp_path: Path, step: str, old: bytes | None) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    done = subprocess.run(python(KILLED_AT, "write_bytes", step, str(path)), env=child_environment(), timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert content(path) == (old if step in (*BEFORE_RENAME, "half") else NEW)
    storage.write_bytes(path, OLD)
    assert content(path) == OLD


@pytest.mark.promise("kill")
@pytest.mark.parametrize("step", [*storage.STEPS, "half"])
def test_sigkill_while_claiming(tmp_path: Path, step: str) -> None:
    path = tmp_path / "claim"
    done = subprocess.run(python(KILLED_AT, "create_exclusive", step, str(path)), env=child_environment(), timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert content(path) == (None if step in (*BEFORE_RENAME, "half") else NEW)


def random_kill(path: Path, seed: int) -> None:
    """Kill a process that writes without end, at a random moment; what it said it wrote is there, and whole."""
    command = python(WRITES_FOR_EVER, str(path))
    with subprocess.Popen(command, env=child_environment(), stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        said = [child.stdout.readline()]
        time.sleep(random.Random(seed).uniform(0, 0.03))
        child.kill()
        said += child.stdout.readlines()
    lines = path.read_text().splitlines()
    assert len(lines) == 2000 and len(set(lines)) == 1
    assert int(lines[0]) - len(said) in (0, 1)  # it may have died between writing and saying so


@pytest.mark.promise("kill")
@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.soak)])
def test_sigkill_at_random(tmp_path: Path, count: int, injected: Callable[[int], None]) -> None:
    injected(count)
    for seed in range(count):
        random_kill(tmp_path / "file", seed)


def test_one_of_many_creates(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        for round in range(20):
            path = tmp_path / f"claim{round}"
            claims = [f"owner {number}".encode() * 500 for number in range(16)]
            won = list(pool.map(lambda data, path=path: storage.create_exclusive(path, data), claims))
            assert sum(won) == 1
            assert path.read_bytes() == claims[won.index(True)]
    assert hidden(tmp_path) == []


def test_create_leaves_what_exists(tmp_path: Path) -> None:
    (tmp_path / "claim").write_bytes(OLD)
    assert not storage.create_exclusive(tmp_path / "claim", NEW)
    assert (tmp_path / "claim").read_bytes() == OLD
    assert hidden(tmp_path) == []


def test_create_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", failing(OSError(errno.EPERM, "Operation not permitted")))
    assert storage.create_exclusive(tmp_path / "claim", NEW)
    assert not storage.create_exclusive(tmp_path / "claim", OLD)
    assert (tmp_path / "claim").read_bytes() == NEW
    assert hidden(tmp_path) == []


def test_create_believes_the_link_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def answer_lost(*names: Path) -> None:
        link(*names)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", answer_lost)
    assert storage.create_exclusive(tmp_path / "claim", NEW)


REFUSALS = [(errno.ENOSPC, "free some space"), (errno.EROFS, "may write to"), (errno.EACCES, "may write to")]


@pytest.mark.promise("disk")
@pytest.mark.parametrize("operation", ["write_bytes", "create_exclusive", "check_writable"])
@pytest.mark.parametrize("call", ["open", "write", "fsync"])
@pytest.mark.parametrize(("code", "way_out"), REFUSALS)
def test_what_the_system_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, call: str, code: int, way_out: str
) -> None:
    arguments = [tmp_path] if operation == "check_writable" else [tmp_path / "file", NEW]
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(OSError(code, os.strerror(code))))
        with pytest.raises(Refusal) as refusal:
            getattr(storage, operation)(*arguments)
    message = str(refusal.value)
    assert str(arguments[0]) in message and os.strerror(code) in message and way_out in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:7]))
    assert storage.write_bytes(tmp_path / "file", NEW).read_bytes() == NEW


def test_check_writable_creates_nothing(tmp_path: Path) -> None:
    storage.check_writable(tmp_path / "not" / "there" / "yet")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.promise("disk")
@pytest.mark.parametrize("below", ["file", "file/folder", "file/folder/deeper", "dangling", "dangling/folder"])
def test_a_file_where_a_folder_should_be(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_bytes(OLD)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for attempt in (storage.check_writable, lambda folder: storage.write_bytes(folder / "x", NEW)):
        with pytest.raises(Refusal, match="move what stands in the way") as refusal:
            attempt(tmp_path / below)
        assert str(tmp_path / below) in str(refusal.value) and "\n" not in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]
    assert (tmp_path / "file").read_bytes() == OLD


@pytest.mark.promise("disk")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_file_system_that_takes_no_files() -> None:
    with pytest.raises(Refusal, match=re.escape("/proc/results")):
        storage.check_writable(Path("/proc/results"))


@pytest.mark.parametrize("name", ["new\nline", "nul\0"])
def test_odd_paths_are_refused_on_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(OLD)
    with pytest.raises(Refusal) as refusal:
        storage.write_bytes(tmp_path / "file" / name, NEW)
    assert len(str(refusal.value).splitlines()) == 1


def staged(folder: Path, name: str, age: float) -> Path:
    path = folder / name
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_only_what_the_dead_left_long_ago_is_swept(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    old, host = storage.STALE_SECONDS + 60, storage._HOST
    dead = staged(tmp_path, f".a.json.{host}.{child.pid}.0123abcd.staged", old)
    foreign = staged(tmp_path, ".a.json.another-host.1.0123abcd.staged", old)
    young = staged(tmp_path, f".b.json.{host}.{child.pid}.0123abcd.staged", 60)
    alive = staged(tmp_path, f".c.json.{host}.{os.getpid()}.0123abcd.staged", old)
    other = staged(tmp_path, ".hidden", old)
    storage.write_bytes(tmp_path / "file", NEW)
    assert not dead.exists() and not foreign.exists()
    assert young.exists() and alive.exists() and other.exists()


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        storage.write_json(tmp_path / "file.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []
    assert (
        storage.write_json(tmp_path / "file.json", {"é": [1, None]}).read_text() == '{\n "é": [\n  1,\n  null\n ]\n}\n'
    )
