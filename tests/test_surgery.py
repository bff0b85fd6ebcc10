"""Trained weights under another mask, others' weights among them, and at another side: as the mathematics says."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from attnbench import cli, data, experiment, masked, record, surgery, trained, transfer
from attnbench.config import DataConfig, RunConfig
from attnbench.errors import Refusal
from models.geometry import Grid, Scan
from models.resize import load_resized


def settings(out: Path, **more: Any) -> RunConfig:
    told: dict[str, Any] = {
        "out": out, "measure": False, "probe": {"enabled": False}, "sample": {"count": 0},
        "model": {"dim": 16, "depth": 2, "heads": 2}, "evaluate": {"images": 30},
        "train": {"steps": 20, "batch": 8, "validation_images": 16, "validate_every": 10, "warmup": 2},
    }  # fmt: skip
    return experiment.resolve(RunConfig.model_validate(told | more))


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Paths of records by variant, each trained once; nobody may change their folder."""
    out = tmp_path_factory.mktemp("runs")
    return cache(lambda variant: experiment.execute(settings(out, variant=variant)))


def rows(path: str) -> list[dict[str, str]]:
    with Path(path).open() as file:
        return list(csv.DictReader(file))


def test_a_run_opens_as_it_was(run_of: Any) -> None:
    run = trained.load(run_of("dense1d"))
    tokens = run.images("test")
    config = run.config
    from attnbench.evaluate import likelihood

    assert likelihood(run.model(), tokens, config).recorded()["per_image_nats"] == run.record["per_image_nats"]


def test_a_window_of_the_whole_grid_costs_nothing_and_a_narrow_one_something(
    run_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_of("dense1d")
    assert surgery.main([str(path), "--radii", "1,3,8", "--out", str(tmp_path)]) == 0
    found = rows(capsys.readouterr().out.splitlines()[-1])
    assert [row["value"] for row in found] == ["1", "3", "8"]
    costs = [float(row["cost_nats_per_token"]) for row in found]
    assert abs(costs[2]) < 1e-5 < abs(costs[0])
    original = record.read(path)
    assert float(found[0]["uncut_nats_per_token"]) == pytest.approx(original["metrics"]["nats_per_token"])
    done, problems = record.read_all(tmp_path)
    assert not problems and len(done) == 3
    for cut in done:
        assert cut["surgery"]["source"] == original["id"] and cut["config"]["position"] == "learned1d"
        assert cut["id"] != record.identify(RunConfig.model_validate(cut["config"]))
        assert cut["surgery"]["cost_low"] <= cut["surgery"]["cost_nats_per_token"] <= cut["surgery"]["cost_high"]


def test_the_mask_is_the_window_and_the_weights_are_the_runs(run_of: Any) -> None:
    subject = masked.of_record(run_of("dense1d"))
    config = masked.masked(subject, "local2d", {"radius": 2}, finetune=0, lr=None)
    model: Any = subject.cut(config)
    assert {mixer.radius for mixer in model.mixers} == {2}
    weights = trained.load(run_of("dense1d")).weights
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_fine_tuning_lowers_the_cost_and_is_not_repeated(run_of: Any, tmp_path: Path) -> None:
    subject = masked.of_record(run_of("dense1d"))
    uncut = masked.uncut(subject, None)
    plain, tuned = (
        masked.operate(
            subject, masked.masked(subject, "local2d", {"radius": 1}, steps, 3e-3), 1, uncut, steps, tmp_path, False
        )
        for steps in (0, 30)
    )
    assert tuned["id"] != plain["id"] and tuned["metrics"]["steps"] == 30
    assert tuned["metrics"]["nats_per_token"] < plain["metrics"]["nats_per_token"]
    assert not list((tmp_path / "checkpoints").rglob("*.safetensors"))
    again = masked.masked(subject, "local2d", {"radius": 1}, 30, 3e-3)
    assert masked.operate(subject, again, 1, uncut, 30, tmp_path, False) == tuned


def imagegpt_folder(folder: Path, side: int = 8, colours: int = 6, clusters: int = 6) -> Path:
    """A folder such as save_pretrained writes, its weights random."""
    torch.manual_seed(0)
    model: Any = models.build("dense1d", height=side, width=side, vocab=colours, dim=12, depth=2, heads=2)
    tensors = {
        "transformer.wte.weight": torch.randn(colours + 1, 12), "transformer.wpe.weight": torch.randn(side**2, 12),
        "transformer.ln_f.weight": torch.ones(12), "lm_head.weight": torch.randn(colours, 12),
    }  # fmt: skip
    for index, block in enumerate(model.blocks):
        name = f"transformer.h.{index}."
        tensors |= {f"{name}ln_{norm}.weight": torch.ones(12) for norm in (1, 2)}
        for theirs, ours in (("attn.c_attn", block.attention.qkv), ("attn.c_proj", block.attention.out),
                             ("mlp.c_fc", block.mlp.up), ("mlp.c_proj", block.mlp.down)):  # fmt: skip
            tensors[f"{name}{theirs}.weight"] = torch.randn_like(ours.weight.T.contiguous())
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    told = {"model_type": "imagegpt", "vocab_size": colours + 1, "n_positions": side**2, "n_embd": 12, "n_layer": 2}
    (folder / "config.json").write_text(json.dumps(told | {"n_head": 2}))
    centres = np.random.default_rng(0).uniform(-1, 1, (clusters, 3)).tolist()
    (folder / "preprocessor_config.json").write_text(json.dumps({"clusters": centres}))
    return folder


def test_others_weights_under_any_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = imagegpt_folder(tmp_path / "theirs")
    base = ["--imagegpt", str(folder), "--images", "12", "--out", str(tmp_path / "out")]
    assert surgery.main([*base, "--radii", "1,8"]) == 0
    assert surgery.main([*base, "--variant", "local1d", "--option", "window", "--radii", "4"]) == 0
    assert surgery.main([*base, "--variant", "axial", "--option", ""]) == 0
    found = rows(capsys.readouterr().out.splitlines()[-1])
    assert [(row["variant"], row["value"]) for row in found] == [
        ("axial", ""), ("local1d", "4.0"), ("local2d", "1.0"), ("local2d", "8.0"),
    ]  # fmt: skip
    costs = [float(row["cost_nats_per_token"]) for row in found]
    assert abs(costs[3]) < 1e-5 and all(abs(cost) > 1e-3 for cost in costs[:3])
    done = record.read_all(tmp_path / "out")[0]
    assert {one["data"]["tokens"] for one in done} == {"palette"} and done[0]["data"]["vocab"] == 6


def test_their_colours_are_the_nearest_of_their_clusters(tmp_path: Path) -> None:
    folder = imagegpt_folder(tmp_path / "theirs")
    subject = masked.of_folder(folder, "photos")
    centres = np.asarray(json.loads((folder / "preprocessor_config.json").read_text())["clusters"])
    pixels = data.load(DataConfig(name="photos", side=8)).test.pixels[:5] / 127.5 - 1
    nearest = ((pixels[..., None, :] - centres) ** 2).sum(-1).argmin(-1)
    assert np.array_equal(subject.images("test")[:5].numpy(), nearest)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either"), (["RUN", "--imagegpt", "x"], "either"), (["RUN", "--data", "photos"], "own data"),
        (["RUN", "--radii", "1,x"], "whole numbers"), (["RUN", "--radii", "0"], "whole numbers"),
        (["RUN", "--variant", "linear"], "softmax"), (["RUN", "--variant", "lokal2d"], "did you mean"),
        (["RUN", "--option", "window"], "option"), (["LINEAR"], "softmax"), (["missing.json"], "cannot be read"),
        (["--imagegpt", "missing"], "cannot be read"), (["--imagegpt", "THEIRS", "--data", "digits"], "colour"),
        (["--imagegpt", "UNNAMED"], "clusters"), (["--imagegpt", "CUT"], "cut short"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    arguments: list[str], words: str, run_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = imagegpt_folder(tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-9])
    places = {
        "RUN": run_of("dense1d"), "LINEAR": run_of("linear"), "CUT": cut,
        "THEIRS": imagegpt_folder(tmp_path / "theirs"), "UNNAMED": imagegpt_folder(tmp_path / "other", clusters=5),
    }  # fmt: skip
    told = [str(places.get(word, word)) for word in arguments]
    assert cli.command(surgery.main)([*told, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.json"))


def test_damaged_leavings_are_named(tmp_path: Path) -> None:
    path = experiment.execute(settings(tmp_path, variant="dense1d", seed=3))
    place = tmp_path / "artifacts" / path.stem
    weights = (place / "weights.safetensors").read_bytes()
    (place / "weights.safetensors").write_bytes(weights[:-7])
    with pytest.raises(Refusal, match="damaged"):
        trained.load(path)
    older = {key: value for key, value in record.read(path).items() if key != "artifacts"}
    record.write(tmp_path, older, replace=True)
    tensors = load_file(save(place / "weights.safetensors", weights))
    save_file(tensors | {"start_token": torch.zeros(17)}, place / "weights.safetensors")
    with pytest.raises(Refusal, match="another shape"):
        trained.load(path).model()
    (place / "tokeniser.json").unlink()
    with pytest.raises(Refusal, match="lacks"):
        trained.load(path)


def save(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def afterwards(path: Path, out: Path) -> list[dict[str, Any]]:
    """What cutting and moving a run leave."""
    assert surgery.main([str(path), "--radii", "1", "--images", "4", "--out", str(out)]) == 0
    assert transfer.main([str(path), "--sides", "4", "--images", "4", "--out", str(out)]) == 0
    found = record.read_all(out)[0]
    assert len(found) == 2
    return found


def test_what_was_done_with_weights_is_done_again_with_those_of_another_run(run_of: Any, tmp_path: Path) -> None:
    """A run that was forced again has its id, and other weights; what older versions wrote does not know which."""
    path = Path(shutil.copytree(run_of("dense1d").parent.parent, tmp_path / "r")) / "runs" / run_of("dense1d").name
    first = afterwards(path, tmp_path / "out")
    assert afterwards(path, tmp_path / "out") == first
    assert [nats == round(nats, 6) for one in first for nats in one["per_image_nats"]] == [True] * 8
    again = record.read(path)
    again["metrics"]["seconds"] += 1
    record.write(tmp_path / "r", again, replace=True)
    second = afterwards(path, tmp_path / "out")
    assert [one["id"] for one in second] == [one["id"] for one in first]
    assert {one["source_sha256"] for one in second} == {record.read(path)["sha256"]} != {again["sha256"]}
    assert len(list((tmp_path / "out" / "runs" / "superseded").iterdir())) == 2
    for one in second:
        del one["source_sha256"]
        record.write(tmp_path / "out", one, replace=True)
    assert ["source_sha256" in one for one in afterwards(path, tmp_path / "out")] == [False] * 2


def test_others_weights_go_by_their_bytes(tmp_path: Path) -> None:
    folder = imagegpt_folder(tmp_path / "theirs")
    source = masked.of_folder(folder, "photos").source
    assert masked.of_folder(folder, "photos").source == source
    for name, old, new in (("model.safetensors", b"", b""), ("preprocessor_config.json", b"0.", b"1.")):
        content = (folder / name).read_bytes()
        changed = content.replace(old, new, 1) if old else content[:-1] + bytes([content[-1] ^ 1])
        (folder / name).write_bytes(changed)
        assert masked.of_folder(folder, "photos").source != source
        (folder / name).write_bytes(content)


# --- another side -----------------------------------------------------------------------------------------------------


def test_two_dimensional_positions_carry_over_and_tables_are_resized(
    run_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for variant, told in (("dense1d", "interpolated"), ("dense-rope2d", "carried over"), ("pixelcnn", "carried over")):
        path = run_of(variant)
        assert transfer.main([str(path), "--sides", "8,4", "--out", str(tmp_path)]) == 0
        found = rows(capsys.readouterr().out.splitlines()[-1])
        assert [(row["height"], row["tables"]) for row in found] == [("4", told), ("8", "carried over")]
        same = record.read(path)["metrics"]["nats_per_token"]
        assert float(found[1]["nats_per_token"]) == pytest.approx(same, abs=1e-6)
        assert math.isfinite(float(found[0]["nats_per_token"]))


def test_a_source_that_is_not_square_moves_to_squares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = {"name": "source:above", "height": 3, "width": 4, "count": 40}
    path = experiment.execute(settings(tmp_path, variant="dense-rope2d", data=told))
    assert transfer.main([str(path), "--sides", "5,2"]) == 0
    found = rows(capsys.readouterr().out.splitlines()[-1])
    assert [(row["trained_at"], row["height"], row["width"]) for row in found] == [("3×4", "2", "2"), ("3×4", "5", "5")]


@pytest.mark.parametrize("scan", ["raster", "column"])
def test_a_smooth_table_stays_smooth(scan: str) -> None:
    """A table that is linear in row and column is so at twice the side, at the same places of the picture."""
    shape: dict[str, Any] = {"vocab": 5, "dim": 8, "depth": 1, "heads": 2, "scan": scan}
    small: Any = models.build("dense1d", height=3, width=5, **shape)
    row, col = small.scan.target(torch.arange(15))
    with torch.no_grad():
        small.position.table.copy_((10 * row + col)[:, None].expand(-1, 8).float())
    large: Any = models.build("dense1d", height=6, width=10, **shape)
    assert load_resized(large, small.state_dict(), small.scan) == ["position.table"]
    row, col = large.scan.target(torch.arange(60))
    inside = (row > 0) & (row < 5) & (col > 0) & (col < 9)
    expected = 10 * ((row + 0.5) / 2 - 0.5) + (col + 0.5) / 2 - 0.5
    torch.testing.assert_close(large.position.table[inside, 0], expected[inside])


def test_rows_and_columns_are_resized_each_along_itself() -> None:
    shape: dict[str, Any] = {"vocab": 5, "dim": 8, "depth": 1, "heads": 2}
    small: Any = models.build("dense2d", height=4, width=4, **shape)
    large: Any = models.build("dense2d", height=4, width=8, **shape)
    assert load_resized(large, small.state_dict(), small.scan) == ["position.row", "position.col"]
    assert torch.equal(large.position.row, small.position.row)
    torch.testing.assert_close(large.position.col[0], small.position.col[0])
    torch.testing.assert_close(large.position.col[1], 0.75 * small.position.col[0] + 0.25 * small.position.col[1])


def test_weights_of_another_shape_are_refused_in_one_line() -> None:
    shape: dict[str, Any] = {"height": 3, "width": 5, "vocab": 5, "depth": 1, "heads": 2}
    other: Any = models.build("dense1d", dim=8, **shape)
    model: Any = models.build("dense1d", dim=16, **shape)
    with pytest.raises(ValueError, match="do not fit") as refused:
        load_resized(model, other.state_dict(), Scan(Grid(3, 5)))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("variant", "change", "words"),
    [
        ("dense1d", {}, r"position.table for 15 places wanted, and they have none"),
        ("dense1d", {"position.table": torch.zeros(16, 8)}, r"position.table for 15 .* \(16, 8\)"),
        ("dense2d", {"position.col": torch.zeros(5, 8)}, r"position.row for 3 places wanted, and they have none"),
    ],
)
def test_weights_without_the_table_of_their_grid_are_refused(
    variant: str, change: dict[str, torch.Tensor], words: str
) -> None:
    shape: dict[str, Any] = {"vocab": 5, "dim": 8, "depth": 1, "heads": 2}
    weights = models.build(variant, height=3, width=5, **shape).state_dict()
    foreign = {name: x for name, x in weights.items() if not name.startswith("position.")} | change
    model: Any = models.build(variant, height=6, width=10, **shape)
    with pytest.raises(ValueError, match=f"do not fit: {words}"):
        load_resized(model, foreign, Scan(Grid(3, 5)))


@pytest.mark.parametrize("one, other", [("raster", "hilbert"), ("column", "snake")])
def test_biases_by_offset_do_not_fit_where_offsets_are_others(one: str, other: str) -> None:
    shape: dict[str, Any] = {"vocab": 5, "dim": 8, "depth": 1, "heads": 2}
    small, model = (
        models.build("dense-relbias2d", height=s, width=s, scan=x, **shape) for s, x in ((3, one), (6, other))
    )
    with pytest.raises(ValueError, match=rf"biases by offset are of scan '{one}'.*, not of scan '{other}'"):
        load_resized(model, small.state_dict(), small.scan)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"objective 'ar', not of .* 'bert'"):
        bert: Any = models.build("dense-relbias2d", height=3, width=3, objective="bert", **shape)
        load_resized(bert, small.state_dict(), Scan(Grid(3, 3)))


def test_runs_without_likelihood_are_refused(run_of: Any, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no likelihood"):
        transfer.main([str(run_of("resnet")), "--sides", "4", "--out", str(tmp_path)])


def test_the_commands_start(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "attnbench.transfer", "missing.json", "--sides", "4"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
