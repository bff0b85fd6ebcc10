"""The main job, as a person calls it: one command, a record, pictures, a report; and what bad input gets."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import attnbench.run
from attnbench import cli, experiment, record
from attnbench.config import RunConfig

TINY = [
    "--train.steps",
    "6",
    "--train.batch",
    "8",
    "--train.validate-every",
    "3",
    "--train.warmup",
    "2",
    "--model.dim",
    "16",
    "--model.depth",
    "2",
    "--model.heads",
    "2",
    "--sample.count",
    "2",
    "--evaluate.images",
    "128",
    "--probe.images",
    "400",
]
FIRST = ("dense1d", "dense-none", "dense2d", "local1d", "local2d", "linear")


def run(*arguments: str, cwd: Path | None = None, tiny: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "attnbench.run", *(TINY if tiny else ()), *arguments]
    environment = os.environ | {"COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=cwd, env=environment)


def finished(done: subprocess.CompletedProcess[str], cwd: Path) -> dict[str, Any]:
    """The record whose path is the last line."""
    assert done.returncode == 0, done.stdout + done.stderr
    return record.read(cwd / done.stdout.splitlines()[-1])


def test_the_whole_job(tmp_path: Path) -> None:
    done = run("--variant", "local2d", cwd=tmp_path)
    found = finished(done, tmp_path)
    metrics = found["metrics"]
    assert found["status"] == "ok" and found["variant"] == "local2d" and found["family"] == "local"
    assert metrics["steps"] == 6
    assert 0 < metrics["nats_per_token"] < 3
    assert np.mean(found["per_image_nats"]) == pytest.approx(metrics["nats_per_token"])
    assert np.mean(found["nll_map"]) == pytest.approx(metrics["nats_per_token"])
    assert np.shape(found["nll_map"]) == (8, 8)
    assert metrics["bits_per_token"] == pytest.approx(metrics["nats_per_token"] / np.log(2))
    assert len(metrics["probe_accuracy"]) == 3
    assert metrics["probe_accuracy_best"] == max(metrics["probe_accuracy"]) > 0.15  # chance is 0.1
    assert metrics["parameters"] == 2 * (12 * 16**2 + 2 * 16) + 2 * 17 * 16 + 64 * 16 + 2 * 16
    assert 1e6 < metrics["train_peak_bytes"] < 1e9
    for rate in ("train", "eval", "sample"):
        spread = metrics["spread"][f"{rate}_images_per_second"]
        assert spread["low"] <= metrics[f"{rate}_images_per_second"] <= spread["high"]
    assert metrics["state_bytes_per_image"] > 0
    assert found["curves"]["validation_steps"] == [3, 6]
    for picture in ("samples", "completions"):
        (path,) = tmp_path.glob(f"results/artifacts/*/{picture}.png")
        assert Image.open(path).size[0] > 200
    assert (tmp_path / "results/report/index.html").stat().st_size > 1000
    assert "nats/token" in done.stdout and "samples.png" in done.stdout


def test_the_same_configuration_is_not_run_twice(tmp_path: Path) -> None:
    quick = ("--variant", "dense1d", "--no-measure", "--out", str(tmp_path))
    finished(run(*quick), tmp_path)
    (path,) = (tmp_path / "runs").glob("*.json")
    before = path.read_bytes()
    finished(run(*quick), tmp_path)
    assert path.read_bytes() == before
    finished(run(*quick, "--force"), tmp_path)
    assert path.read_bytes() != before
    assert len(list((tmp_path / "runs/superseded").glob("*.json"))) == 1


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("variant", FIRST)
def test_the_first_six_in_both_objectives(variant: str, objective: str, tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {
            "variant": variant, "out": tmp_path, "measure": False, "train": {"steps": 4, "batch": 8},
            "model": {"dim": 16, "depth": 2, "heads": 2, "objective": objective}, "sample": {"count": 1},
            "evaluate": {"images": 32}, "probe": {"images": 64},
        }
    )  # fmt: skip
    found = record.read(experiment.execute(experiment.resolve(config)))
    assert found["status"] == "ok"
    assert 0 < found["metrics"]["nats_per_token"] < 3


def test_photographs_with_a_palette(tmp_path: Path) -> None:
    done = run("--variant", "local2d", "--data", "photos", "--data.side", "16", "--data.colours", "512",
               "--no-measure", "--out", "o", cwd=tmp_path)  # fmt: skip
    found = finished(done, tmp_path)
    assert found["data"]["vocab"] == 512
    assert json.loads(next(tmp_path.glob("o/artifacts/*/tokeniser.json")).read_text())


def test_stopped_by_hand_it_resumes(tmp_path: Path) -> None:
    arguments = ["--variant", "dense1d", "--train.steps", "4000", "--train.checkpoint-every", "20", "--no-measure",
                 "--out", str(tmp_path)]  # fmt: skip
    command = [sys.executable, "-m", "attnbench.run", *TINY, *arguments]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("checkpoints/*/step-*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert said.strip().splitlines()[-1].endswith("the same command resumes")
    assert "Traceback" not in said
    (kept,) = sorted(tmp_path.glob("checkpoints/*/step-*"))[-1:]
    assert int(re.findall(r"step-(\d+)", kept.name)[0]) >= 20
    assert not list(tmp_path.glob("runs/*.json"))


BAD = {
    "unknown variant": (["--variant", "local2dd"], "did you mean 'local2d'"),
    "unknown flag": (["--trian.steps", "5"], "train.steps"),
    "negative steps": (["--train.steps", "-5"], "steps"),
    "heads": (["--model.dim", "10", "--model.heads", "3"], "does not divide"),
    "unknown data": (["--data", "digit"], "did you mean 'digits'"),
    "no pictures": (["--data", "folder:EMPTY"], "EMPTY"),
    "side too large": (["--data.side", "99"], "99"),
    "unknown option": (["--variant", "local2d", "--model.options.radios", "2"], "did you mean 'radius'"),
    "palette too large": (["--data.tokens", "palette", "--data.colours", "5000"], "5000"),
    "levels of colour": (["--data", "photos", "--data.tokens", "levels"], "palette or subpixel"),
    "sub-pixels of grey": (["--data.tokens", "subpixel"], "digits is grey"),
    "source of one colour": (["--data", "source:above", "--data.levels", "1"], "2 to 256"),
    "hub without owner": (["--data", "hub:cifar10"], "OWNER/NAME"),
    "own file missing": (["--variant", "nowhere:MyAttention"], "nowhere"),
}


def refused(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command leaves on stderr; its exit status is 2."""
    monkeypatch.chdir(folder)
    assert cli.command(attnbench.run.main)([*TINY, *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = BAD[case]
    (tmp_path / "EMPTY").mkdir()
    said = refused(tmp_path, monkeypatch, capsys, *arguments)
    assert words in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["EMPTY"]


def test_a_broken_picture_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(12):
            pixels = np.random.default_rng(index).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{index}.png")
    broken = tmp_path / "pictures" / "b" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    assert "3.png" in refused(tmp_path, monkeypatch, capsys, "--data", "folder:pictures")


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("--out", "file/below", cwd=tmp_path)
    assert done.returncode == 2
    assert "cannot write" in done.stderr and len(done.stderr.strip().splitlines()) == 1
