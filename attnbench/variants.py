"""Variants by name: the catalogue's, or anyone's own attention as module:Class or path/to/file.py:Class."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import multiprocessing
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import models
from attnbench.config import RunConfig
from attnbench.errors import Refusal
from models import Mixer, Variant
from models.registry import choose

_CODES: dict[str, str] = {}


def find(name: str) -> Variant:
    """The variant of that name; an own attention is imported, which runs its code, and registered under this name.

    A line on stderr says whose code runs. Call it with what a person named, never with what stands in a record alone.
    Raises Refusal for an unknown name, a module that is not found or fails, a class that is no attention.
    """
    if name in models.VARIANTS:
        return models.VARIANTS[name]
    if ":" not in name:
        raise Refusal(str(choose("variant", name, models.VARIANTS)))
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise Refusal(f"variant {name!r} names no class; write module:Class or path/to/file.py:Class")
    cls = getattr(_module(place), attribute, None)
    if not (isinstance(cls, type) and issubclass(cls, Mixer)):
        raise Refusal(f"{place} has no class {attribute!r} that derives from models.Mixer; name one that does")
    register = models.variant(
        name,
        family=getattr(cls, "family", "own"),
        time=getattr(cls, "time", "O(n²)"),
        memory=getattr(cls, "memory", "O(n²)"),
        summary=(cls.__doc__ or "somebody's own").strip().splitlines()[0],
        reference=f"own: {Path(place).name}",
        position=getattr(cls, "position", "learned1d"),
        objectives=tuple(getattr(cls, "objectives", models.OBJECTIVES)),
    )
    register(cls)
    _CODES[name] = _code(name, cls)
    return models.VARIANTS[name]


def attends(name: str) -> bool:
    """Whether the variant is an attention in the trunk, not a model of its own.  Raises Refusal as `find`."""
    return issubclass(find(name).cls, Mixer)


def code(name: str) -> str | None:
    """What anyone's own attention ran: a hash of the file that defines its class; None for the catalogue's.

    Raises Refusal as `find`.
    """
    find(name)
    return _CODES.get(name)


def _code(name: str, cls: type) -> str:
    try:
        source = Path(inspect.getfile(cls)).read_bytes()
    except (TypeError, OSError) as error:
        raise Refusal(f"{name} is defined in no file, by which its runs are told apart; write it into one") from error
    return hashlib.sha256(source).hexdigest()[:16]


@functools.cache
def untold(name: str) -> Mapping[str, Any]:
    """What a variant of the catalogue has where nothing is told: its `position`, each `model.options.NAME`.

    Empty for anyone's own attention, whose code would have to run.
    """
    if name not in models.VARIANTS:
        return {}
    known = models.VARIANTS[name]
    options = {f"model.options.{option}": value for option, value in models.options(name).items()}
    return options | ({"position": known.position} if attends(name) else {})


def mixer(name: str) -> str:
    """What is left of a variant without its position: of those that differ in nothing else, the family."""
    known = models.VARIANTS.get(name)
    alike = [other for other in models.VARIANTS.values() if known and other.cls is known.cls]
    return known.family if known and len(alike) > 1 else name


def plain(config: RunConfig) -> RunConfig:
    """The same run without what it would have untold: however it was told, it has one id."""
    own = untold(config.variant)
    options = {
        name: value for name, value in config.model.options.items() if own.get(f"model.options.{name}", ...) != value
    }
    position = None if config.position == own.get("position") else config.position
    return config.model_copy(
        update={"position": position, "model": config.model.model_copy(update={"options": options})}
    )


def with_objective(config: RunConfig) -> RunConfig:
    """The run with the variant's own objective where none was chosen: a model that is told the classes has no other.

    Raises Refusal as `find`.
    """
    objectives = find(config.variant).objectives
    if config.model.objective in objectives or config.model.objective != RunConfig().model.objective:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"objective": objectives[0]})})


def _module(place: str) -> ModuleType:
    """Imports a module by name, from the present folder too, or from a file by its path."""
    file = Path(place if place.endswith(".py") else place.replace(".", "/") + ".py")
    try:
        if place.endswith(".py") and not file.exists():
            raise ModuleNotFoundError("there is no such file")
        if not file.exists():
            return _installed(place)
        name = f"attnbench_own_{file.stem}"
        if name in sys.modules and getattr(sys.modules[name], "__file__", None) == str(file.resolve()):
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, file.resolve())
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        _say(spec.origin)
        spec.loader.exec_module(module)
        return module
    except ModuleNotFoundError as error:
        raise Refusal(f"{place}: {error}; name a module that Python finds from here, or a file by its path") from error
    except Exception as error:
        raise Refusal(f"{place} cannot be imported: {type(error).__name__}: {error}; mend it") from error


def _installed(place: str) -> ModuleType:
    """A module by its name."""
    if place not in sys.modules and (spec := importlib.util.find_spec(place.partition(".")[0])) is not None:
        _say(spec.origin or place)
    return importlib.import_module(place)


def _say(origin: str | None) -> None:
    """Whose code is about to run, once a command: not again in each of its processes."""
    if multiprocessing.parent_process() is None:
        print(f"running the code of {origin}, which was named as the attention", file=sys.stderr)
