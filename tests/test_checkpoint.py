"""Checkpoints: exact round trips, every damaged byte noticed, the older one used instead, nothing unpickled."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench import checkpoint
from attnbench.errors import Refusal

PROJECT = Path(checkpoint.__file__).parent.parent
META: dict[str, Any] = {"best": float("inf"), "losses": [1.5, 0.1 + 0.2], "id": "dense1d-é", "none": None}


def example(seed: int = 0) -> dict[str, Tensor]:
    """Every kind of tensor that training keeps, and the awkward ones."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 6, generator=generator)
    return {
        "weight": weight,
        "transposed": weight.T,
        "row": weight[2],
        "same": weight,
        "low": weight.bfloat16(),
        "exact": weight.double(),
        "step": torch.tensor(7.0),
        "generator": torch.get_rng_state(),
        "mask": weight > 0,
        "empty": torch.empty(0, 3),
        "leaf": torch.nn.Parameter(weight.clone()),
        "odd": torch.tensor([float("nan"), float("-inf"), -0.0]),
    }


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        torch.testing.assert_close(tensor.detach(), right[name], rtol=0, atol=0, equal_nan=True)


def test_round_trip(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "run", 200, example(), META)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert path.name == f"step-00000200-{digest}.safetensors"
    found = checkpoint.latest(tmp_path / "run")
    assert found is not None and found.step == 200 and found.meta == META
    assert_same(example(), found.tensors)
    found.tensors["weight"].add_(1)  # it can be trained on


def test_same_content_is_the_same_file(tmp_path: Path) -> None:
    first = checkpoint.save(tmp_path, 1, example(), META)
    assert checkpoint.save(tmp_path, 1, example(), META) == first
    assert list(tmp_path.iterdir()) == [first]


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    paths = [checkpoint.save(tmp_path, step, example(step), {}) for step in (200, 400, 99_999_999, 100_000_000)]
    assert set(tmp_path.iterdir()) == set(paths[-2:])
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 100_000_000
    checkpoint.save(tmp_path, 100_000_001, example(), {}, keep=1)
    assert len(list(tmp_path.iterdir())) == 1
    checkpoint.clear(tmp_path)
    assert list(tmp_path.iterdir()) == [] and checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_a_run_started_anew_does_not_go_back_to_the_old_one(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 400, example(), {"run": "old"})
    checkpoint.save(tmp_path, 600, example(), {"run": "old"})
    checkpoint.save(tmp_path, 200, example(), {"run": "new"})
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 200 and found.meta == {"run": "new"}


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
    checkpoint.save(tmp_path, 200, example(), {"older": True})
    path = checkpoint.save(tmp_path, 400, example(), META)
    data = path.read_bytes()
    for seed in range(count):
        path.write_bytes(damaged(data, random.Random(seed)))
        with pytest.warns(UserWarning, match=path.name) as warned:
            found = checkpoint.latest(tmp_path)
        assert len(warned) == 1
        assert found is not None and found.step == 200 and found.meta == {"older": True}
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 400


def test_a_renamed_checkpoint_is_found(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 200, example(), {})
    path.rename(tmp_path / path.name.replace("200", "900"))
    with pytest.warns(UserWarning, match="renamed"):
        assert checkpoint.latest(tmp_path) is None


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "step-00000900-notes.txt").write_text("mine")
    (tmp_path / f"step-00000900-{'0' * 16}.safetensors").mkdir()
    checkpoint.save(tmp_path, 200, example(), {})
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 200
    assert (tmp_path / "step-00000900-notes.txt").read_text() == "mine"


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.promise("unpickled")
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_malicious_checkpoint_does_nothing(tmp_path: Path, form: str) -> None:
    """Even one whose name certifies its bytes is only ever read as safetensors."""
    mark, folder = tmp_path / "mark", tmp_path / "run"
    if form == "pickle":
        data = pickle.dumps(Bomb(mark))
    else:
        torch.save(Bomb(mark), tmp_path / "bomb")
        data = (tmp_path / "bomb").read_bytes()
    checkpoint.save(folder, 200, example(), {})
    name = f"step-00000900-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    (folder / name).write_bytes(data)
    with pytest.warns(UserWarning, match="not a checkpoint"):
        found = checkpoint.latest(folder)
    assert found is not None and found.step == 200
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # the bomb is a live one


@pytest.mark.parametrize("header", [b"", b"\0" * 8, b"\xff" * 8, b"\x02\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0[]"])
def test_certified_rubbish(tmp_path: Path, header: bytes) -> None:
    name = f"step-00000900-{hashlib.sha256(header).hexdigest()[:16]}.safetensors"
    (tmp_path / name).write_bytes(header)
    with pytest.warns(UserWarning, match=name):
        assert checkpoint.latest(tmp_path) is None


KILLED_AT = """
import os, signal, sys
from pathlib import Path
import torch
from attnbench import checkpoint, storage
def at(now):
    if now == os.environ["STEP"]: os.kill(os.getpid(), signal.SIGKILL)
storage.at = at
checkpoint.save(Path(sys.argv[1]), 400, {"weight": torch.ones(9)}, {})
"""


@pytest.mark.promise("kill")
@pytest.mark.parametrize("step", ["write", "rename", "done"])
def test_a_kill_while_saving_leaves_the_older_or_the_newer(tmp_path: Path, step: str) -> None:
    """The steps that differ for a checkpoint; tests/test_storage.py has them all, without the cost of loading torch."""
    checkpoint.save(tmp_path, 200, example(), {})
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "STEP": step}
    done = subprocess.run([sys.executable, "-c", KILLED_AT, str(tmp_path)], env=environment, timeout=120)
    assert done.returncode == -signal.SIGKILL
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == (400 if step == "done" else 200)


@pytest.mark.promise("disk")
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 200, example(), {})

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(Refusal, match="free some space"):
            checkpoint.save(tmp_path, 400, example(), {})
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 200
    assert len(list(tmp_path.iterdir())) == 1
