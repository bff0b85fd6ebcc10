"""A run from its configuration to its record: stopped late, forced, out of memory, and what it leaves beside itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import models
from attnbench import checkpoint, cli, experiment, probe, record, run, train, trained
from attnbench.config import RunConfig
from attnbench.errors import Refusal
from tests import killed

CLOCKS = {"seconds"}
"""Metrics that differ from run to run."""


def settings(out: Path, **told: Any) -> RunConfig:
    return experiment.resolve(RunConfig.model_validate(killed.SETTINGS | {"variant": "dense1d", "out": out} | told))


def digits(out: Path, **told: Any) -> RunConfig:
    """Of images that have classes to probe for."""
    return settings(out, data={"name": "digits"}, probe={"images": 50}, evaluate={"images": 20}, **told)


def figures(path: Path) -> dict[str, Any]:
    """What a record found out, but for clocks."""
    done = record.read(path)
    metrics = {key: value for key, value in done["metrics"].items() if key not in CLOCKS}
    return {key: done[key] for key in ("status", "curves", "per_image_nats", "nll_map")} | metrics


def steps_of(config: RunConfig) -> list[int]:
    """The steps that a run reports, which must end well."""
    seen: list[int] = []
    path = experiment.execute(config, lambda stage, step, loss: seen.append(step) if stage == "train" else None)
    assert record.read(path)["status"] == "ok"
    return seen


def fail(error: BaseException) -> Any:
    def raising(*_: Any, **__: Any) -> Any:
        raise error

    return raising


def test_a_run_stopped_while_it_is_probed_goes_on_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = experiment.execute(digits(tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(probe, "accuracies", fail(KeyboardInterrupt()))
        experiment.execute(digits(tmp_path))
    config = digits(tmp_path)
    assert steps_of(config) == []
    assert figures(tmp_path / "runs" / whole.name) == figures(whole)
    assert checkpoint.latest(experiment.checkpoints(config)) is None


def test_memory_that_does_not_suffice_after_training_loses_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(probe, "accuracies", fail(RuntimeError("CUDA out of memory")))
        path = experiment.execute(digits(tmp_path))
    assert record.read(path)["status"] == "oom"
    assert steps_of(digits(tmp_path)) == []


def test_a_model_that_does_not_fit_into_memory_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "make_model", fail(RuntimeError("DefaultCPUAllocator: can't allocate memory")))
    done = record.read(experiment.execute(settings(tmp_path)))
    assert (done["status"], done["backend"], done["variant"]) == ("oom", None, "dense1d")


def test_a_forced_run_begins_anew_and_the_same_command_resumes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, forced = digits(tmp_path), digits(tmp_path, force=True)
    first = steps_of(config)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(probe, "accuracies", fail(KeyboardInterrupt()))
        assert steps_of(forced) == first
    assert steps_of(forced) == []
    assert steps_of(forced) == first, "what is forced over the new record is another run"


@pytest.mark.parametrize("few", ["--probe.images 1", "--data folder:PICTURES"])
def test_a_probe_that_would_be_shown_one_class_is_refused_before_training(
    few: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The only picture of the second class falls to validation."""
    for number in range(60):
        (tmp_path / "PICTURES" / "ab"[number == 5]).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "PICTURES" / "ab"[number == 5] / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "fit", fail(AssertionError("it was trained")))
    assert cli.command(run.main)(f"{few} --no-measure --out OUT".split()) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "all of one class; raise --probe.images" in said
    assert not (tmp_path / "OUT").exists()


def test_a_finished_run_is_not_shown_for_other_pictures(tmp_path: Path) -> None:
    def pictures(seed: int) -> None:
        draw = np.random.default_rng(seed)
        for number in range(60):
            folder = tmp_path / "PICTURES" / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (4, 4), dtype=np.uint8)).save(folder / f"{number}.png")

    told = {"data": {"name": f"folder:{tmp_path / 'PICTURES'}", "tokens": "palette", "colours": 4}}
    pictures(0)
    path = experiment.execute(settings(tmp_path / "OUT", **told))
    done = record.read(path)
    assert experiment.execute(settings(tmp_path / "OUT", **told)) == path
    pictures(1)
    with pytest.raises(Refusal, match="is finished, but of other pictures"):
        experiment.execute(settings(tmp_path / "OUT", **told))
    again = record.read(experiment.execute(settings(tmp_path / "OUT", force=True, **told)))
    assert again["id"] == done["id"] and again["data"]["checksum"] != done["data"]["checksum"]


def test_weights_and_tokeniser_that_are_not_the_runs_are_refused(tmp_path: Path) -> None:
    one, other = (experiment.execute(settings(tmp_path, seed=seed)) for seed in (0, 1))
    places = [tmp_path / "artifacts" / path.stem for path in (one, other)]
    trained.load(one)
    for name in ("weights.safetensors", "tokeniser.json"):
        mine = (places[0] / name).read_bytes()
        (places[0] / name).write_bytes(mine + b" " if name.endswith("json") else (places[1] / name).read_bytes())
        with pytest.raises(Refusal, match=f"{name} is not the file that the run left; run it again"):
            trained.load(one)
        (places[0] / name).write_bytes(mine)
    done = record.read(one)
    del done["artifacts"]
    save_file(load_file(places[1] / "weights.safetensors"), places[0] / "weights.safetensors")
    record.write(tmp_path, done, replace=True)
    trained.load(one)  # an older record certifies nothing


ATTENTION = """import models
class Mine(models.VARIANTS["dense1d"].cls):
    "Somebody's own."
"""


def test_an_edited_attention_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, module = tmp_path / "edited_attention.py", "attnbench_own_edited_attention"
    name = f"{file}:Mine"

    def ran(source: str) -> Path:
        file.write_text(source)
        for known, key in ((models.VARIANTS, name), (sys.modules, module)):
            monkeypatch.setitem(known, key, None)  # so that it is forgotten afterwards too
            del known[key]
        return experiment.execute(settings(tmp_path / "r", variant=name))

    first = ran(ATTENTION)
    before = first.read_bytes(), record.read(first)["code"]
    assert ran(ATTENTION) == first and first.read_bytes() == before[0]
    second = ran(ATTENTION + "    scale = 2\n")
    assert second != first and first.read_bytes() == before[0]
    assert record.read(second)["code"] != before[1] and record.read(second)["config"] == record.read(first)["config"]
    with pytest.raises(Refusal, match="has been changed since this run was asked for"):
        settings(tmp_path, variant=name, code=before[1])
    trained.load(second, own=name)
    with pytest.warns(UserWarning, match=f"has been changed since {first.stem}"):
        assert record.identify(trained.load(first, own=name).config) == second.stem


def test_a_picture_model_of_colour_opens_again(tmp_path: Path) -> None:
    config = settings(
        tmp_path, variant="resnet", data={"name": "photos", "side": 8}, train={"steps": 1, "batch": 4},
        evaluate={"images": 4},
    )  # fmt: skip
    weights = trained.load(experiment.execute(config)).model().state_dict()
    assert 3 in {tensor.shape[1] for tensor in weights.values() if tensor.dim() == 4}
