"""Kernels where there is no compiler, or an odd one, and the cache of what was compiled."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from models import kernels
from models.geometry import Grid, Scan
from models.kernels import compiler
from models.local import Local2D
from models.mixer import Layer

needs_compiler = pytest.mark.skipif(kernels.missing("full") is not None, reason=str(kernels.missing("full")))
TINY = 'extern "C" int tiny_answer() { return 42; }\n'


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, nothing loaded, and a source that compiles at once."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "simd.h").write_text("")
    (sources / "tiny.cpp").write_text(TINY)
    monkeypatch.setattr(compiler, "HERE", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cached = (compiler.missing, compiler._library, compiler._cache)
    for function in cached:
        function.cache_clear()
    yield tmp_path / "cache" / "attnbench" / "kernels"
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize(
    ("told", "reason"), [("no-such-compiler", "no C\\+\\+ compiler found"), ("false", "failed on local2d.cpp")]
)
def test_without_a_compiler_auto_is_blocked_and_says_why(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, told: str, reason: str
) -> None:
    monkeypatch.setenv("CXX", told)
    (compiler.HERE / "local2d.cpp").write_text("int broken(")
    layer = Layer(Scan(Grid(3, 5)), 2, 4)
    mixer = Local2D(layer)
    assert mixer.backend == "blocked"
    with pytest.raises(ValueError, match=reason):
        Local2D(Layer(layer.scan, 2, 4, backend="compiled"))
    q, k, v = torch.randn(3, 1, 2, 15, 4, dtype=torch.float64)
    assert_close(mixer(q, k, v), mixer.oracle(q, k, v), rtol=1e-12, atol=1e-12)


@needs_compiler
def test_cxx_may_be_a_command_of_several_words(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = compiler._compiler()
    (compiler.HERE / "tiny.cpp").write_text(TINY.replace("42", "ANSWER"))
    for answer in (6, 7):
        monkeypatch.setenv("CXX", f"{path} -DANSWER={answer}")
        compiler._library.cache_clear()
        assert compiler._library("tiny").tiny_answer() == answer
    monkeypatch.setenv("CXX", " ")
    assert compiler._compiler() == [path]
    monkeypatch.setenv("CXX", "'g++")
    compiler._library.cache_clear()
    assert str(compiler.missing("tiny")).startswith('CXX is no command, "\'g++"')


@needs_compiler
@pytest.mark.parametrize("place", ["os.replace", "tempfile.TemporaryDirectory"])
def test_a_full_disk_is_a_reason_and_no_error(fresh: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def full(*given: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(place, full)
    reason = compiler.missing("tiny")
    assert reason is not None and re.search("No space left.*; set XDG_CACHE_HOME", reason)


@needs_compiler
def test_a_library_is_built_once_and_a_damaged_one_again(fresh: Path) -> None:
    assert compiler.missing("tiny") is None
    (built,) = fresh.glob("*.so")
    before = built.stat().st_mtime_ns
    compiler._library.cache_clear()
    assert compiler._library("tiny").tiny_answer() == 42
    assert built.stat().st_mtime_ns == before
    (compiler.HERE / "tiny.cpp").write_text(TINY.replace("42", "43"))
    compiler._library.cache_clear()
    assert compiler._library("tiny").tiny_answer() == 43
    (compiler.HERE / "tiny.cpp").write_text(TINY.replace("42", "44"))
    compiler._library.cache_clear()
    compiler._library("tiny")
    newest = max(fresh.glob("*.so"), key=lambda path: path.stat().st_mtime_ns)
    newest.unlink()  # never written over: this process has it mapped
    newest.write_bytes(b"cut short")
    (compiler.HERE / "tiny.cpp").write_text(TINY.replace("42", "44"))
    compiler._library.cache_clear()
    assert compiler._library("tiny").tiny_answer() == 44


@needs_compiler
def test_a_cache_that_cannot_be_written_is_replaced_for_the_process(fresh: Path) -> None:
    fresh.parent.parent.mkdir(parents=True, exist_ok=True)
    fresh.parent.write_text("a file where the folder should be")
    assert compiler._library("tiny").tiny_answer() == 42
    assert not fresh.exists()


@needs_compiler
def test_processes_that_build_at_the_same_time_all_get_a_whole_library(fresh: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from models.kernels import compiler;"
        "compiler.HERE = Path(sys.argv[1]); print(compiler._library('tiny').tiny_answer())"
    )
    command = [sys.executable, "-c", code, str(compiler.HERE)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
        for _ in range(3)
    ]  # fmt: skip
    assert [process.communicate(timeout=120)[0].strip() for process in running] == ["42"] * 3
    assert [path.suffix for path in fresh.iterdir()] == [".so"]
