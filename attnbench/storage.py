"""The one seam for every write: stage, write, sync, rename, sync the folder. A reader sees the old file or the new.

A file is written under a hidden name in its own folder, made durable, and only then given its name; a kill between any
two steps leaves the old file whole and at most one hidden file, which a later write sweeps away.
Tests replace `at` to raise, or to kill the process, at each of `STEPS`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from attnbench.errors import Refusal

STEPS = ("stage", "write", "sync", "rename", "sync folder", "done")
STALE_SECONDS = 3600.0
"""A staged file older than this, whose process is gone, is swept."""

_STAGED = re.compile(r"^\..*\.(?P<host>[A-Za-z0-9-]+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.staged$")
_HOST = re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname()) or "host"
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_swept: set[Path] = set()


def at(step: str) -> None:
    """Called just before each step with its name, and with "done" after the last; where tests inject faults."""


def write_bytes(path: Path, data: bytes) -> Path:
    """Give `path` the content `data`, whole or not at all, durable on return; makes missing folders.

    Raises Refusal, naming the path, the cause and the way out; then the old content stands and no staged file is left.
    """
    with _refusing(path), _staged(path, data) as staged:
        at("rename")
        os.replace(staged, path)
        _sync_folder(path.parent)
    return path


def write_text(path: Path, text: str) -> Path:
    """As `write_bytes`, of UTF-8."""
    return write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> Path:
    """As `write_bytes`, of readable JSON. Raises ValueError on NaN and infinity, which JSON does not have."""
    return write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def create_exclusive(path: Path, data: bytes) -> bool:
    """Create `path` with `data` unless it exists; True for the one caller, of any number on any machine, who made it.

    The file appears whole (it is staged, then linked). Without hard links it is created exclusively and
    then filled, so that a kill there may leave it short. Raises Refusal as `write_bytes` does.
    """
    with _refusing(path), _staged(path, data) as staged:
        at("rename")
        try:
            os.link(staged, path)
        except FileExistsError:
            # Over NFS a link that succeeded can be reported as failed; the link count tells.
            if os.stat(staged).st_nlink != 2:
                return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if not _create_in_place(path, data):
                return False
        _sync_folder(path.parent)
    return True


def remove(path: Path) -> None:
    """Delete a file that may already be gone. Raises Refusal where that is not allowed."""
    with _refusing(path):
        path.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise Refusal, in one line, where nothing could be written below `folder`; creates nothing that stays.

    A folder that does not exist yet is judged by the nearest one above it that does.
    """
    with _refusing(folder):
        existing = folder
        while not os.path.lexists(existing) and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{_shown(existing)} is not a folder")
        with _staged(existing / "writable", b"\0" * 4096):
            pass


def sweep(folder: Path) -> int:
    """Delete what dead processes left staged in `folder` more than STALE_SECONDS ago; the number deleted."""
    count = 0
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):
                if _abandoned(entry):
                    os.unlink(entry.path)
                    count += 1
    return count


def _abandoned(entry: os.DirEntry[str]) -> bool:
    """Whether a folder's entry is a staged file, old, and of a process that no longer runs (as far as can be seen)."""
    match = _STAGED.match(entry.name)
    if match is None or time.time() - entry.stat(follow_symlinks=False).st_mtime < STALE_SECONDS:
        return False
    return match["host"] != _HOST or not alive(int(match["pid"]))


def alive(pid: int) -> bool:
    """Whether a process of this machine runs (or is somebody else's)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def _staged(path: Path, data: bytes) -> Iterator[Path]:
    """A durable hidden file with `data` beside `path`; deleted on the way out unless it was renamed."""
    at("stage")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent not in _swept:  # once a folder and process: listing thousands of records is not free
        _swept.add(path.parent)
        sweep(path.parent)
    staged = path.parent / f".{path.name[:64]}.{_HOST}.{os.getpid()}.{secrets.token_hex(4)}.staged"
    handle = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _fill(handle, data)
        yield staged
        at("done")
    finally:
        with contextlib.suppress(OSError):
            os.unlink(staged)


def _fill(handle: int, data: bytes) -> None:
    """Write all of `data` through a file descriptor, force it to the disk, and close it whatever happens."""
    try:
        at("write")
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(handle, rest) :]
        at("sync")
        os.fsync(handle)
    finally:
        os.close(handle)


def _create_in_place(path: Path, data: bytes) -> bool:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        _fill(handle, data)
    except BaseException:
        os.unlink(path)
        raise
    return True


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Some network file systems cannot sync a folder, and say EINVAL; they order renames."""
    at("sync folder")
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses into the one line that a person reads."""
    try:
        yield
    except OSError as error:
        raise Refusal(f"cannot write {_shown(path)}: {error.strerror or error}; {_way_out(error.errno)}") from error
    except ValueError as error:  # a NUL character in the path
        raise Refusal(f"cannot write {_shown(path)}: {error}; choose another folder with --out") from error


def _way_out(code: int | None) -> str:
    if code in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return "free some space there or choose another folder with --out"
    if code in {errno.ENOTDIR, errno.EEXIST, errno.EISDIR}:
        return "move what stands in the way or choose another folder with --out"
    return "choose a folder that you may write to with --out"


def _shown(path: Path) -> str:
    """A path on one line, whatever characters it has."""
    text = str(path)
    return text if text.isprintable() else ascii(text)
