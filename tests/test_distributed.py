"""One run on several processes: gradients and losses of one, resuming on any number, worlds that are refused."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

import models
from attnbench import checkpoint, distributed, train
from attnbench.config import RunConfig
from attnbench.errors import Refusal
from attnbench.optimiser import make_optimiser
from tests import ranks

ROOT = Path(__file__).resolve().parent.parent
NAMED = ["dense1d", "local2d", "linear", "gla", "pixelcnn"]
MODES = ["ddp", "fsdp"]
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}


def learners() -> list[str]:
    """Every variant that learns a likelihood."""
    return [name for name, found in models.VARIANTS.items() if "ar" in found.objectives]


def settings(variant: str, parallel: str = "none", objective: str = "ar", **changes: object) -> dict[str, Any]:
    quick = {"steps": 10, "batch": 8, "validate_every": 2, "checkpoint_every": 4, "precision": "float32", "warmup": 3}
    return {
        "variant": variant, "device": "cpu", "parallel": parallel, "train": quick | changes,
        "model": {"dim": 16, "depth": 2, "heads": 2, "objective": objective},
    }  # fmt: skip


def torchrun(jobs: list[Any], folder: Path, processes: int = 2) -> None:
    """The jobs, by that many processes."""
    folder.mkdir(parents=True, exist_ok=True)
    told = folder / f"jobs-{processes}.json"
    told.write_text(json.dumps(jobs, default=str))
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "tests.ranks", told]
    run = subprocess.run(
        [sys.executable, "-m", *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[:4000]


def equal(one: Path, other: Path, **tolerance: Any) -> None:
    """The same tensors by the same names."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys() and a
    for name in a:
        assert_close({name: a[name]}, {name: b[name]}, **tolerance)


# --- N processes get what one gets ------------------------------------------------------------------------------------


def gradient_jobs(folder: Path, parallel: str) -> list[Any]:
    """A step of every variant, and of some with hidden pixels, in parts, and computed twice; unclipped."""
    told = [(name, settings(name, parallel, clip=1e9)) for name in learners()]
    for name in ("dense1d", "local2d", "linear"):
        told.append((f"{name}-bert", settings(name, parallel, "bert", clip=1e9, accumulate=2)))
        told.append((f"{name}-recomputed", settings(name, parallel, clip=1e9, accumulate=2, recompute=True)))
    return [["gradients", folder / name, config] for name, config in told]


@pytest.mark.parametrize("parallel", MODES)
def test_two_processes_get_the_gradients_of_one(parallel: str, tmp_path: Path) -> None:
    """Every variant; the sum over unequal numbers of hidden pixels; accumulation; recomputation."""
    torchrun(gradient_jobs(tmp_path / "two", parallel), tmp_path)
    ranks.main(gradient_jobs(tmp_path / "one", "none"))
    done = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(done) == len(learners()) + 6
    for name in done:
        files = [tmp_path / folder / name / "gradients.safetensors" for folder in ("one", "two")]
        equal(*files, rtol=1e-5, atol=1e-7)


def curves(folder: Path) -> Tensor:
    told = json.loads((folder / "progress.json").read_text())
    return torch.tensor(told["curves"]["loss"] + told["curves"]["validation"])


def test_two_processes_get_the_losses_of_one(tmp_path: Path) -> None:
    """Over a whole run, validation on a number of images that two cannot share evenly.

    At a rate of 3e-3 these steps make 2e-3 nats of a rounding error of 6e-8 in gla's gradients, also on one process.
    """
    torchrun([["fit", tmp_path / p / name, settings(name, p, lr=3e-4)] for p in MODES for name in NAMED], tmp_path)
    ranks.main([["fit", tmp_path / "none" / name, settings(name, lr=3e-4)] for name in NAMED])
    for name in NAMED:
        one = curves(tmp_path / "none" / name)
        assert len(one) == 6 and one[0] != one[-1]
        for parallel in MODES:
            assert_close(curves(tmp_path / parallel / name), one, **CLOSE)


def test_the_comparison_notices_processes_that_see_the_same(tmp_path: Path) -> None:
    """What two would learn if both took the first half of the batch is far from what one learns."""
    config = settings("dense1d", clip=1e9)
    ranks.main([["gradients", tmp_path / "whole", config]])
    ranks.main([["gradients", tmp_path / "half", settings("dense1d", clip=1e9, batch=4)]])
    with pytest.raises(AssertionError):
        equal(tmp_path / "whole" / "gradients.safetensors", tmp_path / "half" / "gradients.safetensors", **CLOSE)


def test_no_two_processes_hide_equally_many_pixels() -> None:
    """Else the test above would not notice a mean of means."""
    counts = [int(half.sum()) for half in train.hidden_pixels((8, ranks.HEIGHT, ranks.WIDTH), 0, 3).chunk(2)]
    assert counts[0] != counts[1]


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.promise("resume")
@pytest.mark.parametrize("parallel", MODES)
def test_resumes_bit_for_bit_on_as_many_and_in_value_on_another_number(parallel: str, tmp_path: Path) -> None:
    """Ctrl-C comes to one process in the middle of step 7: all stop after it and the first leaves a checkpoint."""
    told, alone = settings("dense1d", parallel), settings("dense1d")
    folders = {name: tmp_path / name for name in ("whole", "again", "fewer", "more")}
    jobs = [["fit", folders["whole"], told], *(["fit", folders[f], told, 6] for f in ("again", "fewer"))]
    torchrun(jobs, tmp_path)
    for folder in (folders["again"], folders["fewer"]):
        found = checkpoint.latest(folder / "checkpoints")
        assert found is not None and found.step == 7 and not (folder / "progress.json").exists()
    ranks.main([["fit", folders["more"], alone, 6]])
    # A checkpoint of shares is that of one process, by name and shape, so that any number of processes reads it.
    shares, one = (checkpoint.latest(folders[f] / "checkpoints") for f in ("fewer", "more"))
    assert shares is not None and one is not None
    assert {n: t.shape for n, t in shares.tensors.items()} == {n: t.shape for n, t in one.tensors.items()}
    torchrun([["fit", folders["again"], told], ["fit", folders["more"], told]], tmp_path / "second")
    ranks.main([["fit", folders["fewer"], alone]])
    equal(folders["whole"] / "weights.safetensors", folders["again"] / "weights.safetensors", rtol=0.0, atol=0.0)
    for other in ("fewer", "more"):
        assert_close(curves(folders[other]), curves(folders["whole"]), **CLOSE)
        steps = json.loads((folders[other] / "progress.json").read_text())["curves"]["validation_steps"]
        assert steps == [2, 4, 6, 8, 10]


def test_ctrl_c_waits_for_the_end_of_the_step(tmp_path: Path) -> None:
    """So that what is saved is no step half done: resumed, it is bit for bit the run that nobody stopped."""
    told = settings("dense1d")
    ranks.main(
        [["fit", tmp_path / "whole", told], ["fit", tmp_path / "parts", told, 6], ["fit", tmp_path / "parts", told]]
    )
    equal(tmp_path / "whole" / "weights.safetensors", tmp_path / "parts" / "weights.safetensors", rtol=0.0, atol=0.0)


def test_a_second_ctrl_c_ends_a_lone_process_at_once() -> None:
    with pytest.raises(SystemExit, match="130"), distributed.Interrupt():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


# --- recomputation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", NAMED[:4])
def test_recomputation_changes_no_bit(variant: str, tmp_path: Path) -> None:
    jobs = [["gradients", tmp_path / str(again), settings(variant, recompute=again)] for again in (False, True)]
    ranks.main(jobs)
    equal(*(tmp_path / folder / "gradients.safetensors" for folder in ("False", "True")), rtol=0.0, atol=0.0)


def test_recomputation_computes_again() -> None:
    """Each block runs twice in a step, and once where there is no backward pass."""
    for again, runs in ((False, 2), (True, 4)):
        config = RunConfig.model_validate(settings("dense1d", recompute=again))
        model: Any = ranks.model_of(config)
        seen: list[int] = []
        for block in model.blocks:
            block.attention.mixer.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        train.train_step(model, make_optimiser(model, config), ranks.images()[:8], 0, config)
        assert len(seen) == runs
        with torch.no_grad():
            model(ranks.images()[:8])
        assert len(seen) == runs + 2


def test_recomputation_of_what_has_no_blocks_is_refused() -> None:
    with pytest.raises(Refusal, match="pixelcnn has no blocks"):
        ranks.model_of(RunConfig.model_validate(settings("pixelcnn", recompute=True)))


# --- one command ------------------------------------------------------------------------------------------------------

RUN = [
    "-m", "attnbench.run", "--device", "cpu", "--train.steps", "10", "--train.batch", "8", "--model.dim", "16",
    "--model.depth", "1", "--model.heads", "2", "--evaluate.images", "200", "--probe.images", "100", "--sample.count",
    "1", "--no-measure",
]  # fmt: skip


def run(*arguments: str | Path, **told: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in distributed.TOLD}
    command = (
        [sys.executable, "-m", *map(str, arguments)] if arguments[0] != "-m" else [sys.executable, *map(str, arguments)]
    )
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=clean | {"OMP_NUM_THREADS": "1"} | told
    )


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.soak)])
def test_torchrun_leaves_one_record_that_tells_its_world(parallel: str, tmp_path: Path) -> None:
    out = run(
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *RUN,
        "--parallel",
        parallel,
        "--out",
        tmp_path,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    (path,) = (tmp_path / "runs").glob("*.json")
    assert out.stdout.splitlines()[-1] == str(path) and out.stdout.count(str(path)) == 1
    record = json.loads(path.read_text())
    assert record["status"] == "ok" and len(record["metrics"]["probe_accuracy"]) == 2
    assert (record["environment"]["parallel"], record["environment"]["processes"]) == (parallel, 2)
    assert len(record["per_image_nats"]) == 200 and min(record["per_image_nats"]) > 0
    alone = run(*RUN, "--out", tmp_path / "alone")
    one = json.loads(Path(alone.stdout.splitlines()[-1]).read_text())
    assert one["id"] == record["id"] and one["environment"]["processes"] == 1
    assert record["per_image_nats"] == pytest.approx(one["per_image_nats"], rel=1e-4)


def port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


WORLD = {
    "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29511",
}  # fmt: skip
REFUSED: list[tuple[dict[str, str | None], list[str], str]] = [
    (dict.fromkeys(WORLD) | {"WORLD_SIZE": "2"}, [], "WORLD_SIZE is set but not RANK, LOCAL_RANK"),
    ({"MASTER_ADDR": None}, [], "but not MASTER_ADDR"),
    ({"RANK": "2"}, [], "RANK 2 is not one of WORLD_SIZE 2"),
    ({"RANK": "one"}, [], "only whole numbers"),
    ({"LOCAL_RANK": "2"}, [], "LOCAL_RANK 2 of LOCAL_WORLD_SIZE 2"),
    ({"LOCAL_WORLD_SIZE": "3"}, [], "LOCAL_WORLD_SIZE 3"),
    ({}, ["--train.batch", "9"], "batch 9 cannot be shared by 2 processes"),
    ({}, ["--train.batch", "6", "--train.accumulate", "2"], "choose a multiple of 4"),
    ({}, ["--parallel", "none"], "parallel none, but there are 2 processes"),
    (dict.fromkeys(WORLD), ["--parallel", "fsdp"], "needs torchrun"),
    (dict.fromkeys(WORLD) | {"SLURM_STEP_NUM_TASKS": "4"}, [], "4 processes were started that know nothing"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "arguments", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_world_that_cannot_be_is_refused(
    changed: dict[str, str | None], arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (WORLD | changed).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    parallel = arguments[1] if "--parallel" in arguments else distributed.resolve("auto")
    sizes: dict[str, Any] = {
        a.removeprefix("--train."): int(b) for a, b in zip(arguments[::2], arguments[1::2], strict=True) if "." in a
    }
    with (
        pytest.raises(Refusal, match=words),
        distributed.world(RunConfig.model_validate(settings("dense1d", parallel, **sizes))),
    ):
        pass


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WORLD.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = RunConfig.model_validate(settings("dense1d", "ddp") | {"device": "cuda"})
    with pytest.raises(Refusal, match="2 processes but 1 GPUs"), distributed.world(config):
        pass


def test_the_command_refuses_in_one_line_and_writes_nothing(tmp_path: Path) -> None:
    out = run(*RUN, "--out", tmp_path / "results", WORLD_SIZE="2")
    assert out.returncode == 2 and len(out.stderr.splitlines()) == 1 and "WORLD_SIZE is set" in out.stderr
    assert not (tmp_path / "results").exists()


def test_a_process_that_never_comes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (WORLD | {"MASTER_PORT": port()}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "PATIENCE", timedelta(seconds=2))
    with (
        pytest.raises(Refusal, match="did not all meet"),
        distributed.world(RunConfig.model_validate(settings("dense1d", "ddp"))),
    ):
        pass
    assert not torch.distributed.is_initialized()


def test_processes_with_other_settings_are_refused(tmp_path: Path) -> None:
    """Each is started by hand with its own seed; both say which one differs."""
    world, started = WORLD | {"MASTER_PORT": port()}, time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, *RUN, "--seed", str(number), "--out", tmp_path / "results"], cwd=ROOT, text=True,
            stderr=subprocess.PIPE, env=os.environ | world | {"RANK": str(number), "LOCAL_RANK": str(number)},
        )
        for number in range(2)
    ]  # fmt: skip
    for process in processes:
        _, said = process.communicate(timeout=100)
        assert process.returncode == 2 and "process 1 has other settings" in said, said
    assert not (tmp_path / "results").exists() and time.monotonic() - started < 100
