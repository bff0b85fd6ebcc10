"""Files from others: nothing in them runs, blows up, leads out of the results, or reaches the page as markup."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import models
from attnbench import (
    attention_map,
    cli,
    compare,
    data,
    experiment,
    record,
    report,
    run,
    sample,
    suite,
    surgery,
    sweep,
    trained,
    transfer,
)
from attnbench.config import DataConfig, RunConfig
from attnbench.errors import Refusal
from models.imagegpt import read as read_imagegpt
from tests import killed
from tests import synthetic_records as synthetic

Main = Callable[[list[str] | None], int]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder of results with a finished run in it; it, and what it left, may be spoilt."""
    told = killed.SETTINGS | {"variant": "dense1d", "out": tmp_path / "r", "train": {"steps": 2, "batch": 4}}
    experiment.execute(experiment.resolve(RunConfig.model_validate(told)))
    return tmp_path / "r"


def the_record(results: Path) -> Path:
    (path,) = (results / "runs").glob("*.json")
    return path


def artifacts(results: Path) -> Path:
    return results / "artifacts" / the_record(results).stem


def ends(main: Main, *arguments: object) -> int:
    return cli.command(main)([str(argument) for argument in arguments])


# --- nothing is unpickled ---------------------------------------------------------------------------------------------


class Live:
    """Unpickling it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


def charges(mark: Path, place: Path) -> list[bytes]:
    """The same pickle as itself, as torch writes it, and as numpy does in .npy and .npz."""
    torch.save(Live(mark), place / "t")
    np.save(place / "n.npy", np.array([Live(mark)], dtype=object), allow_pickle=True)
    np.savez(place / "z.npz", x=np.array([Live(mark)], dtype=object))
    found = [pickle.dumps(Live(mark)), *((place / name).read_bytes() for name in ("t", "n.npy", "z.npz"))]
    for name in ("t", "n.npy", "z.npz"):
        (place / name).unlink()
    return found


FILES = ("artifacts/ID/weights.safetensors", "artifacts/ID/tokeniser.json", "artifacts/ID/samples.png",
         "checkpoints/ID/step-00000002.pt", "checkpoints/ID/latest.ckpt", "artifacts/ID/weights.bin", "runs/x.pkl",
         "runs/x.npz", "runs/x.json", "suites/x.json", "fields/dense1d.png", "runs/superseded/ID.1.json",
         "runs/ID.json")  # fmt: skip


@pytest.mark.promise("unpickled")
@pytest.mark.parametrize("kind", range(4), ids=["pickle", "torch", "npy", "npz"])
def test_a_pickle_in_the_place_of_any_file_does_nothing(
    kind: int, results: Path, tmp_path: Path, injected: Callable[[int], None]
) -> None:
    """Under the commands that read results, and under the run itself; file after file, the record last."""
    mark, good = tmp_path / "mark", the_record(results)
    payload = charges(mark, tmp_path)[kind]
    fitting = killed.SETTINGS | {"variant": "dense1d", "out": results, "train": {"steps": 2, "batch": 4}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in FILES:
            path = results / name.replace("ID", good.stem)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(payload)
            assert ends(sample.main, good, "--count", "1", "--out", tmp_path / "s.png") == 2
            assert ends(compare.main, results, results) in (0, 2)
            assert not mark.exists()
        report.refresh(results)
        experiment.execute(experiment.resolve(RunConfig.model_validate(fitting)))
    assert not mark.exists()
    injected(len(FILES))
    if kind == 0:
        pickle.loads(payload)
        assert mark.exists(), "the charge is a live one"


@pytest.mark.promise("unpickled")
def test_others_weights_are_never_unpickled(tmp_path: Path, injected: Callable[[int], None]) -> None:
    mark = tmp_path / "mark"
    payloads = charges(mark, tmp_path)
    settings = {"model_type": "imagegpt", "n_layer": 1, "n_embd": 8, "n_head": 1, "n_positions": 4, "vocab_size": 3}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for payload in payloads:
        for name in ("pytorch_model.bin", "model.safetensors"):
            (tmp_path / name).write_bytes(payload)
            with pytest.raises(ValueError, match=r"safetensors"):
                read_imagegpt(tmp_path)
            assert not mark.exists()
        (tmp_path / "model.safetensors").unlink()
    injected(2 * len(payloads))


# --- code runs only where a person named it ---------------------------------------------------------------------------

OWN = """
from pathlib import Path
import models
Path({mark!r}).mkdir()
class Mine(models.VARIANTS["dense1d"].cls):
    "Somebody's own."
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A file with an attention, as a variant's name; importing it makes a folder."""
    (tmp_path / "stranger.py").write_text(OWN.format(mark=str(tmp_path / "mark")))
    return f"{tmp_path / 'stranger.py'}:Mine"


@pytest.fixture
def foreign(results: Path, own: str) -> Path:
    """A record that says that its attention is somebody's own; what it left lies under its id."""
    path = the_record(results)
    done = record.read(path)
    done["config"]["variant"] = done["variant"] = own
    path.unlink()
    return record.write(results, done)


@pytest.mark.parametrize("command", [sample, transfer, surgery, attention_map])
def test_a_record_alone_runs_nobodys_code(
    command: Any, foreign: Path, own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {transfer: ["--sides", "3"], surgery: ["--radii", "1"]}.get(command, [])
    assert ends(command.main, foreign, *more) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"--own {own} runs it" in said
    assert not (tmp_path / "mark").exists() and "attnbench_own_stranger" not in sys.modules
    assert ends(command.main, foreign, *more, "--own", "another.py:Class") == 2
    assert not (tmp_path / "mark").exists()


def test_reports_and_comparisons_import_nothing_that_a_record_names(foreign: Path, own: str, tmp_path: Path) -> None:
    results = foreign.parent.parent
    told = {"name": "theirs", "question": "?", "blocks": [{"name": "b", "variants": [own], "seeds": 1}]}
    (results / "suites").mkdir()
    declared = {"declared": "2026-01-01", "suite": suite.Suite.model_validate(told).model_dump(mode="json")}
    (results / "suites" / "theirs.json").write_text(json.dumps(declared))
    assert ends(report.main, results, "--out", tmp_path / "page") == 0
    assert ends(compare.main, results, results) == 0
    sweep.draw_fields(results, [own])
    assert not (tmp_path / "mark").exists()
    assert "stranger.py:Mine" in (tmp_path / "page" / "runs.csv").read_text()


def test_code_that_was_named_runs_and_says_so(
    foreign: Path, own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "attnbench_own_stranger", None)
    monkeypatch.setitem(models.VARIANTS, own, None)  # so that both are forgotten afterwards
    del models.VARIANTS[own], sys.modules["attnbench_own_stranger"]
    assert ends(sample.main, foreign, "--own", own, "--count", "1", "--out", tmp_path / "s.png") == 0
    said = capsys.readouterr().err
    assert said == f"running the code of {tmp_path / 'stranger.py'}, which was named as the attention\n"
    assert (tmp_path / "mark").exists() and (tmp_path / "s.png").exists()


# --- archives, pictures, settings and JSON that would blow up ---------------------------------------------------------


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """256 MiB of zeros in 256 KiB: the header says what may come out, and no more is read."""
    path = tmp_path / "train-images-idx3-ubyte.gz"
    header = bytes([0, 0, 8, 3]) + struct.pack(">III", 2, 3, 4)
    packer = zlib.compressobj(9, wbits=31)
    zeros = bytes(1 << 24)
    path.write_bytes(packer.compress(header) + b"".join(packer.compress(zeros) for _ in range(16)) + packer.flush())
    with pytest.raises(Refusal, match="more data than its header says"):
        data.read_idx(path, 3)
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">III", 60_000, 40_000, 40_000)))
    with pytest.raises(Refusal, match="beyond 1 to"):
        data.read_idx(path, 3)


def png(width: int, height: int, body: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A grey PNG of that declared size, with that content, however well the two fit."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rest = b"".join(chunk(kind, content) for kind, content in more)
    return b"\x89PNG\r\n\x1a\n" + header + rest + chunk(b"IDAT", zlib.compress(body, 9)) + chunk(b"IEND", b"")


BOMBS = {
    "declared huge": png(100_000, 100_000, b""),
    "declared huge and full of it": png(30_000, 30_000, bytes(1 << 26)),
    "a text that unpacks to 128 MiB": png(4, 4, bytes(20), (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 27), 9))),
    "a profile that unpacks to 128 MiB": png(4, 4, b"", (b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 27), 9))),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_picture_bomb_is_refused_by_name(bomb: str, tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "bomb.png").write_bytes(BOMBS[bomb])
    with pytest.raises(Refusal, match=r"bomb\.png: does not decode"):
        data.load(DataConfig(name=f"folder:{tmp_path}"))


LAUGHS = "&a [x,x,x,x,x,x,x,x,x]" + "".join(f", &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]" for i in range(9))
YAML = {
    "an object": ("variant: !!python/object/apply:os.mkdir [MARK]", "could not determine a constructor"),
    "a module": ("variant: !!python/module:antigravity", "could not determine a constructor"),
    "a billion laughs": (f"variant: [{LAUGHS}]", "beyond any settings' size"),
    "a list in itself": ("variant: &a [*a]", "beyond any settings' size"),
    "a deep list": ("variant: " + "[" * 1000 + "]" * 1000, "nested too deeply"),
    "a word for a number": ("seed: !!int foo", "line 1: 'foo' cannot be read as int"),
    "a word for a time": ("seed: !!timestamp q", "cannot be read as timestamp"),
    "a word for a truth": ("force: !!bool perhaps", "cannot be read as bool"),
    "nothing for a number": ("seed: !!int ''", "cannot be read as int"),
    "a number of 5,000 digits": (f"seed: {'9' * 5000}", "cannot be read as int"),
    "a long word": (f"variant: [{'x' * 2_000_000}]", "beyond any settings' size"),
}


@pytest.mark.parametrize("kind", YAML)
@pytest.mark.parametrize("read", ["--config", "suite"])
def test_yaml_that_would_run_or_blow_up_is_refused_in_one_line(
    kind: str, read: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, said = YAML[kind]
    path, mark = tmp_path / "theirs.yaml", tmp_path / "mark"
    path.write_text(text.replace("MARK", str(mark)))
    arguments = ["--config", path] if read == "--config" else [path, "--out", tmp_path / "out"]
    assert ends(run.main if read == "--config" else sweep.main, *arguments) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1 and len(told) < 400
    assert not mark.exists() and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("block", "said"),
    [({"seeds": 10**9}, "seeds are more than"),
     ({"seeds": 9, "grid": {f"a.b{i}": list(range(9)) for i in range(9)}}, "cells, more than")],
)  # fmt: skip
def test_more_cells_than_anybody_means_are_refused_and_left_out_of_reports(
    block: dict[str, Any], said: str, tmp_path: Path
) -> None:
    whole = {"name": "theirs", "question": "?", "blocks": [{"name": "b", "variants": "all"} | block]}
    (tmp_path / "theirs.yaml").write_text(json.dumps(whole))
    with pytest.raises(Refusal, match=said):
        suite.load(str(tmp_path / "theirs.yaml"))
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "theirs.json").write_text(json.dumps({"declared": "now", "suite": whole}))
    assert "theirs.json is no suite" in report.declared(tmp_path).notes[0]


@pytest.mark.parametrize("depth", [100, 600, 950, 5_000, 200_000])
def test_json_of_any_depth_ends_in_a_record_or_a_line(depth: int, tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a.json"
    path.parent.mkdir()
    path.write_text('{"id": "a", "deep": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(record.Corrupt, match=r"a\.json"):
        record.read(path)
    assert ends(report.main, tmp_path, "--out", tmp_path / "page") == 0


def test_a_record_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(record.LARGEST + 1)  # a hole: it takes no room
    with pytest.raises(record.Corrupt, match="larger than 256 MiB"):
        record.read(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_pipes_and_devices_are_not_waited_for(results: Path, tmp_path: Path) -> None:
    """Reading them would never end."""
    good, left = the_record(results), artifacts(results)
    (results / "suites").mkdir()
    (results / "fields").mkdir()
    (left / "samples.png").unlink()
    for name in ("runs/pipe.json", "suites/pipe.json", "fields/dense1d.png", f"{left}/samples.png"):
        os.mkfifo(results / name)
    os.symlink("/dev/zero", results / "runs" / "zero.json")
    assert ends(report.main, results, "--out", tmp_path / "page") == 0
    text = (tmp_path / "page" / "index.html").read_text()
    assert "pipe.json is damaged: it is no regular file" in text and "zero.json is damaged" in text
    (left / "tokeniser.json").unlink()
    os.mkfifo(left / "tokeniser.json")
    with pytest.raises(Refusal, match="no file in"):
        trained.load(good)


# --- paths stay within the results ------------------------------------------------------------------------------------

OUTSIDE = (
    "../../x",
    "../x",
    "/etc/passwd",
    "/tmp/x",
    "a/../../x",
    "..",
    ".",
    "",
    "a\0b",
    "a\nb",
    "~/x",
    "C:\\x",
    "a.b",
)


@pytest.mark.parametrize("id", OUTSIDE)
def test_an_id_cannot_lead_out_of_the_results(id: str, tmp_path: Path) -> None:
    """Not when it is written or looked for, and not from a record whose checksum is right."""
    for use in (
        lambda: record.find(tmp_path / "r", id),
        lambda: record.write(tmp_path / "r", {"id": id, "status": "ok"}),
    ):
        with pytest.raises(Refusal, match="is no record's id"):
            use()
    content = {"id": id, "status": "ok", "config": {}}
    (tmp_path / "r" / "runs").mkdir(parents=True)
    forged = tmp_path / "r" / "runs" / "forged.json"
    forged.write_bytes(record._serialise(content | {"sha256": record._checksum(content)}))
    with pytest.raises(record.Corrupt, match="belongs in another file"):
        record.read(forged)


def test_links_out_of_the_results_are_not_followed(results: Path, tmp_path: Path) -> None:
    """A link as a picture, as the folder of pictures, as the weights: what it leads to is not shown or loaded."""
    secret = tmp_path / "secret"
    shown = (artifacts(results) / "samples.png").read_bytes()
    place = artifacts(results)
    place.rename(secret)
    place.symlink_to(secret)
    assert ends(report.main, results, "--out", tmp_path / "page") == 0
    assert "Samples</h3>" not in (tmp_path / "page" / "index.html").read_text()
    with pytest.raises(Refusal, match="no file in"):
        trained.load(the_record(results))
    place.unlink()
    place.mkdir()
    for path in secret.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    trained.load(the_record(results))
    (place / "weights.safetensors").unlink()
    (place / "weights.safetensors").symlink_to(secret / "weights.safetensors")
    with pytest.raises(Refusal, match="no file in"):
        trained.load(the_record(results))
    assert (place / "samples.png").read_bytes() == shown


def test_a_link_in_the_place_of_a_record_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "r" / "runs").mkdir(parents=True)
    (tmp_path / "r" / "runs" / "a.json").symlink_to(tmp_path / "mine")
    record.write(tmp_path / "r", {"id": "a", "status": "ok"})
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "r" / "runs" / "a.json").is_symlink()


# --- the page ---------------------------------------------------------------------------------------------------------

HOSTILE = (
    "\"'><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}[x](javascript:alert(3))$\\frac{`|\x1b[31m"
)


def poisoned(value: Any, kept: frozenset[str] = frozenset({"id", "status", "sha256"})) -> Any:
    """The same with every string, and every option's name, made hostile."""
    if isinstance(value, dict):
        return {k: v if k in kept else poisoned(v) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) else value


def test_every_string_of_records_suites_and_file_names_is_escaped(tmp_path: Path) -> None:
    done = [synthetic.one(v, s, side=8) for v in ("dense1d", "local2d", "linear") for s in range(2)]
    for one in done:
        one["config"]["model"]["options"] = {HOSTILE: HOSTILE}
        one["note"] = one["reason"] = "said"
    failed = [synthetic.one("dense2d", status=status) for status in ("crash", "oom")]
    synthetic.write(tmp_path, [poisoned(one) for one in [*done, *failed]])
    (tmp_path / "runs" / "<script>alert(4)<script>.json").write_text("{")
    (tmp_path / "suites").mkdir()
    told = poisoned(suite.load("quick").model_dump(mode="json"), frozenset({"claim", "kind", "expects", "equal"}))
    (tmp_path / "suites" / "a.json").write_text(json.dumps({"declared": HOSTILE, "suite": told}))
    (tmp_path / "suites" / "<img src=x>.json").write_text("{")
    assert ends(report.main, tmp_path) == 0
    folder = tmp_path / "report"
    html = (folder / "index.html").read_text(encoding="utf-8")
    assert len(re.findall("<script", html)) == 1, "the page's own"
    assert "<img src=x" not in html and "{{ 7" in html and "alert(1)" in html, "shown as text"
    for path in folder.glob("*.md"):
        text = path.read_text(encoding="utf-8")
        assert "<script" not in text and "<img" not in text and "x](java" not in text.replace("x\\](", ""), path.name
    for path in folder.rglob("*.svg"):
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.parse(path).iter()}
        assert "path" in tags and not tags & {"script", "img", "image", "a"}, path.name


def test_what_reaches_the_terminal_is_one_plain_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No escape sequence of a file's name moves a cursor."""
    assert ends(sample.main, tmp_path / f"a\x1b[2J\n{HOSTILE}.json") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said[:-1].isprintable()
