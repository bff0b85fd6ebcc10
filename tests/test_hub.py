"""Data sets of the hub: a copy of CIFAR-10's layout end to end, the hub itself as far as a stand-in answers like it,
and what cannot be had refused in one line and at once."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attnbench import cli, experiment, hub, record, run, trained
from attnbench.config import DataConfig, RunConfig
from attnbench.data import Dataset, load
from attnbench.errors import Refusal
from tests import fake_hub

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="needs datasets (extra test or hub)"
)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(count: int, seed: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8))


def write(path: Path, images: list[bytes], labels: list[int] | list[str] | None = None, typed: bool = True) -> Path:
    """A parquet file as the hub has CIFAR-10's; not typed: one that says nothing of what its columns are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns: dict[str, Any] = {
        "img": pa.array([{"bytes": b, "path": f"{i}.png"} for i, b in enumerate(images)], struct)
    }
    features: dict[str, Any] = {"img": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pa.array(labels)
        features["label"] = {"names": CLASSES, "_type": "ClassLabel"}
    table = pa.table(columns)
    if typed:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository; what the library writes goes beside it."""
    datasets = pytest.importorskip("datasets", reason="needs datasets (extra test or hub)")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "copy").mkdir()
    return tmp_path / "copy"


def cifar(folder: Path, counts: dict[str, int] | None = None, typed: bool = True) -> Path:
    """Splits of so many pictures, by default 300 to train and 40 to test."""
    for seed, (split, count) in enumerate((counts or {"train": 300, "test": 40}).items()):
        images = [png(pixels) for pixels in pictures(count, seed)]
        path = folder / "plain_text" / f"{split}-00000-of-00001.parquet"
        write(path, images, [i % 10 for i in range(count)], typed)
    return folder


def read(folder: Path, **settings: Any) -> Dataset:
    return load(DataConfig(name="hub:uoft-cs/cifar10", root=folder, **settings))


def refused(name: str = "hub:uoft-cs/cifar10", **settings: Any) -> str:
    with pytest.raises(Refusal) as caught:
        load(DataConfig(name=name, **settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- a local copy -----------------------------------------------------------------------------------------------------


def test_cifars_layout_is_read_with_its_classes_and_its_own_test(folder: Path) -> None:
    found = read(cifar(folder))
    assert found.name == "hub:uoft-cs/cifar10" and found.classes == tuple(CLASSES) and found.levels == 256
    assert len(found.train) + len(found.validation) == 300 and 15 <= len(found.validation) <= 50
    truth = {pixels.tobytes(): index % 10 for index, pixels in enumerate(pictures(40, 1))}
    assert {p.tobytes(): int(n) for p, n in zip(found.test.pixels, found.test.labels, strict=True)} == truth
    inside = {p.tobytes() for part in (found.train, found.validation) for p in part.pixels}
    assert inside == {pixels.tobytes() for pixels in pictures(300, 0)}
    again = read(folder, side=4)
    assert again.checksum == found.checksum and again.train.pixels.shape[1:] == (4, 4, 3)
    np.testing.assert_array_equal(again.train.labels, found.train.labels)


def test_columns_that_are_not_named_for_what_they_are(folder: Path) -> None:
    found = read(cifar(folder, typed=False))
    assert found.classes == tuple("0123456789") and len(found.test) == 40


@pytest.mark.parametrize(
    "counts, shares",
    [
        ({"train": 300}, (0.8, 0.1, 0.1)),
        ({"train": 300, "validation": 60}, (0.75, 1 / 6, 0.083)),
        ({"train": 300, "validation": 60, "test": 40}, (0.75, 0.15, 0.1)),
    ],
)
def test_what_a_data_set_lacks_is_a_tenth_of_its_train(
    folder: Path, counts: dict[str, int], shares: tuple[float, ...]
) -> None:
    found = read(cifar(folder, counts))
    sizes = [len(part) for part in (found.train, found.validation, found.test)]
    assert sum(sizes) == sum(counts.values())
    assert [size / sum(sizes) for size in sizes] == pytest.approx(shares, abs=0.05)


def test_a_folder_of_pictures_and_one_without_labels(folder: Path) -> None:
    for split, count in (("train", 60), ("test", 10)):
        for i, pixels in enumerate(pictures(count, 3)):
            path = folder / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(pixels))
    assert read(folder).classes == ("a", "b")


def test_pictures_without_classes_are_of_one(folder: Path) -> None:
    write(folder / "data" / "train-00000-of-00001.parquet", [png(pixels) for pixels in pictures(60, 0)])
    found = read(folder)
    assert found.classes == ("all",) and not found.train.labels.any()


def test_a_run_on_it(folder: Path, tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {"variant": "local2d", "out": tmp_path / "out", "measure": False, "train": {"steps": 2, "batch": 8},
         "data": {"name": "hub:uoft-cs/cifar10", "root": cifar(folder), "tokens": "subpixel", "side": 4,
                  "revision": fake_hub.COMMIT},
         "model": {"dim": 16, "depth": 1, "heads": 2}, "probe": {"images": 60}, "sample": {"count": 1}}
    )  # fmt: skip
    path = experiment.execute(experiment.resolve(config))
    found = record.read(path)
    assert found["status"] == "ok" and found["id"].startswith("local2d-hub-uoft-cs-cifar10-s0-")
    assert found["data"]["revision"] == fake_hub.COMMIT and found["data"]["images"]["test"] == 40
    assert found["metrics"]["bits_per_dim"] == pytest.approx(found["metrics"]["bits_per_token"])
    assert trained.load(path, root=folder).images("test").shape == (40, 4, 12)


# --- what cannot be read ----------------------------------------------------------------------------------------------


def test_a_data_set_without_pictures_or_without_a_train_split_is_refused(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cifar(folder, {"test": 20})
    assert "has no split train, only test" in refused(root=folder)
    pq.write_table(pa.table({"text": ["a", "b"], "stars": [1, 2]}), folder / "plain_text" / "train.parquet")
    (folder / "plain_text" / "test-00000-of-00001.parquet").unlink()
    assert "has no pictures, only text, stars" in refused(root=folder)


def test_a_label_that_is_no_class_is_refused(folder: Path) -> None:
    write(folder / "data" / "train-0.parquet", [png(pixels) for pixels in pictures(20, 0)], [3] * 19 + [-1])
    assert "train[19]: -1 is none of its 10 classes" in refused(root=folder)


@pytest.mark.parametrize("spoil, reason", [(lambda b: b[:60], "train[7]: does not decode"), (None, "train[7]: there")])
def test_a_broken_picture_is_named(
    folder: Path, spoil: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images: list[Any] = [png(pixels) for pixels in pictures(20, 0)]
    images[7] = spoil and spoil(images[7])
    write(folder / "data" / "train-0.parquet", images, [0] * 20)
    Image.new("RGB", (8, 8)).save("7.png")  # a file of the machine, which a row must not name
    assert reason in refused(root=folder)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not parquet"])
def test_a_broken_file_is_refused(folder: Path, damage: Any) -> None:
    path = cifar(folder) / "plain_text" / "train-00000-of-00001.parquet"
    path.write_bytes(damage(path.read_bytes()))
    assert "hub:uoft-cs/cifar10 cannot be read" in refused(root=folder)


def test_a_folder_that_is_missing_empty_or_of_other_files_is_refused(folder: Path) -> None:
    assert "no folder" in refused(root=folder / "nowhere")
    assert "cannot be read" in refused(root=folder)
    (folder / "train.txt").write_text("words\n")
    assert "is kept as text, and only parquet, arrow, imagefolder are read" in refused(root=folder)


def test_code_that_comes_with_a_data_set_is_never_run(folder: Path) -> None:
    (folder / "copy.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    assert "cannot be read" in refused(root=folder)
    assert not (folder / "ran").exists()


# --- the hub itself ---------------------------------------------------------------------------------------------------


def test_a_run_says_so_before_it_imports_torch() -> None:
    script = (
        "import sys\nfrom attnbench import cli, run\n"
        "assert cli.command(run.main)(['--data', 'hub:owner/name']) == 2\nassert 'torch' not in sys.modules"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=offline, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "HF_HUB_OFFLINE" in done.stderr and len(done.stderr.splitlines()) == 1


def test_out_of_reach_is_said_within_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the network takes to say no, and without the library, which alone takes a second to import."""
    monkeypatch.setattr(hub, "_library", lambda name: pytest.fail("the library was imported"))
    asleep = threading.Event()
    monkeypatch.setattr(socket, "create_connection", lambda *told: contextlib.nullcontext(asleep.wait(30)))
    begun = time.perf_counter()
    said = refused()
    assert time.perf_counter() - begun < 1
    assert "cannot be reached" in said and "hf download uoft-cs/cifar10" in said and "--data.root" in said


def test_a_wish_to_stay_offline_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", lambda *told: pytest.fail("the network was asked"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in refused() and "--data.root" in refused()


@pytest.mark.parametrize("proxy", [None, "http://proxy.invalid:3128", "proxy.invalid:3128"])
def test_the_way_to_the_hub_may_lead_through_a_proxy(proxy: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def connect(place: tuple[str, int], patience: float) -> socket.socket:
        asked.append(place)
        return socket.socket()

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.delenv("https_proxy", raising=False)
    if proxy:
        monkeypatch.setenv("https_proxy", proxy)
    assert hub._answers("https", "huggingface.co", None)
    assert asked == [("proxy.invalid", 3128) if proxy else ("huggingface.co", 443)]


@pytest.mark.parametrize("name", ["hub:", "hub:cifar10", "hub:a/b/c", "hub:../secret", "hub:uoft-cs/cifar 10"])
def test_what_is_no_name_is_refused_before_anything_is_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_answers", lambda *told: pytest.fail("the network was asked"))
    assert "OWNER/NAME" in refused(name) or "stands here" in refused(name)


def test_a_folder_of_the_same_name_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "uoft-cs" / "cifar10").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "a folder of that name stands here" in refused()


def test_a_revision_is_for_the_hub_alone() -> None:
    assert "--data.revision is for hub:OWNER/NAME" in refused("digits", revision="main")


def test_without_the_library_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refused(root=tmp_path)


def test_the_command_ends_in_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert cli.command(run.main)(["--data", "hub:nobody/nothing"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


LOAD = """
import sys
from attnbench.config import DataConfig
from attnbench.data import load
from attnbench.errors import Refusal
for name, revision in (("own/shapes", None), ("own/shapes", "main"), ("own/shapes", "v9"), ("own/nothing", None)):
    try:
        found = load(DataConfig(name=f"hub:{name}", revision=revision))
        print(found.checksum, found.revision, len(found.test), *found.classes)
    except Refusal as refusal:
        print(refusal)
"""


@needs_datasets
def test_a_hub_is_asked_for_the_commit_and_read_by_the_same_code(folder: Path, tmp_path: Path) -> None:
    """In a process of its own: the library takes the hub's address once, when it is imported."""
    cifar(folder)
    with fake_hub.serving(folder) as address:
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "no_proxy": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", LOAD], capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path
        )
    assert done.returncode == 0, done.stderr
    newest, pinned, unknown, missing = done.stdout.splitlines()
    assert newest == pinned == f"{read(folder).checksum} {fake_hub.COMMIT} 40 {' '.join(CLASSES)}"
    assert "has no commit, tag or branch 'v9'" in unknown
    assert "hub:own/nothing: the hub knows no such data set" in missing
    assert f"--data.revision {fake_hub.COMMIT} pins it" in done.stderr
