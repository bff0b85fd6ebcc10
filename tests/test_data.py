"""Images and splits: what is fixed stays fixed, no picture straddles a boundary, bad files end in one line."""

from __future__ import annotations

import functools
import gzip
import hashlib
import struct
from collections.abc import Callable
from itertools import combinations, islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from attnbench import data, decode, photos
from attnbench.config import DataConfig
from attnbench.data import Dataset, load
from attnbench.errors import Refusal


@functools.cache
def shipped(name: str, side: int | None = None) -> Dataset:
    return load(DataConfig(name=name, side=side))


def contents(images: data.Images) -> set[bytes]:
    return {image.tobytes() for image in images.pixels}


def refused(name: str, side: int | None = None, root: Path | None = None) -> str:
    """The message of a refusal, which must be a single line."""
    with pytest.raises(Refusal) as caught:
        load(DataConfig.model_construct(name=name, side=side, root=root))
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# --- splits and checksums ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, side", [("digits", None), ("photos", 64)])
def test_splits_share_no_image(name: str, side: int | None) -> None:
    dataset = shipped(name, side)
    for one, other in combinations((dataset.train, dataset.validation, dataset.test), 2):
        assert not contents(one) & contents(other)


def test_digits_are_all_there_with_levels_and_shares() -> None:
    dataset = shipped("digits")
    parts = (dataset.train, dataset.validation, dataset.test)
    assert sum(len(part) for part in parts) == 1797
    assert [round(len(part) / 1797, 1) for part in parts] == [0.7, 0.1, 0.2]
    assert dataset.levels == 17 and dataset.train.pixels.max() == 16
    assert len(dataset.classes) == 10
    for part in parts:
        assert part.pixels.shape == (len(part), 8, 8, 1) and part.pixels.dtype == np.uint8
        assert part.labels.dtype == np.int64 and set(part.labels) == set(range(10))


def test_checksum_is_the_same_each_time_and_for_every_side() -> None:
    first, again, small = load(DataConfig()), load(DataConfig()), load(DataConfig(side=4))
    assert first.checksum == again.checksum == small.checksum
    assert len(bytes.fromhex(first.checksum)) == 32
    np.testing.assert_array_equal(first.train.pixels, again.train.pixels)
    np.testing.assert_array_equal(first.train.labels, small.train.labels)


@pytest.mark.parametrize("what", ["pixel", "label", "split"])
def test_checksum_notices_a_change(what: str) -> None:
    pixels, labels, splits = np.zeros((3, 2, 2, 1), np.uint8), np.arange(3), ["train", "validation", "test"]
    pixels[:, 0, 0, 0] = [1, 2, 3]

    def checksum() -> str:
        return data._assemble("x", pixels, labels, splits, [decode.fingerprint(i) for i in pixels], "abc").checksum

    before = checksum()
    assert before == checksum()
    if what == "pixel":
        pixels[1, 1, 1, 0] = 9
    elif what == "label":
        labels[0] = 2
    else:
        splits[0], splits[1] = splits[1], splits[0]
    assert checksum() != before


def test_split_depends_on_the_fingerprint_alone_and_in_the_shares_asked() -> None:
    digests = [hashlib.sha256(bytes([i % 256, i // 256])).digest() for i in range(4000)]
    splits = [data.split_of(digest, validation=0.1, test=0.2) for digest in digests]
    assert splits == [data.split_of(digest, validation=0.1, test=0.2) for digest in digests]
    assert splits.count("test") / 4000 == pytest.approx(0.2, abs=0.03)
    assert splits.count("validation") / 4000 == pytest.approx(0.1, abs=0.03)


def test_fingerprint_tells_shapes_apart() -> None:
    assert decode.fingerprint(np.zeros((2, 8, 1), np.uint8)) != decode.fingerprint(np.zeros((4, 4, 1), np.uint8))


# --- sides ------------------------------------------------------------------------------------------------------------


def test_halving_averages_four_pixels_and_keeps_the_levels() -> None:
    digits, small = shipped("digits"), shipped("digits", 4)
    blocks = digits.train.pixels.reshape(-1, 4, 2, 4, 2, 1).mean(axis=(2, 4))
    np.testing.assert_array_equal(small.train.pixels, np.rint(blocks))
    assert small.levels == 17 and small.train.pixels.max() <= 16


@pytest.mark.parametrize("height, width, side", [(8, 8, 3), (9, 6, 5), (7, 7, 7), (5, 8, 1)])
def test_resize_is_the_area_average(height: int, width: int, side: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    fine = pixels.repeat(side, axis=1).repeat(side, axis=2).astype(np.int64)  # each pixel as side × side equal ones
    means = fine.reshape(3, side, height, side, width, 3).sum(axis=(2, 4)) / (height * width)
    np.testing.assert_array_equal(decode.resize(pixels, side, "x"), np.rint(means))


def test_resize_leaves_a_flat_image_flat() -> None:
    assert set(decode.resize(np.full((2, 64, 48, 3), 201, np.uint8), 7, "x").ravel()) == {201}


@pytest.mark.parametrize(
    "name, side, way_out",
    [("digits", 9, "a side of 8"), ("photos", 65, "a side of 64"), ("digits", 0, "--data.side 1")],
)
def test_a_side_that_does_not_fit_is_refused(name: str, side: int, way_out: str) -> None:
    message = refused(name, side=side)
    assert f"side {side} does not fit" in message and f"choose {way_out}" in message


# --- photos -----------------------------------------------------------------------------------------------------------


def test_photos_have_their_counts_classes_and_default_side() -> None:
    dataset = shipped("photos")
    assert dataset.classes == tuple(photos.FILES) and len(dataset.classes) == 10
    for split in data.SPLITS:
        part = getattr(dataset, split)
        assert part.pixels.shape == (10 * photos.COUNTS[split], 32, 32, 3)
        assert np.bincount(part.labels).tolist() == [photos.COUNTS[split]] * 10


def test_photos_small_side_is_the_same_field_seen_smaller() -> None:
    full, small = shipped("photos", 64), shipped("photos")
    blocks = full.test.pixels.reshape(-1, 32, 2, 32, 2, 3).mean(axis=(2, 4))
    np.testing.assert_array_equal(small.test.pixels, np.rint(blocks))


def test_no_field_is_shown_twice() -> None:
    dataset = shipped("photos", 64)
    parts = (dataset.train, dataset.validation, dataset.test)
    assert sum(len(contents(part)) for part in parts) == sum(len(part) for part in parts) == 2750


@pytest.mark.parametrize("name", photos.FILES)
def test_regions_of_a_photograph_keep_their_distance(name: str) -> None:
    height, width, _ = photos.photograph(name).shape
    strips = photos.strips(width)
    assert strips[0][1] == 0 and strips[-1][2] <= width
    for (_, _, stop), (_, start, _) in pairwise(strips):
        assert start - stop == photos.GAP >= 16
    spots = {split: list(islice(photos.corners(height, width, split), 500)) for split in data.SPLITS}
    for corners in spots.values():
        assert len(set(corners)) > 250  # spread, not piled up
        assert all(0 <= row <= height - photos.FIELD and 0 <= col <= width - photos.FIELD for row, col in corners)
    for one, other in combinations(data.SPLITS, 2):
        starts = np.array([c.col for c in spots[one]]), np.array([c.col for c in spots[other]])
        assert np.abs(starts[0][:, None] - starts[1][None]).min() >= photos.FIELD + photos.GAP


def test_fields_come_from_their_own_split_of_the_photograph() -> None:
    """A picture whose pixel values are its column numbers shows which columns were cut out."""
    width = 255
    picture = np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None], (100, width, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos, "FIELD", 20)
        for split in data.SPLITS:
            allowed = {col for name, start, stop in photos.strips(width) if name == split for col in range(start, stop)}
            assert set(photos.cut(picture, split, 30).ravel()) <= allowed


def test_blank_fields_are_passed_over() -> None:
    picture = np.zeros((300, 600, 3), np.uint8)
    with pytest.raises(Refusal, match="blank"):
        photos.cut(picture, "train", 5)
    picture[150:] = np.random.default_rng(0).integers(0, 256, (150, 600, 3))
    assert all(np.ptp(field) >= photos.FAINTEST for field in photos.cut(picture, "train", 50))


def test_a_photograph_missing_from_the_wheel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(photos.FILES, "chelsea", ("skimage", "data", "no-cat.png"))
    assert "no-cat.png" in refused("photos")


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, hint",
    [
        ("digit", "did you mean 'digits'?"),
        ("Photos", "did you mean 'photos'?"),
        ("fashion_mnist", "did you mean 'fashion-mnist'?"),
        ("fodler:/somewhere", "did you mean 'folder:"),
        ("zzz", "known: digits, photos, fashion-mnist, folder:"),
        ("", "known: digits"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, hint: str) -> None:
    assert hint in refused(name)


# --- fashion-mnist ----------------------------------------------------------------------------------------------------


def write_idx(path: Path, values: np.ndarray, spoil: Callable[[bytes], bytes] = bytes) -> None:
    raw = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(spoil(raw)))


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """200 + 40 images of 5×6 pixels as Fashion-MNIST's four files; image 7 of train is a copy of image 3."""
    rng = np.random.default_rng(1)
    for part, count in (("train", 200), ("t10k", 40)):
        pixels = rng.integers(0, 256, (count, 5, 6), dtype=np.uint8)
        pixels[7] = pixels[3]
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", pixels)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", (np.arange(count) % 10).astype(np.uint8))
    return tmp_path


def test_fashion_mnist_keeps_the_official_test_and_a_tenth_for_validation(fashion: Path) -> None:
    dataset = load(DataConfig(name="fashion-mnist", root=fashion))
    assert len(dataset.test) == 40 and len(dataset.train) + len(dataset.validation) == 200
    assert 8 <= len(dataset.validation) <= 35
    assert dataset.train.pixels.shape[1:] == (5, 6, 1) and dataset.levels == 256 and len(dataset.classes) == 10
    original = np.random.default_rng(1).integers(0, 256, (200, 5, 6), dtype=np.uint8)
    assert original[0].tobytes() in contents(dataset.train) | contents(dataset.validation)
    assert sorted(dataset.test.labels) == sorted(np.arange(40) % 10)


def test_copies_of_an_image_fall_on_one_side(fashion: Path) -> None:
    dataset = load(DataConfig(name="fashion-mnist", root=fashion))
    assert len(contents(dataset.train)) + len(contents(dataset.validation)) == 199
    assert not contents(dataset.train) & contents(dataset.validation)


def test_fashion_mnist_is_looked_for_where_debian_puts_it(fashion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path("/usr/share/datasets/fashion-mnist") == data.FASHION_FOLDER
    monkeypatch.setattr(data, "FASHION_FOLDER", fashion)
    assert len(load(DataConfig(name="fashion-mnist")).test) == 40
    monkeypatch.setattr(data, "FASHION_FOLDER", fashion / "nowhere")
    message = refused("fashion-mnist")
    assert "dataset-fashion-mnist" in message and "--data.root" in message


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda raw: raw[:-1], "less data than its header says"),
        (lambda raw: raw + b"x", "more data than its header says"),
        (lambda raw: b"\0\0\x0d\3" + raw[4:], "not an IDX file"),
        (lambda raw: raw[:9], "not an IDX file"),
        (lambda raw: b"", "not an IDX file"),
        (lambda raw: raw[:4] + struct.pack(">3I", *[2**32 - 1] * 3) + raw[16:], "header says"),
        (lambda raw: raw[:4] + struct.pack(">3I", 0, 5, 6), "header says"),
    ],
)
def test_a_spoilt_idx_file_is_refused(fashion: Path, spoil: Callable[[bytes], bytes], reason: str) -> None:
    write_idx(fashion / "train-images-idx3-ubyte.gz", np.zeros((200, 5, 6), np.uint8), spoil)
    message = refused("fashion-mnist", root=fashion)
    assert reason in message and "train-images-idx3-ubyte.gz" in message


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"no gzip", lambda b: b[:-8] + b"\0" * 8]
)  # the last: its CRC
def test_a_broken_gzip_file_is_refused(fashion: Path, damage: Callable[[bytes], bytes]) -> None:
    path = fashion / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    assert f"{path}: does not unpack" in refused("fashion-mnist", root=fashion)


def test_an_idx_file_that_unpacks_without_end_is_not_unpacked(fashion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    read = gzip.GzipFile.read

    def spy(file: gzip.GzipFile, size: int = -1) -> bytes:
        asked.append(size)
        return read(file, size)

    monkeypatch.setattr(gzip.GzipFile, "read", spy)
    write_idx(fashion / "train-images-idx3-ubyte.gz", np.zeros((200, 5, 6), np.uint8), lambda raw: raw + bytes(1 << 24))
    assert "more data" in refused("fashion-mnist", root=fashion)
    assert asked == [16, 200 * 5 * 6 + 1]


@pytest.mark.parametrize(
    "labels, reason",
    [(np.zeros(199, np.uint8), "199 labels for 200 images"), (np.full(200, 10, np.uint8), "label 10")],
)
def test_labels_that_do_not_fit_are_refused(fashion: Path, labels: np.ndarray, reason: str) -> None:
    write_idx(fashion / "train-labels-idx1-ubyte.gz", labels)
    assert reason in refused("fashion-mnist", root=fashion)


# --- folder:PATH ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of 60 RGB pictures, 10 rows by 14 columns; class b also holds copies of a's first ten."""
    rng = np.random.default_rng(2)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(60):
            Image.fromarray(rng.integers(0, 256, (10, 14, 3), dtype=np.uint8)).save(tmp_path / name / f"{i:02}.png")
    for i in range(10):
        (tmp_path / "b" / f"copy{i}.png").write_bytes((tmp_path / "a" / f"{i:02}.png").read_bytes())
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden").mkdir()
    return tmp_path


def test_a_folder_of_pictures(pictures: Path) -> None:
    dataset = load(DataConfig(name=f"folder:{pictures}"))
    parts = (dataset.train, dataset.validation, dataset.test)
    assert dataset.classes == ("a", "b") and dataset.levels == 256
    assert sum(len(part) for part in parts) == 130 and len(dataset.train) > 80
    assert dataset.train.pixels.shape[1:] == (10, 14, 3)
    everything = set().union(*(contents(part) for part in parts))
    assert everything == {np.asarray(Image.open(path)).tobytes() for path in pictures.glob("?/*.png")}
    assert sum(len(contents(part)) for part in parts) == 120  # the ten copies never straddle a boundary
    assert dataset.checksum == load(DataConfig(name=f"folder:{pictures}", side=5)).checksum


def test_a_side_cuts_the_central_square(pictures: Path) -> None:
    native, square = load(DataConfig(name=f"folder:{pictures}")), load(DataConfig(name=f"folder:{pictures}", side=10))
    np.testing.assert_array_equal(square.test.pixels, native.test.pixels[:, :, 2:12])


def test_pictures_of_several_sizes_want_a_side(pictures: Path) -> None:
    Image.new("RGB", (9, 30)).save(pictures / "a" / "tall.jpg")
    message = refused(f"folder:{pictures}")
    assert "tall.jpg" in message and "--data.side 9" in message
    assert load(DataConfig(name=f"folder:{pictures}", side=9)).train.pixels.shape[1:] == (9, 9, 3)
    message = refused(f"folder:{pictures}", side=10)
    assert "tall.jpg" in message and "side 10 does not fit" in message


def test_a_turned_photograph_is_set_upright_or_refused(pictures: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90°
    Image.new("RGB", (14, 10), "red").save(pictures / "b" / "turned.jpg", exif=exif)
    assert "turned.jpg: stands upright" in refused(f"folder:{pictures}")
    assert decode.upright(decode.Picture("it", pictures / "b" / "turned.jpg"), "RGB").shape == (14, 10, 3)
    assert load(DataConfig(name=f"folder:{pictures}", side=8)).train.pixels.shape[1:] == (8, 8, 3)


def test_grey_if_every_picture_is_grey(tmp_path: Path) -> None:
    values = np.random.default_rng(3).integers(0, 256, (80, 6, 6), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    for i, value in enumerate(values):
        Image.fromarray(value).save(tmp_path / "a" / f"{i}.png")
    grey = load(DataConfig(name=f"folder:{tmp_path}"))
    assert grey.train.pixels.shape[1:] == (6, 6, 1)
    assert contents(grey.train) <= {value.tobytes() for value in values}
    Image.new("RGB", (6, 6), "red").save(tmp_path / "a" / "red.png")
    assert load(DataConfig(name=f"folder:{tmp_path}")).train.pixels.shape[1:] == (6, 6, 3)


def test_transparent_parts_lie_on_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[0, 0, 0, 0], [10, 20, 30, 255]]], np.uint8)).save(tmp_path / "x.png")
    assert decode.upright(decode.Picture("x", tmp_path / "x.png"), "RGB").tolist() == [[[255, 255, 255], [10, 20, 30]]]


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not a picture\n" * 9])
def test_a_broken_picture_is_refused_by_name(pictures: Path, damage: Callable[[bytes], bytes]) -> None:
    path = pictures / "b" / "33.png"
    path.write_bytes(damage(path.read_bytes()))
    assert f"{path}: does not decode" in refused(f"folder:{pictures}")


def test_a_decompression_bomb_is_refused(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (120, 20):  # 140 pixels: beyond the limit PIL warns, beyond twice the limit it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        message = refused(f"folder:{pictures}")
        assert "does not decode" in message and "bomb" in message


def test_sixteen_bits_are_refused_rather_than_clipped(pictures: Path) -> None:
    Image.fromarray(np.full((10, 14), 40_000, np.uint16)).save(pictures / "a" / "deep.png")
    message = refused(f"folder:{pictures}")
    assert "deep.png" in message and "8 bits" in message


def test_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    assert "no such folder" in refused("folder:")
    assert "no such folder" in refused(f"folder:{tmp_path / 'nowhere'}")
    assert "no pictures" in refused(f"folder:{tmp_path}")
    Image.new("L", (4, 4)).save(tmp_path / "loose.png")
    (tmp_path / "empty").mkdir()
    assert "sub-folders" in refused(f"folder:{tmp_path}")


def test_too_few_pictures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for i in range(4):
        Image.new("L", (4, 4), 7).save(tmp_path / "a" / f"{i}.png")
    message = refused(f"folder:{tmp_path}")
    assert "4 images (1 different)" in message and "split empty" in message and "add" in message


def test_more_pixels_than_memory_are_refused_before_decoding(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "LARGEST", 130 * 10 * 14 * 3 - 1)
    assert "--data.side" in refused(f"folder:{pictures}")
    assert len(load(DataConfig(name=f"folder:{pictures}", side=4)).train) > 80
