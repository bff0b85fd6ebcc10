"""Bad input, more than a hundred times, under every command: one line that names the cause and the way out, exit status
2, nothing written."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attnbench import cli, experiment, record
from attnbench.config import RunConfig
from tests import killed
from tests.test_disk import tree

CASES: dict[str, dict[str, str]] = {
    "run": {
        "--variant": "--variant lacks its value",
        "--variant local2dd": "did you mean 'local2d'",
        "--variant xyzzy": "variant",
        "--variant nowhere:Class": "nowhere",
        "--variant FILE.py:Class": "there is no such file; name a module that Python finds",
        "--variant TEXT:Class": "name a module",
        "--variant json:JSONDecoder": "derives from models.Mixer",
        "--variant :": "write module:Class",
        "--trian.steps 5": "did you mean --train.steps?",
        "--train.steps 0": "greater than 0",
        "--train.steps -5": "greater than 0",
        "--train.steps 1e3": "it takes INT",
        "--train.steps five": "it takes INT",
        "--train.lr nan": "finite",
        "--train.lr 0": "greater than 0",
        "--train.batch 10 --train.accumulate 3": "does not divide batch 10",
        "--train.precision float16": "choose from auto, float32, bfloat16",
        "--model.dim 10 --model.heads 3": "heads that do",
        "--model.objective next": "choose from ar, bert, supervised",
        "--model.backend warp": "backend",
        "--model.options.radius 2": "radius",
        "--variant local2d --model.options.radios 2": "did you mean 'radius'",
        "--variant local2d --model.options.radius -1": "radius",
        "--variant local2d --model.options.radius wide": "radius",
        "--position rotary9": "position",
        "--scan zigzag": "choose from raster, snake, column, hilbert, random",
        "--seed 18446744073709551616": "less than 9223372036854775808",
        "--seed -1": "greater than or equal to 0",
        "--device cuda": "no CUDA GPU",
        "--parallel ddp": "torchrun",
        "--data digit": "did you mean 'digits'",
        "--data folder:": "no such folder",
        "--data folder:missing": "no such folder",
        "--data folder:EMPTY": "no pictures",
        "--data folder:BROKEN": "does not decode",
        "--data fashion-mnist --data.root EMPTY": "--data.root",
        "--data source:abovee": "did you mean",
        "--data source:above --data.levels 1": "2 to 256",
        "--data source:above --data.count 99999999999": "--data.count",
        "--data source:above --data.options.size 3": "size",
        "--data.levels 4": "is for source:NAME",
        "--data.side 99": "choose a side of 8 or less",
        "--data.tokens colours": "choose from auto",
        "--data.tokens palette --data.colours 5000": "5000",
        "--data photos --data.side 8 --data.tokens levels": "palette",
        "--config": "--config lacks its file",
        "--config missing.yaml": "No such file",
        "--config EMPTY": "Is a directory",
        "--config BINARY": "not a text in UTF-8",
        "--config WRONG": "did you mean train.steps?",
        "--out TEXT": "move what stands in the way",
        "--out TEXT/below": "move what stands in the way",
    },
    "sweep": {
        "": "suite is missing",
        "quik --out OUT": "did you mean 'quick'?",
        "missing.yaml --out OUT": "No such file",
        "WRONG.yaml --out OUT": "mend the file",
        "TEXT.yaml --out OUT": "mend the file",
        "EMPTY.yaml --out OUT": "holds no suite",
        "quick --jobs 0": "greater than 0",
        "quick --engine magic": "choose from local, ray, slurm",
        "quick --out TEXT": "move what stands in the way",
        "quick --device cuda --out OUT": "no CUDA GPU",
        "quick extra --out OUT": "unexpected argument 'extra'",
    },
    "report": {
        "TEXT": "name the folder of results",
        "missing": "name the folder of results",
        "EMPTY --out TEXT/below": "move what stands in the way",
        "--runs EMPTY": "give its value alone",
        "EMPTY EMPTY": "unexpected argument",
    },
    "compare": {
        "": "a, b is missing",
        "EMPTY": "b is missing",
        "missing EMPTY": "missing is no folder",
        "EMPTY EMPTY": "no run in common",
        "EMPTY EMPTY --nats -1": "greater than or equal to 0",
        "EMPTY EMPTY --speed fast": "it takes FLOAT",
    },
    "cost": {
        "--variants densest --sides 4 --out OUT": "densest",
        "--variants ,, --sides 4 --out OUT": "variant",
        "--variants dense1d --sides 4,x --out OUT": "write them with commas",
        "--variants dense1d --sides 0 --out OUT": "at least 1",
        "--variants dense1d --sides 4 --memory 0 --out OUT": "must be above 0",
        "--variants dense1d --sides 4 --limit 1e7 --out OUT": "1000000",
        "--suite gpu --sides 4 --out OUT": "suite gpu says that itself; leave out --sides",
        "--memory 8XB": "memory",
        "--suite cpu": "did you mean 'gpu'",
        "--suite gpu": "needs a CUDA GPU",
        "--budget 0": "greater than 0",
        "--variants dense1d --sides 4 --out TEXT": "move what stands in the way",
    },
    "plan": {
        "": "nothing to plan",
        "--side 0": "greater than 0",
        "--side 8 --height 8 --width 8": "--side is for squares",
        "--height 8": "go together",
        "--side 8 --preset igpt-xxl": "choose from igpt-s",
        "--side 8 --memory much": "memory",
        "--memory 0GB": "above 0",
        "--side 8 --variant densest": "densest",
        "--side 8 --train.batch 3 --train.accumulate 2": "does not divide batch 3",
    },
    "sample": {
        "": "record is missing",
        "missing.json": "name a run's record",
        "TEXT": "TEXT is no run's record: it is not JSON",
        "EMPTY": "is no run's record: it is no regular file; name a run's record",
        "FAILED": "ended with 'crash'",
        "ALONE --out OUT/x.png": "lacks what the run left",
        "RUN --complete 1.5": "less than 1",
        "RUN --count 0": "greater than 0",
        "RUN --temperature 0": "greater than 0",
        "RUN --out TEXT/x.png": "move what stands in the way",
    },
    "transfer": {
        "": "record, --sides is missing",
        "RUN": "--sides is missing",
        "RUN --sides 8,x --out OUT": "whole numbers",
        "RUN --sides 0 --out OUT": "whole numbers",
        "FAILED --sides 4 --out OUT": "ended with 'crash'",
        "RUN --sides 4 --out TEXT": "move what stands in the way",
    },
    "surgery": {
        "--out OUT": "--imagegpt FOLDER",
        "RUN --data photos --out OUT": "has its own data",
        "RUN --radii 1,x --out OUT": "whole numbers",
        "RUN --variant linear --out OUT": "softmax",
        "RUN --option window --out OUT": "option",
        "--imagegpt EMPTY --out OUT": "cannot be read",
    },
    "attention_map": {"": "record is missing", "missing.json": "cannot be read", "RUN --radii 0": "whole numbers"},
    "check": {
        "": "--all",
        "dense1d --all": "--all",
        "local2dd": "did you mean 'local2d'",
        "local2d --options.radios 2": "no option 'radios'",
        "local2d --options.radius 0": "radius must be a whole number",
        "missing.py:Class": "missing.py",
        "dense1d --out TEXT": "move what stands in the way",
    },
    "doctor": {
        "--variant densest": "densest",
        "--variants dense1d": "did you mean --variant?",
        "dense1d": "unexpected",
    },
    "scale": {"": "variants is missing", "densest --out OUT/s.md": "densest", "dense1d --presets big --out OUT": "big"},
    "catalogue": {"--out TEXT --no-pictures": "move what stands in the way"},
}
"""Command: arguments: what the line must say. Words in capitals stand for files that `place` makes."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the cases name, and a finished run."""
    root = tmp_path_factory.mktemp("given")
    told = killed.SETTINGS | {"variant": "dense1d", "out": root / "r", "train": {"steps": 2, "batch": 4}}
    path = experiment.execute(experiment.resolve(RunConfig.model_validate(told)))
    (root / "RUN").write_text(str(path))
    failed = record.read(path) | {"id": "failed", "status": "crash"}
    (root / "FAILED").write_text(str(record.write(root / "r", failed)))
    (root / "ALONE").write_text(str(record.write(root / "r", record.read(path) | {"id": "alone"})))
    (root / "EMPTY").mkdir()
    (root / "BROKEN" / "class").mkdir(parents=True)
    (root / "BROKEN" / "class" / "a.png").write_bytes(b"\x89PNG\r\n")
    (root / "TEXT").write_text("a: [")
    (root / "TEXT.yaml").write_text("a: [")
    (root / "EMPTY.yaml").write_text("")
    (root / "BINARY").write_bytes(b"\xff\xfe\x00")
    (root / "WRONG").write_text("train: {stesp: 5}")
    (root / "WRONG.yaml").write_text("question: 1")
    return root


def every() -> list[Any]:
    return [
        pytest.param(command, arguments, said, id=f"{command} {arguments}")
        for command, cases in CASES.items()
        for arguments, said in cases.items()
    ]


def spelled(arguments: str, place: Path) -> list[str]:
    """The command line, with the paths of records written out; other files are named as they lie here."""
    words = []
    for word in arguments.split():
        given = place / word
        words.append(given.read_text() if word in ("RUN", "FAILED", "ALONE") else word)
    return words


def test_there_are_a_hundred() -> None:
    assert len(every()) >= 100


@pytest.mark.promise("bad input")
@pytest.mark.parametrize(("command", "arguments", "said"), every())
def test_bad_input_is_one_line_and_writes_nothing(
    command: str, arguments: str, said: str, place: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")
    before = tree(place)
    main: Callable[[list[str] | None], int] = importlib.import_module(f"attnbench.{command}").main
    assert cli.command(main)(spelled(arguments, place)) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("attnbench."), told
    assert said in told and "Traceback" not in told and len(told) < 500, told
    assert ";" in told or "did you mean" in told or "--" in told, f"no way out: {told}"
    assert tree(place) == before
