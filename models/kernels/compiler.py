"""From a C++ file beside this one to a loaded library: compiled once a machine, kept in a cache, in a few seconds.

The sources need neither torch's headers nor Python's, so a C++ compiler is all it takes.  A library's name is a hash of
its sources, the compiler, the flags and the processor: a home shared by machines never serves one the other's code.
Built in a folder of its own and renamed, so that processes which build at the same time never see half a file.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

HERE = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=gnu++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-w")
FUSED = "--param=avoid-fma-max-bits=0"
"""GCC, told that a processor is AMD's, fuses x·y + z in the widest vectors only: rounding would depend on the width."""
TRIED = (
    ("-march=native", "-fopenmp", FUSED), ("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"),
    ("-march=native",), ("-mcpu=native",),
)  # fmt: skip
"""Flags that not every compiler knows, the best first; without OpenMP a kernel runs on one thread."""
DTYPES = {torch.float32: "float32", torch.float64: "float64"}


class Unavailable(Exception):
    """Why there is no kernel here, in a line."""


@functools.cache
def missing(name: str) -> str | None:
    """Why the kernel cannot be had on this machine, or None if it can; compiles it where that was not yet done."""
    try:
        _library(name)
    except Unavailable as reason:
        return str(reason)
    return None


def reasons(name: str) -> list[str]:
    """`missing` as a list, which is empty where the kernel can be had."""
    return [reason for reason in [missing(name)] if reason]


def unfit(*tensors: Tensor) -> str | None:
    """Why a kernel cannot take these tensors, or None if it can."""
    for tensor in tensors:
        if tensor.device.type not in ("cpu", "meta"):
            return f"is for CPU, not {tensor.device.type}"
        if tensor.dtype not in DTYPES:
            return f"computes in float32 or float64, not {_name(tensor.dtype)}"
    if len(dtypes := {tensor.dtype for tensor in tensors}) > 1:
        return f"computes in one dtype, not in {' and '.join(sorted(map(_name, dtypes)))}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def call(name: str, function: str, shape: tuple[int, ...], number: float, *tensors: Tensor) -> None:
    """Runs `function` of the library on tensors (batch, heads, seq, dim) whose last stride is 1, of one dtype.

    Raises MemoryError where the kernel finds no memory to work in.
    """
    strides = [s for tensor in tensors for s in tensor.stride()[:3]]
    failed = entry(name, function, tensors[0].dtype)(
        (ctypes.c_int64 * len(shape))(*shape),
        ctypes.c_double(number),
        torch.get_num_threads(),
        (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors]),
        (ctypes.c_int64 * len(strides))(*strides),
    )
    if failed:
        raise MemoryError(f"not enough memory for the {function} kernel's working rows")


@functools.cache
def entry(name: str, function: str, dtype: torch.dtype) -> Callable[..., int]:
    """The library's `function` for that dtype, which returns other than 0 where it finds no memory to work in."""
    return cast(Callable[..., int], getattr(_library(name), f"{function}_{DTYPES[dtype]}"))


@functools.cache
def _library(name: str) -> ctypes.CDLL:
    if sys.platform == "win32":
        raise Unavailable("the kernels are not built on Windows")
    compiler = _compiler()
    sources = [HERE / f"{name}.cpp", *sorted(HERE.glob("*.h"))]
    parts = [
        *(source.read_text() for source in sources),
        _told(*compiler, "--version"),
        str((compiler[1:], FLAGS, TRIED)),
        _processor(),
    ]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    path = _cache() / f"{name}-{key}.so"
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # damaged: made again
            pass
    try:
        _build(compiler, sources[0], path)
    except OSError as error:
        raise Unavailable(f"{path.parent} cannot keep the compiled {name}: {error}; set XDG_CACHE_HOME") from None
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"the compiled {name} cannot be loaded: {error}") from None


def _compiler() -> list[str]:
    """The compiler's path, and the words that CXX has beside its name."""
    told = os.environ.get("CXX", "")
    try:
        wanted = shlex.split(told)
    except ValueError as error:
        raise Unavailable(f"CXX is no command, {told!r}: {error}") from None
    for name, *words in [wanted] if wanted else [[name] for name in COMPILERS]:
        if path := shutil.which(name):
            return [path, *words]
    looked = shlex.join(wanted) or ", ".join(COMPILERS)
    raise Unavailable(f"no C++ compiler found (looked for {looked}); install g++ or set CXX")


def _told(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the C++ compiler {command[0]} does not answer: {error}") from None


def _processor() -> str:
    """What decides which instructions -march=native means."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return "\n".join(line for line in lines if re.match(r"model|flags|Features|CPU (part|implementer)", line))
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"


@functools.cache
def _cache() -> Path:
    """A folder that is ours alone: of the user's cache, else one for this process."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnbench" / "kernels"
    try:
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
        if base.stat().st_uid == os.getuid() and os.access(base, os.W_OK | os.X_OK):
            return base
    except (OSError, RuntimeError):
        pass
    try:
        own = tempfile.TemporaryDirectory(prefix="attnbench-kernels-")
    except OSError as error:
        raise Unavailable(f"no folder can keep compiled kernels: {error}; set XDG_CACHE_HOME") from None
    _kept.append(own)  # lives as long as the process
    return Path(own.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


def _build(compiler: list[str], source: Path, path: Path) -> None:
    said, called = "", shlex.join(compiler)
    with tempfile.TemporaryDirectory(prefix="building-", dir=path.parent) as folder:
        made = Path(folder) / path.name
        for flags in TRIED:
            command = [*compiler, *FLAGS, *flags, "-o", str(made), str(source)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise Unavailable(f"the C++ compiler {called} failed: {error}") from None
            if done.returncode == 0:
                os.replace(made, path)
                return
            said = said or next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
    raise Unavailable(f"the C++ compiler {called} failed on {source.name}: {said.strip()}")
