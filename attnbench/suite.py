"""What a suite is: cells to run, and the rules, declared before the run, by which its verdicts are drawn. No torch.

A suite is a YAML file of attnbench/suites/ (or anyone's own). Example:

    question: Does a window of pixels do as well as all of them?
    blocks:
      - name: windows
        variants: [dense1d, local2d]
        seeds: 3
        settings: {train: {steps: 300}}
        tune: {lr: [1e-3, 3e-3]}
    rules:
      - claim: C4
        says: local2d loses at most 0.02 nats per token against dense1d
        pairs: [{these: {variant: local2d}, those: {variant: dense1d}}]
        expects: below
        threshold: 0.02
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, field_validator, model_validator

from attnbench import schema
from attnbench.config import RunConfig, Scalar, Settings
from attnbench.errors import Refusal, nearest

FOLDER = Path(__file__).with_name("suites")

LARGEST = 100_000
"""Cells that a block may have: a slip of the keyboard is refused, not listed."""

Selector = dict[str, Scalar | tuple[Scalar | None, ...] | None]
"""Which records: a record's own key (variant, family, backend), data, side, or a dotted setting; a list: any of it."""


class Tune(Settings):
    """Learning rates, tried for every setting equally often and chosen by validation; every try stays in the report."""

    lr: tuple[PositiveFloat, ...] = Field(min_length=2)
    """The grid."""
    seeds: PositiveInt = 1
    """The first so many seeds try all of it; the others run at the best."""


class Budget(Settings):
    """What is made equal instead of the number of steps; exactly one of these."""

    flops: PositiveFloat | None = None
    """FLOPs of the whole training."""
    seconds: PositiveFloat | None = None
    """Wall-clock of training on this machine, by the throughput that the same setting was measured to have."""
    bytes: PositiveFloat | None = None
    """Peak memory of training: the widest model that fits."""

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if sum(limit is not None for limit in (self.flops, self.seconds, self.bytes)) != 1:
            raise ValueError("a budget is one of flops, seconds and bytes")
        return self


ELSEWHERE = {
    "variant": "name variants",
    "seed": "name seeds",
    "out": "give the sweep --out",
    "device": "give the sweep --device",
    "force": "give the sweep --force",
}


class Block(Settings):
    """Cells that share settings: every variant × every point of the grid × every seed."""

    name: str
    variants: tuple[str, ...] = Field(min_length=1)
    """Names; `all`; or `family:NAME`."""
    seeds: tuple[int, ...] = Field(min_length=1)
    """Seeds, or how many."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of a run, nested as in its --config file."""
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Dotted setting: the values it takes."""
    tune: Tune | None = None
    budget: Budget | None = None

    @field_validator("variants", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("seeds", mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        if isinstance(value, int) and value > LARGEST:
            raise ValueError(f"{value} seeds are more than {LARGEST}")
        return list(range(value)) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _sensible(self) -> Block:
        for key, way_out in ELSEWHERE.items():
            if key in self.settings or key in self.grid:
                raise ValueError(f"block {self.name}: {key} is no setting of its cells; {way_out}")
        if empty := [path for path, values in self.grid.items() if not values]:
            raise ValueError(f"block {self.name}: grid {empty[0]} has no value")
        count = math.prod(map(len, (self.variants, self.seeds, *self.grid.values())))
        if count > LARGEST:
            raise ValueError(f"block {self.name} has {count:.3g} cells, more than {LARGEST}")
        return self


class Pair(Settings):
    """What is compared with what; a rule about one thing alone has no `those`."""

    these: Selector
    those: Selector | None = None

    def text(self) -> str:
        """In words."""
        return shown(self.these) + (f" against {shown(self.those)}" if self.those is not None else "")


class Rule(Settings):
    """How a verdict is drawn: supported where the whole interval of the effect lies `above` or `below` the threshold,
    as expected; refuted where all of it lies on the other side; else undecided."""

    claim: str = Field(pattern=r"^(C[1-5]|S[12])[a-z]?$")
    """C1 … C5, S1, S2; with a letter for a further statement of the same claim."""
    says: str
    """The statement under test, in words."""
    kind: Literal["difference", "ratio", "exponent", "correlation", "rise-and-fall"] = "difference"
    """difference, ratio: of the metric, these against those, paired by seed (and by test image for likelihood).
    exponent: of the metric as a power of `against`. correlation: rank correlation of the metric with `against`.
    rise-and-fall: by how much the probe's best depth beats the better of the first and the last, both chosen on other
    seeds."""
    metric: str = "nats_per_token"
    against: str = "tokens"
    pairs: tuple[Pair, ...] = Field(min_length=1)
    """The effect is the mean over these; all of them must have been run."""
    where: Selector = Field(default_factory=dict)
    """Further conditions on every record."""
    expects: Literal["above", "below"]
    threshold: float
    """The smallest effect of interest, on the scale of the effect."""
    level: float = Field(default=0.95, gt=0.5, lt=1)
    equal: Literal["steps", "flops", "seconds", "bytes"] = "steps"
    """What the two runs of a pair had equally much of, within 5 %: steps; FLOPs or seconds of the whole training, or
    peak bytes, whatever the steps or the width that took."""
    exact: bool = False
    """The metric follows from the definition (parameters, FLOPs): one run says all."""
    correction: str | None = None
    """Where the statement is refuted, it is misstated: the correction of claims.yaml that says how it really is."""

    @model_validator(mode="after")
    def _two_sides(self) -> Rule:
        if self.kind in ("difference", "ratio") and any(pair.those is None for pair in self.pairs):
            raise ValueError(f"rule {self.claim}: a {self.kind} needs both these and those")
        return self

    def text(self) -> str:
        """The rule in one line, as it stands in verdicts.csv."""
        pairs = "; ".join(pair.text() for pair in self.pairs)
        on = f" on {shown(self.where)}" if self.where else ""
        over = f" over {self.against}" if self.kind in ("exponent", "correlation") else ""
        on += f" at equal {self.equal}" if self.equal != "steps" else ""
        rule = f"expected {self.expects} {self.threshold:g} at {self.level:.0%}"
        return f"{self.kind} of {self.metric}{over}: {pairs}{on}; {rule}"


class Suite(Settings):
    """Blocks of cells and rules of verdicts."""

    name: str
    question: str
    """What it answers."""
    rank: int = 0
    """Where several suites judge the same claim, the one of the highest rank that has records leads."""
    includes: tuple[str, ...] = ()
    """Other suites, whose cells and rules are part of this one."""
    blocks: tuple[Block, ...] = ()
    rules: tuple[Rule, ...] = ()


class Cell(Settings):
    """One run that a suite wants. `key` is the same for all learning rates and seeds of a setting."""

    config: RunConfig
    block: str
    key: str
    budget: Budget | None = None


def names() -> list[str]:
    """The suites that come with attnbench."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Suite:
    """A suite by its name or by the path of a YAML file, with what it includes. Raises Refusal."""
    return _load(name, ())


def packaged() -> list[Suite]:
    """Every suite that comes with attnbench, without what it includes: rules are then met once."""
    return [_parse(FOLDER / f"{name}.yaml") for name in names()]


def _load(name: str, above: tuple[str, ...]) -> Suite:
    if name in above:
        raise Refusal(f"suite {name} includes itself; take it out of {above[-1]}")
    own = _parse(_find(name))
    parts = [_load(other, (*above, name)) for other in own.includes]
    theirs = [b.model_copy(update={"name": f"{part.name}/{b.name}"}) for part in parts for b in part.blocks]
    rules = itertools.chain.from_iterable(part.rules for part in [*parts, own])
    blocks = (*theirs, *own.blocks)
    for index, block in enumerate(blocks):
        if block.name in {other.name for other in blocks[:index]}:
            raise Refusal(f"suite {name} has two blocks called {block.name}; give each a name of its own")
    return own.model_copy(update={"blocks": blocks, "rules": tuple(rules)})


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    if name in names():
        return FOLDER / f"{name}.yaml"
    raise Refusal(f"unknown suite {name!r}, and no FILE.yaml; {nearest(name, names())}")


def _parse(path: Path) -> Suite:
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), schema.Loader)
        if not isinstance(found, dict):
            raise Refusal(f"{path}: holds no suite; write `question:`, `blocks:` and `rules:`")
        return Suite.model_validate({"name": path.stem} | found)
    except OSError as error:
        raise Refusal(f"{path}: {error.strerror}; name a suite of {', '.join(names())} or a readable file") from None
    except UnicodeDecodeError:
        raise Refusal(f"{path}: not a text in UTF-8; a suite is a YAML file") from None
    except yaml.YAMLError as error:
        raise Refusal(f"{path}: {schema.yaml_cause(error)}; mend the file") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Refusal(
            f"{path}: {where or 'suite'}: {first['msg'].removeprefix('Value error, ')}; mend the file"
        ) from None


def cells(suite: Suite, known: Mapping[str, str], base: RunConfig) -> list[Cell]:
    """Every cell of a suite but those that must wait for tuning; seeds outermost, so that what is early is balanced.

    `known`: the families of the variants by name; `base`: settings that every cell has (out, device). A cell that tunes
    stands once for every learning rate. Raises Refusal for an unknown variant or setting.
    """
    found = [cell for block in suite.blocks for cell in _block(suite.name, block, known, base)]
    return sorted(found, key=lambda cell: cell.config.seed)


def _block(suite: str, block: Block, known: Mapping[str, str], base: RunConfig) -> Iterator[Cell]:
    points = [dict(zip(block.grid, values, strict=True)) for values in itertools.product(*block.grid.values())]
    for variant, point, seed in itertools.product(_variants(suite, block, known), points, block.seeds):
        told = copy.deepcopy(block.settings)
        for path, value in point.items():
            schema.put(told, path, value)
        config = _config(f"suite {suite}, block {block.name}", {"variant": variant, **told, "seed": seed}, base)
        key = f"{block.name}/{variant}/" + ",".join(f"{path}={value}" for path, value in point.items())
        for tried in _rates(block, config):
            yield Cell(config=tried, block=block.name, key=key, budget=block.budget)


def _rates(block: Block, config: RunConfig) -> list[RunConfig]:
    if block.tune is None:
        return [config]
    return [at_rate(config, lr) for lr in block.tune.lr]


def at_rate(config: RunConfig, lr: float) -> RunConfig:
    """The run at another learning rate."""
    return config.model_copy(update={"train": config.train.model_copy(update={"lr": lr})})


def _config(place: str, told: dict[str, Any], base: RunConfig) -> RunConfig:
    try:
        config = RunConfig.model_validate(told)
    except ValidationError as error:
        raise Refusal(f"{place}: {schema.explain(error, RunConfig)}") from None
    return config.model_copy(update={"out": base.out, "device": base.device, "force": base.force})


def _variants(suite: str, block: Block, known: Mapping[str, str]) -> list[str]:
    """The names that a block asks for, in its order. A FILE:CLASS is somebody's own and is passed on."""
    found: list[str] = []
    for name in block.variants:
        if name == "all":
            found += known
        elif name.startswith("family:"):
            family = name.removeprefix("family:")
            members = [variant for variant, own in known.items() if own == family]
            if not members:
                raise _unknown(suite, block, "family", family, known.values())
            found += members
        elif name in known or ":" in name:
            found.append(name)
        else:
            raise _unknown(suite, block, "variant", name, known)
    return list(dict.fromkeys(found))


def _unknown(suite: str, block: Block, what: str, name: str, known: Any) -> Refusal:
    return Refusal(f"suite {suite}, block {block.name}: unknown {what} {name!r}; {nearest(name, known)}")


def shown(selector: Selector) -> str:
    """A selector in words: the variant first, then what else is asked."""
    rest = dict(selector)
    head = [str(rest.pop("variant"))] if isinstance(rest.get("variant"), str) else []
    for path, value in rest.items():
        values = value if isinstance(value, tuple) else (value,)
        head.append(f"{path.rpartition('.')[2]} {'|'.join(str(v) for v in values)}")
    return " ".join(head) or "everything"
