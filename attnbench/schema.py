"""The tree of a configuration: its flags, its YAML file, and what is wrong with either, in words. No torch."""

from __future__ import annotations

import difflib
import itertools
import math
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_origin

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from attnbench.errors import Refusal

Config = TypeVar("Config", bound=BaseModel)

LARGEST = 1_000_000
"""Characters that a YAML file may hold once its aliases are written out: far more than any settings, and no bomb."""


class Loader(yaml.SafeLoader):
    """Plain data only, with the scalars of YAML 1.2: 1e-3 is a number, `on` and `12:30` are words. No key twice.

    What is nested too deeply, or would be too large with its aliases written out, is a YAMLError like any other.
    """

    def get_single_data(self) -> Any:
        """As PyYAML's, but nothing is made of a document before its size is known."""
        try:
            node = self.get_single_node()
            if node is None:
                return None
            if _size(node, {}) > LARGEST:
                mark = node.start_mark
                raise yaml.composer.ComposerError(None, None, "aliases or values beyond any settings' size", mark)
            return self.construct_document(node)
        except RecursionError:
            raise yaml.YAMLError("nested too deeply") from None

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As PyYAML's, but what its tag cannot be made of (`!!int foo`, a number of 5,000 digits) is a YAMLError."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError):
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{_shown(node.value)} cannot be read as {kind}", node.start_mark
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML's, but a repeated key is an error instead of the last one winning."""
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key in mapping:
                raise yaml.constructor.ConstructorError(None, None, f"key {key} stands twice", key_node.start_mark)
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping


def _size(node: yaml.Node, known: dict[int, float]) -> float:
    """Characters and nodes below a node, each alias counted as if written out; infinite where it holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        if isinstance(node, yaml.ScalarNode):
            known[id(node)] = 1 + len(node.value)
        else:
            parts = itertools.chain(*node.value) if isinstance(node, yaml.MappingNode) else node.value
            known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


_DIGITS = "0123456789"
Loader.yaml_implicit_resolvers = {}
for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+" + _DIGITS)),
    ("float", r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", list("-+." + _DIGITS)),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _first)


def leaves(config_class: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting below a configuration, as a dotted path and its field."""
    for name, field in config_class.model_fields.items():
        group = group_of(field)
        if group is None:
            yield prefix + name, field
        else:
            yield from leaves(group, f"{prefix}{name}.")


def group_of(field: FieldInfo) -> type[BaseModel] | None:
    """The settings class that a field holds, or None where it holds a value."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def dictionaries(config_class: type[BaseModel]) -> list[str]:
    """Dotted paths of the fields that are dictionaries, open to any key."""
    return [path for path, field in leaves(config_class) if get_origin(field.annotation) is dict]


def flags(config_class: type[BaseModel]) -> list[str]:
    """The flags of a configuration, for suggestions."""
    return ["--config", "--help", *(f"--{path.replace('_', '-')}" for path, _ in leaves(config_class))]


def nearest_flag(flag: str, known: Sequence[str]) -> str | None:
    """The known flag most like this one, by the whole (--trian.steps) or by its last part alone (--steps)."""
    name = flag.replace("_", "-").removeprefix("--no-").strip("-")

    def likeness(other: str) -> float:
        whole, ends = (name, other.strip("-")), (name.rpartition(".")[2], other.strip("-").rpartition(".")[2])
        # A shared ending is a weaker hint than the same full name, hence the small handicap.
        return max(_ratio(*whole), _ratio(*ends) - 0.01)

    best = max(known, key=likeness)
    return best if likeness(best) >= 0.7 else None


def _ratio(left: str, right: str) -> float:
    return difflib.SequenceMatcher(None, left, right).ratio()


def read(file: Path, config_class: type[BaseModel]) -> dict[str, Any]:
    """The settings of a YAML file, nested, each checked by itself; what must fit together is checked later.

    Raises:
        Refusal: a file that cannot be read or is no mapping, an unknown key (with the nearest known), a wrong value.
    """
    try:
        found = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise Refusal(f"{file}: {error.strerror}; --config wants a readable YAML file") from None
    except UnicodeDecodeError:
        raise Refusal(f"{file}: not a text in UTF-8; --config wants a YAML file") from None
    except yaml.YAMLError as error:
        raise Refusal(f"{file}: {yaml_cause(error)}; mend the file") from None
    if not isinstance(found, dict | None):
        raise Refusal(f"{file}: holds no settings; write them as `key: value` lines")
    return _checked(found or {}, config_class, file, "")


def scalar(text: str, flag: str) -> Any:
    """A flag's text read as a YAML scalar: a number, true, false or a word.  Raises Refusal for anything else."""
    try:
        value = yaml.load(text, Loader)
    except yaml.YAMLError:
        return text
    if not isinstance(value, bool | int | float | str):
        raise Refusal(f"{flag} {text!r} is no number, word, true or false; give one of these")
    return value


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Sets a dotted path in nested dictionaries."""
    *groups, name = path.split(".")
    for group in groups:
        tree = tree.setdefault(group, {})
    tree[name] = value


def merge(tree: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Lays one nested dictionary over another, in place."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            merge(tree[key], value)
        else:
            tree[key] = value


def unchecked(config_class: type[Config], told: Mapping[str, Any]) -> Config:
    """A configuration whose parts are not yet checked against one another: a flag may still put them right."""
    values: dict[str, Any] = {}
    for name, field in config_class.model_fields.items():
        group = group_of(field)
        if group is not None:
            values[name] = unchecked(group, told.get(name, {}))
        elif name in told:
            values[name] = told[name]
    return config_class.model_construct(**values)


def explain(error: ValidationError, config_class: type[BaseModel]) -> str:
    """The first thing that a validation found wrong, with the setting's dotted name, in one line."""
    path, text = wrong(error)
    if error.errors()[0]["type"] == "value_error":  # a validator's own sentence names its settings
        return text if ";" in text else f"{text}; change one of them"
    return f"--{'.'.join([*_path_of(error.title, config_class), *path])}: {text}; --help lists what it takes"


def wrong(error: ValidationError) -> tuple[list[str], str]:
    """Where below the validated thing the first error is, and what is wrong there."""
    errors = error.errors(include_url=False)
    first, where = errors[0], [str(part) for part in errors[0]["loc"]]
    text = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "value_error":
        return where, text
    alike = [e for e in errors if e["loc"][:-1] == first["loc"][:-1]]
    if len(alike) > 1 and len({str(e["input"]) for e in alike}) == 1:  # one value that fits no member of a union
        where, text = where[:-1], "input should be " + " or ".join(str(e["loc"][-1]) for e in alike)
    return where, f"{text[:1].lower() + text[1:]}, not {_shown(first['input'])}"


def _shown(value: object) -> str:
    """A wrong value, cut short where it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    return short.repr(value)


def _path_of(title: str, config_class: type[BaseModel]) -> list[str]:
    """Where in the tree the settings class of this name stands."""
    for name, field in config_class.model_fields.items():
        group = group_of(field)
        if group is not None and group.__name__ == title:
            return [name]
        if group is not None and (below := _path_of(title, group)):
            return [name, *below]
    return []


def _checked(found: Mapping[Any, Any], config_class: type[BaseModel], file: Path, prefix: str) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for key, value in found.items():
        field = config_class.model_fields.get(key)
        path = f"{prefix}{key}"
        if field is None:
            raise Refusal(f"{file}: unknown key {path}; {_suggest(str(key), config_class, prefix)}")
        group = group_of(field)
        if group is None:
            checked[key] = _value(value, field, file, path)
        elif isinstance(value, dict | None):
            checked[key] = _checked(value or {}, group, file, f"{path}.")
        else:
            raise Refusal(f"{file}: {path} is a group of settings; nest them: {', '.join(group.model_fields)}")
    return checked


def _value(value: Any, field: FieldInfo, file: Path, path: str) -> Any:
    """One value as its field wants it."""
    kind: Any = field.annotation
    for constraint in field.metadata:
        kind = Annotated[kind, constraint]
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        below, text = wrong(error)
        raise Refusal(f"{file}: {'.'.join([path, *below])}: {text}; mend the file") from None


def _suggest(key: str, config_class: type[BaseModel], prefix: str) -> str:
    near = difflib.get_close_matches(key, config_class.model_fields, n=1, cutoff=0.6)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    elsewhere = [path for path, _ in leaves(config_class) if path.rpartition(".")[2] == key]
    if elsewhere:
        return f"did you mean {prefix}{elsewhere[0]}?"
    return f"known here: {', '.join(config_class.model_fields)}"


def yaml_cause(error: yaml.YAMLError) -> str:
    """What is wrong with a YAML file, and in which line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error) or "not YAML"
    return f"line {mark.line + 1}: {problem}" if mark else str(problem)
