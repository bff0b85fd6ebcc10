"""The command line: precedence, sugar, and one line with the way out for whatever is wrong."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field
from tyro import _errors

from attnbench import cli, schema
from attnbench.config import RunConfig, Settings
from attnbench.errors import Refusal

ROOT = Path(__file__).resolve().parent.parent


def write(folder: Path, text: str) -> str:
    file = folder / "given.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def refused(*argv: str) -> str:
    with pytest.raises(Refusal) as caught:
        cli.parse(RunConfig, argv)
    text = str(caught.value)
    assert "\n" not in text and "│" not in text and "pydantic" not in text
    assert ";" in text, f"no way out: {text}"
    return text


def test_no_flags_give_the_defaults() -> None:
    assert cli.parse(RunConfig, []) == RunConfig()


def test_flags_nest_and_both_hyphen_and_underscore_serve() -> None:
    config = cli.parse(RunConfig, ["--train.steps", "7", "--train.validate_every=3", "--force", "--no-measure"])
    assert (config.train.steps, config.train.validate_every, config.force, config.measure) == (7, 3, True, False)


def test_data_names_the_data_set_beside_its_other_settings() -> None:
    config = cli.parse(RunConfig, ["--data", "photos", "--data.side", "16"])
    assert (config.data.name, config.data.side) == ("photos", 16)
    assert cli.parse(RunConfig, ["--data.name", "photos"]).data.name == "photos"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-5", -5),
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("true", True),
        ("on", "on"),
        ("1:30", "1:30"),
        ("a-b", "a-b"),
    ],
)
def test_options_are_yaml_scalars(text: str, value: object) -> None:
    for argv in (["--model.options.key", text], [f"--model.options.key={text}"], ["--model.options", "key", text]):
        found = cli.parse(RunConfig, [*argv, "--force"]).model.options
        assert found == {"key": value} and type(found["key"]) is type(value)


def test_options_gather_from_every_spelling_and_hyphens_are_underscores() -> None:
    argv = ["--model.options", "a", "1", "b", "x", "--model.options.head-dim", "4", "--model.options.a=2"]
    assert cli.parse(RunConfig, argv).model.options == {"a": 2, "b": "x", "head_dim": 4}


def test_the_file_is_read_and_flags_win(tmp_path: Path) -> None:
    file = write(tmp_path, "train: {steps: 5, lr: 1e-4}\nmodel:\n  options: {radius: 3, mode: x}\nvariant: other\n")
    config = cli.parse(RunConfig, ["--train.steps", "9", f"--config={file}", "--model.options.radius", "4"])
    assert (config.train.steps, config.train.lr, config.variant) == (9, 1e-4, "other")
    assert config.model.options == {"radius": 4, "mode": "x"}
    assert config == cli.parse(RunConfig, ["--config", file, "--train.steps=9", "--model.options", "radius", "4"])


def test_a_flag_may_put_right_what_the_file_alone_has_wrong(tmp_path: Path) -> None:
    file = write(tmp_path, "model: {heads: 5}")
    assert "heads 5 does not divide dim 64" in refused("--config", file)
    assert cli.parse(RunConfig, ["--config", file, "--model.dim", "65"]).model.heads == 5


def test_an_empty_file_and_empty_groups_say_nothing(tmp_path: Path) -> None:
    assert cli.parse(RunConfig, ["--config", write(tmp_path, "# nothing\n")]) == RunConfig()
    assert cli.parse(RunConfig, ["--config", write(tmp_path, "train:\n")]) == RunConfig()


@given(
    st.builds(
        dict,
        seed=st.integers(0, 10**9),
        force=st.booleans(),
        train=st.builds(dict, steps=st.integers(1, 10**6), lr=st.floats(1e-300, 1e300), compile=st.booleans()),
        data=st.builds(
            dict, side=st.none() | st.integers(1, 99), tokens=st.sampled_from(["auto", "levels", "palette", "subpixel"])
        ),
    )
)
def test_flags_and_file_say_the_same(told: dict[str, object]) -> None:
    argv: list[str] = []
    for path, _ in schema.leaves(RunConfig):
        value: object = told
        for part in path.split("."):
            value = value.get(part, ...) if isinstance(value, dict) else ...
        if isinstance(value, bool):
            *groups, name = path.split(".")
            argv.append("--" + ".".join([*groups, name if value else f"no-{name}"]))
        elif value is not ...:
            argv += [f"--{path}", str(value)]
    assert cli.parse(RunConfig, argv) == RunConfig.model_validate(told)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--train.stesp 4", "did you mean --train.steps?"),
        ("--steps 4", "did you mean --train.steps?"),
        ("--stepz 4", "did you mean --train.steps?"),
        ("--no-froce", "did you mean --force?"),
        ("--model.optoins.radius 4", "did you mean --model.options?"),
        ("--xyzzy", "unknown flag --xyzzy"),
        ("-q", "unknown flag -q"),
        ("stray", "unexpected argument 'stray'"),
        ("--force true", "unexpected argument 'true'"),
        ("--train.steps abc", "--train.steps cannot be 'abc'; it takes INT"),
        ("--train.steps 1.5", "--train.steps cannot be '1.5'"),
        ("--train.steps", "--train.steps lacks its value"),
        ("--variant --force", "--variant lacks its value"),
        ("--data.side x", "--data.side cannot be 'x'"),
        ("--data.tokens foo", "choose from auto, levels, palette, subpixel"),
        ("--train.steps -5", "--train.steps: input should be greater than 0, not -5"),
        ("--train.steps 0", "--train.steps: input should be greater than 0"),
        ("--train.lr nan", "--train.lr: input should be a finite number"),
        ("--train.lr inf", "--train.lr: input should be a finite number"),
        ("--seed -1", "--seed: input should be greater than or equal to 0"),
        ("--model.heads 3", "heads 3 does not divide dim 64; heads that do: "),
        ("--train.accumulate 5", "accumulate 5 does not divide batch 64"),
        ("--model.options.radius", "--model.options lacks a value"),
        ("--model.options", "--model.options lacks a value"),
        ("--model.options a", "--model.options lacks a value"),
        ("--model.options.r [1,2]", "--model.options.r '[1,2]' is no number"),
        ("--model.options.r ~", "--model.options.r '~' is no number"),
        ("--config", "--config lacks its file"),
        ("--config --force", "--config lacks its file"),
        ("--config a.yaml --config b.yaml", "--config is given twice"),
        ("--config does/not/exist.yaml", "does/not/exist.yaml: No such file"),
        ("--config /", "/: Is a directory"),
    ],
)
def test_bad_flags(argv: str, said: str) -> None:
    assert said in refused(*argv.split())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("zzz: 5", "unknown key zzz"),
        ("varaint: x", "unknown key varaint; did you mean variant?"),
        ("train: {stesp: 5}", "unknown key train.stesp; did you mean train.steps?"),
        ("steps: 5", "did you mean train.steps?"),
        ("train.steps: 5", "unknown key train.steps"),
        ("1: 2", "unknown key 1"),
        ("train: 5", "train is a group of settings"),
        ("data: digits", "data is a group of settings"),
        ("- a", "holds no settings"),
        ("word", "holds no settings"),
        ("a: b: c", "line 1: mapping values"),
        ("seed: 1\nseed: 2", "line 2: key seed stands twice"),
        ("? [a]\n: b", "a key must be a word"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("train: {steps: -1}", "train.steps: input should be greater than 0, not -1"),
        ("train: {steps: abc}", "train.steps: input should be a valid integer"),
        ("data: {tokens: foo}", "data.tokens: input should be 'auto', 'levels', 'palette' or 'subpixel'"),
        ("model: {options: {a: null}}", "model.options.a: input should be bool or int or float or str, not None"),
        ("model: {options: {a: [1]}}", "model.options.a"),
        ("train: {accumulate: 5}", "accumulate 5 does not divide batch 64"),
        ("variant: 5", "variant: input should be a valid string"),
        ("x: \x00", "special characters are not allowed"),
    ],
)
def test_bad_files(text: str, said: str, tmp_path: Path) -> None:
    assert said in refused("--config", write(tmp_path, text))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG\xff\xfe")
    assert "not a text" in refused("--config", str(tmp_path / "picture.yaml"))


class Positional(Settings):
    """A command with an argument that has no flag, and several values under one."""

    suite: tyro.conf.Positional[str]
    """Which suite."""
    sides: tuple[int, ...] = (8,)
    """Sides."""
    extra: dict[str, int] = Field(default_factory=dict)


def test_positional_arguments_and_tuples(tmp_path: Path) -> None:
    config = cli.parse(Positional, ["core", "--sides", "8", "16", "--extra.a", "1"], prog="attnbench.sweep")
    assert (config.suite, config.sides, config.extra) == ("core", (8, 16), {"a": 1})
    file = write(tmp_path, "sides: [4, 5]\n")
    assert cli.parse(Positional, ["core", "--config", file]).sides == (4, 5)


@pytest.mark.parametrize(
    ("argv", "said"), [([], "suite is missing; "), (["core", "--sidez", "3"], "did you mean --sides")]
)
def test_beside_a_positional(argv: list[str], said: str) -> None:
    with pytest.raises(Refusal, match=said):
        cli.parse(Positional, argv)


def test_what_tyro_draws_without_an_event_is_still_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_errors, "_fire", lambda event: None)
    monkeypatch.setattr(_errors, "_has_hook", lambda: False)
    assert "--train.steps" in refused("--train.steps", "abc")


def test_help_shows_defaults_config_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.parse(RunConfig, ["--help"])
    shown = capsys.readouterr().out
    assert not end.value.code
    assert "python -m attnbench.run" in shown and "--config FILE.yaml" in shown and "--model.options.NAME" in shown
    assert "(default: 400)" in shown


def test_parsing_never_imports_torch() -> None:
    parsed = "from attnbench import cli, config; cli.parse(config.RunConfig, [])"
    code = f"import sys; {parsed}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def ends(error: BaseException) -> Callable[[list[str] | None], int]:
    def main(argv: list[str] | None = None) -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (Refusal("bad\n  thing; do this"), 2, "bad thing; do this"),
        (KeyboardInterrupt(), 130, "stopped; the same command resumes"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device; free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "out/x"), 2, "out/x: Permission denied; name one"),
    ],
)
def test_command_ends_in_one_line(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.command(ends(error))([]) == status
    shown = capsys.readouterr()
    assert shown.out == "" and said in shown.err and shown.err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("a bug"), FileNotFoundError(errno.ENOENT, "No such file")])
def test_command_hides_no_bug(error: Exception) -> None:
    with pytest.raises(type(error)):
        cli.command(ends(error))([])


def test_command_returns_the_status() -> None:
    assert cli.command(lambda argv: 7)([]) == 7


def script(body: str, folder: Path) -> list[str]:
    (folder / "speak.py").write_text(
        f"import sys\nfrom attnbench.cli import command\n\n@command\ndef main(argv=None):\n    {body}\n    return 0\n\n"
        'if __name__ == "__main__":\n    sys.exit(main())\n',
        encoding="utf-8",
    )
    return [sys.executable, str(folder / "speak.py")]


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    command = script("[print('x' * 1000) for _ in range(10000)]", tmp_path)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert said == b"" and process.returncode == 141


def test_a_strange_package_called_models_is_refused_and_not_imported(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("print('imported')", encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    end = subprocess.run(script("pass", tmp_path), env=environment, capture_output=True, text=True, timeout=60)
    assert end.returncode == 2 and end.stdout == "" and end.stderr.count("\n") == 1
    assert str(tmp_path / "models") in end.stderr and str(ROOT / "models") in end.stderr


def test_our_own_models_are_accepted() -> None:
    cli.check_models()


@pytest.mark.parametrize(
    "argv", [["--stepz", "3"], ["--train.steps", "-5"], ["--model.heads", "3"], ["--config", "no.yaml"]]
)
def test_bad_input_at_the_terminal(argv: list[str], tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "attnbench.run", *argv]
    end = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert end.returncode == 2 and end.stdout == ""
    assert end.stderr.startswith("attnbench.run: ") and end.stderr.count("\n") == 1 and "; " in end.stderr
    assert list(tmp_path.iterdir()) == []
