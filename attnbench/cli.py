"""From a command line and a YAML file to one checked configuration, and from an exception to one line. No torch.

Precedence: a flag, then the file of --config, then the field's default. Flags are tyro's; what tyro finds wrong
reaches us through its hook for parse errors, so that a person reads one line and not a drawn box.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import tyro
from pydantic import BaseModel, ValidationError
from tyro import _errors as failures  # the only structured account of what is wrong; pyproject.toml bounds the version

from attnbench import schema
from attnbench.errors import Refusal

Config = TypeVar("Config", bound=BaseModel)


class Main(Protocol):
    """A command: its arguments (the process's own by default) to its exit status."""

    def __call__(self, argv: list[str] | None = None) -> int: ...


WAYS_OUT = {
    errno.ENOSPC: "free some space or name another folder",
    errno.EDQUOT: "free some space or name another folder",
    errno.EROFS: "name a folder that can be written",
    errno.EACCES: "name one that this user may read and write",
    errno.EPERM: "name one that this user may read and write",
}


def parse(
    config_class: type[Config],
    argv: Sequence[str] | None = None,
    prog: str = "attnbench.run",
    description: str | None = None,
) -> Config:
    """The configuration that a command line (sys.argv's by default) asks for.

    Beside tyro's flags (`--train.steps 500`) it knows `--config FILE.yaml`, and for every dictionary of options
    `--model.options.NAME VALUE`, whose values are read as YAML scalars.

    Raises:
        Refusal: an unknown flag or key, a wrong type, a value that a validator rejects, an unreadable file.
        SystemExit: status 0, after --help.
    """
    left, file = _take_config(list(sys.argv[1:] if argv is None else argv))
    left, options = _take_options(left, schema.dictionaries(config_class))
    told = schema.read(file, config_class) if file is not None else {}
    schema.merge(told, options)
    flags = schema.flags(config_class)
    with _one_line(config_class, flags):
        return tyro.cli(
            config_class,
            args=left,
            prog=f"python -m {prog}",
            description=_description(config_class, description),
            default=schema.unchecked(config_class, told) if told else tyro.MISSING_NONPROP,
        )


def command(main: Callable[[list[str] | None], int], stopped: str = "stopped; the same command resumes") -> Main:
    """Wraps a command's main: its exit status is returned, and what a person must read is one line on stderr.

    2 for a Refusal and for files that cannot be read or written, 130 for Ctrl-C (saying `stopped`), 141 for a closed
    pipe. Also refuses to start beside a stranger's package called `models`.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        warnings.formatwarning = lambda message, *place: f"{message}\n"  # where in the code it was is nobody's concern
        try:
            check_models()
            status = main(argv)
            sys.stdout.flush()
            return status
        except Refusal as refusal:
            return _say(main, str(refusal), 2)
        except KeyboardInterrupt:
            return _say(main, stopped, 130)
        except BrokenPipeError:
            # Nobody reads on: what is still buffered must not raise again when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except OSError as error:
            if error.errno not in WAYS_OUT:
                raise
            cause = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
            return _say(main, f"{cause}; {WAYS_OUT[error.errno]}", 2)

    return run


def check_models() -> None:
    """Refuses when `import models` would find another package than the one beside attnbench; imports neither."""
    own = Path(__file__).resolve().parent.parent / "models"
    try:
        spec = importlib.util.find_spec("models")
    except ValueError:  # a module without a spec was put there by hand
        spec = None
    found = Path(spec.origin).resolve() if spec is not None and spec.origin else None
    if found is not None and found == own / "__init__.py":
        return
    if found is None:
        raise Refusal(f"attnbench's own package models is not importable from {own}; install attnbench again")
    place = found.parent if found.name == "__init__.py" else found
    raise Refusal(f"import models finds {place}, not attnbench's own {own}; start elsewhere or clear PYTHONPATH")


def _say(main: Callable[..., int], text: str, status: int) -> int:
    spec = getattr(main, "__globals__", {}).get("__spec__")
    prog = spec.name if spec is not None else main.__module__
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
    print(f"{prog}: {line}", file=sys.stderr)
    return status


def _description(config_class: type[BaseModel], text: str | None) -> str:
    text = text or (config_class.__doc__ or "").strip().splitlines()[0]
    return f"{text}\n--config FILE.yaml reads settings from a file, nested as the flags are dotted; flags win."


def _take_config(argv: list[str]) -> tuple[list[str], Path | None]:
    """argv without `--config FILE` or `--config=FILE`, and the file."""
    left: list[str] = []
    files: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        if token == "--config":
            files.append(next(tokens, ""))
        elif token.startswith("--config="):
            files.append(token.removeprefix("--config="))
        else:
            left.append(token)
    if len(files) > 1:
        raise Refusal("--config is given twice; put all settings into one file")
    if files and (not files[0] or files[0].startswith("--")):
        raise Refusal("--config lacks its file; write --config FILE.yaml")
    return left, Path(files[0]) if files else None


def _take_options(argv: list[str], paths: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """argv without the entries of dictionaries, and those entries, nested.

    Two spellings: `--model.options.radius 5` (or `=5`), and `--model.options radius 5 mode x`.
    """
    left: list[str] = []
    found: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        token, *rest = rest
        flag, equals, value = token.partition("=")
        path = next((p for p in paths if flag == f"--{p}" or flag.startswith(f"--{p}.")), None)
        if path is None:
            left.append(token)
            continue
        key = flag.removeprefix(f"--{path}").removeprefix(".")
        pairs = [key] if key else []
        if equals:
            pairs.append(value)
        while rest and not rest[0].startswith("--") and not (key and len(pairs) == 2):
            pairs.append(rest.pop(0))
        if len(pairs) % 2 or not pairs:
            raise Refusal(f"--{path} lacks a value; write --{path}.NAME VALUE")
        for name, text in zip(pairs[::2], pairs[1::2], strict=True):
            schema.put(found, f"{path}.{name.replace('-', '_')}", schema.scalar(text, f"--{path}.{name}"))
    return left, found


@contextlib.contextmanager
def _one_line(config_class: type[BaseModel], flags: Sequence[str]) -> Iterator[None]:
    """Turns tyro's every way of refusing a command line into a Refusal."""

    def hook(event: failures.ParseErrorEvent) -> None:
        raise Refusal(_explain(event, config_class, flags))

    drawn = io.StringIO()
    try:
        with failures.on_parse_error(hook), contextlib.redirect_stderr(drawn):
            yield
    except SystemExit as end:
        if not end.code:
            raise
        # A failure without an event: what tyro drew, without the drawing.
        words = re.sub(r"[─-╿]+", " ", drawn.getvalue()).split()
        raise Refusal(f"{' '.join(words) or 'bad command line'}; --help lists the flags") from None


def _explain(event: failures.ParseErrorEvent, config_class: type[BaseModel], flags: Sequence[str]) -> str:
    match event:
        case failures.UnrecognizedArgs(tokens=[first, *_]):
            return _unknown(first, flags)
        case failures.MissingArgs(unrecognized_tokens=[first, *_]) if first.startswith("-"):
            return _unknown(first, flags)
        case failures.MissingArgs(missing_arguments=missing):
            return f"{', '.join(m.arg.display_name() for m in missing)} is missing; --help shows the usage"
        case failures.InvalidChoice(argument=argument, value=value, choices=choices):
            return f"{_name(argument)} cannot be {value!r}; choose from {', '.join(choices)}"
        case failures.BadValue(argument=argument) if argument.is_positional():
            return f"{_name(argument)} is missing; --help shows the usage"
        case failures.BadValue(argument=argument):
            return f"{_name(argument)} lacks its value; write {_name(argument)} {argument.lowered.metavar}"
        case failures.InstantiationFailure(argument=None, message=message):
            invalid = _cause(sys.exception())
            return schema.explain(invalid, config_class) if invalid else message
        case failures.InstantiationFailure(argument=argument, message=message) if argument is not None:
            given = re.findall(r"'([^']*)'", message)[-1:]
            wrong = f"cannot be {given[0]!r}" if given else message
            return f"{_name(argument)} {wrong}; it takes {argument.lowered.metavar}"
    return f"bad command line ({type(event).__name__}); --help shows the usage"


def _name(argument: Any) -> str:
    """A flag's longest spelling, or a positional's name."""
    return str(max(argument.display_name().split("/"), key=len))


def _cause(error: BaseException | None) -> ValidationError | None:
    """The validation error under tyro's own."""
    while error is not None and not isinstance(error, ValidationError):
        error = error.__cause__ or error.__context__
    return error


def _unknown(token: str, flags: Sequence[str]) -> str:
    if not token.startswith("-"):
        return f"unexpected argument {token!r}; --help shows the usage"
    flag = token.partition("=")[0]
    near = schema.nearest_flag(flag, flags)
    if near == flag:
        return f"{flag} is no flag; give its value alone, without {flag}"
    return f"unknown flag {flag}; " + (f"did you mean {near}?" if near else "--help lists the flags")
