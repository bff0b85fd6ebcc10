"""Time and memory against sequence length: `python -m attnbench.cost --variants local2d,linear --sides 16,32,64`.

Every cell is measured in children of its own: times by turns with the baseline's (the default variant), peak bytes
alone. A cell that does not fit is a row that says so. Each is a record in out/costs.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from attnbench import cli, schema
from attnbench.config import (
    Memory,
    ModelConfig,
    RunConfig,
    Scalar,
    Settings,
    TrainConfig,
    WholeNumbers,
    numbers,
    size_of,
    threads,
)
from attnbench.curves import BATCH, PRECISION, SHAPE, by_place, curves, label, quartiles, rival_label
from attnbench.errors import Refusal, nearest
from attnbench.goals import Goal, Scope, judged
from attnbench.plan import PRESETS

FOLDER = Path(__file__).with_name("costs")
ROOM = "costs"
"""The folder beside runs/ where cost records lie."""

VOCAB = 256
WIDTH = 150
"""Columns that the table needs."""

PEAKS = 4
"""Peaks of a cell that malloc holds before it is timed: the subject's and the baseline's tensors, and gaps between."""

LONGEST = 10**6
"""Seconds: no process is waited for longer than eleven days."""

LEFT = "not run"
"""What the table says of a cell for which a suite's seconds did not suffice; it is no record's status."""


class CostConfig(Settings):
    """Measures attention and training steps against the number of tokens; fits exponents, finds crossovers."""

    variants: str = "all"
    """Names, separated by commas; the default variant is the baseline of every ratio."""
    sides: WholeNumbers = "16,32,64,128,256"
    """Sides of the image, separated by commas."""
    suite: str | None = None
    """Cells that are declared in a file of attnbench/costs, gpu, and with them all settings but --out and --force."""
    batch: PositiveInt = BATCH
    """Images at a time."""
    budget: PositiveFloat = 3.0
    """Seconds of timing a cell and scope."""
    limit: Annotated[PositiveFloat, Field(le=LONGEST)] = 60.0
    """Seconds after which a cell is given up."""
    memory: Memory = "8GB"
    """Bytes that a cell may use."""
    out: Path = Path("results")
    """Folder of results."""
    force: bool = False
    """Measure again what is measured."""

    @model_validator(mode="after")
    def _suite_alone(self) -> CostConfig:
        told = [f"--{name}" for name in self.model_dump(exclude_defaults=True, exclude={"suite", "out", "force"})]
        if self.suite is not None and told:
            raise ValueError(f"suite {self.suite} says that itself; leave out {', '.join(told)}, or --suite")
        return self


class CellsConfig(Settings):
    """Cells of one scope: variants × sides."""

    variants: tuple[str, ...] = Field(min_length=1)
    scope: Scope
    sides: tuple[PositiveInt, ...] = Field(min_length=1)
    batch: PositiveInt = BATCH
    preset: str | None = None
    compile: bool = False
    backend: str = "auto"
    """The variants' implementation; the baseline's is left open."""
    decoding: bool = True
    """Time decoding too, slot by slot, which takes long for many slots."""
    options: dict[str, dict[str, Scalar]] = Field(default_factory=dict)


class CostSuite(Settings):
    """A declared set of cells."""

    needs: Literal["cpu", "cuda"] = "cpu"
    seconds: PositiveFloat
    """All of it takes no longer: what is not measured by then is left for the next time."""
    budget: PositiveFloat
    """Seconds of timing a cell, in place of --budget."""
    limit: PositiveFloat
    """Seconds after which a cell is given up, in place of --limit."""
    memory: Memory
    """Bytes that a cell may use, in place of --memory."""
    precision: Literal["float32", "bfloat16"] = "float32"
    goals: tuple[Goal, ...] = ()
    cells: tuple[CellsConfig, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Cell:
    """What is measured: a run's settings at a side, and which part of it."""

    config: RunConfig
    side: int
    scope: Scope
    decoding: bool = True

    @property
    def id(self) -> str:
        """From the settings that are not at their default alone, as a run's."""
        from attnbench import record

        told = {"side": self.side, "scope": self.scope, **self.config.identity(exclude_defaults=True)}
        told |= {} if self.decoding else {"decoding": False}
        told |= {} if self.config.code is None else {"code": self.config.code}
        digest = hashlib.sha256(record.canonical(told)).hexdigest()[:10]
        return f"{record._slug(self.config.variant)}-{self.scope}-{self.side}-{digest}"


def suite(name: str) -> CostSuite:
    """The declared suite of that name. Raises Refusal."""
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in FOLDER.glob("*.yaml"))
        raise Refusal(f"there is no cost suite {name!r}; {nearest(name, known)}")
    try:
        return CostSuite.model_validate(yaml.load(path.read_text(encoding="utf-8"), schema.Loader))
    except yaml.YAMLError as error:
        raise Refusal(f"{path.name}: {schema.yaml_cause(error)}; mend the file") from error
    except ValidationError as error:
        where, text = schema.wrong(error)
        raise Refusal(f"{path.name}: {'.'.join(where)}: {text}; mend the file") from error


def cells(config: CostConfig) -> list[Cell]:
    """All cells, the baseline's first, the short sequences first. Raises Refusal."""
    if config.suite is not None:
        declared = suite(config.suite)
        return list({cell.id: cell for block in declared.cells for cell in _declared(block, declared)}.values())
    import models
    from attnbench import variants

    named = list(models.VARIANTS) if config.variants == "all" else [n.strip() for n in config.variants.split(",")]
    names, sides = dict.fromkeys([RunConfig().variant, *named]), sorted(numbers(config.sides))
    found = [_cell(name, side, scope, config.batch) for scope in _SCOPES for name in names for side in sides]
    return [cell for cell in found if cell.scope == "step" or variants.attends(cell.config.variant)]


_SCOPES: tuple[Scope, ...] = ("attention", "step")


def _declared(block: CellsConfig, declared: CostSuite) -> Iterator[Cell]:
    for name in block.variants:
        for side in block.sides:
            cell = _cell(name, side, block.scope, block.batch, PRESETS[block.preset] if block.preset else SHAPE)
            chosen = {"options": cell.config.model.options | block.options.get(name, {}), "backend": block.backend}
            model = cell.config.model.model_copy(update=chosen)
            told = {"compile": block.compile, "precision": declared.precision}
            train = cell.config.train.model_copy(update=told)
            update = {"device": declared.needs, "model": model, "train": train}
            yield Cell(cell.config.model_copy(update=update), side, block.scope, block.decoding)


def _cell(name: str, side: int, scope: Scope, batch: int, shape: dict[str, int] = SHAPE) -> Cell:
    import models
    from attnbench import variants

    train = TrainConfig(batch=batch, precision=PRECISION)
    code = variants.code(name)
    same = {"table": False} if "table" in models.options(name) else {}  # else it widens as the trunk's table grows
    model = ModelConfig(**shape, options=same)  # type: ignore[arg-type]
    config = RunConfig(variant=name, code=code, model=model, train=train, device="cpu")
    return Cell(variants.with_objective(config), side, scope)


# --- measuring --------------------------------------------------------------------------------------------------------


def measured(cell: Cell, limits: CostConfig, baseline: bool, ends: float = math.inf) -> dict[str, Any]:
    """The cell's record without its provenance: status, reason, metrics. Never raises for what does not fit.

    `baseline`: whether the baseline is timed by turns with it. `ends`: when all is given up, in seconds since 1970.
    Of a cell that does not end, the phases that did are there.
    """
    from attnbench import duel, measure

    request = measure.Request(cell.config, cell.side, cell.side, VOCAB)
    told: dict[str, Any] = {"request": request.dump(), "scope": cell.scope, "memory": size_of(limits.memory)}
    rival = _rival(cell) if baseline else None
    told |= {"budget": limits.budget, "baseline": rival and rival.dump(), "decoding": cell.decoding, "graphs": True}
    known: dict[str, Any] = {"peak_bytes": None, "backend": None, "phases": {}, "flops": {}}
    status = "ok"
    reasons: list[str] = []
    try:
        if cell.config.device != "cuda":
            _ask("memory", told, limits, ends, known)
            held = PEAKS * known["peak_bytes"]  # large tensors have pages of their own beside what malloc holds
            told["reserve"] = max(0, min(held, told["memory"] - held))
        _time(told | {"kind": "both" if cell.config.device == "cuda" else "time"}, limits, ends, known, reasons)
    except measure.ChildFailed as failed:
        status = _status(failed)
        reasons.append(str(failed))
        if duel.OracleMissed.__name__ in "\n".join(failed.tail):  # what it needs is not the variant's cost
            known["peak_bytes"] = None
    why = {"reason": "; ".join(reasons)[:500]} if reasons else {}
    metrics = {"peak_bytes": known["peak_bytes"]} | _rates(known, cell)
    if cell.config.device == "cuda":
        metrics["fused"] = known.get("fused")
    return {"status": status, **why, "backend": known["backend"], "metrics": metrics}


def _time(told: dict[str, Any], limits: CostConfig, ends: float, known: dict[str, Any], left_out: list[str]) -> None:
    """Adds to what is known every phase, and what a child was not asked for again: CUDA graphs, pages that malloc
    holds, the baseline. Raises ChildFailed.

    Two may not fit where one does; and a process in which a capture failed can go on with nothing.
    """
    from attnbench import duel, measure

    while True:
        try:
            return _ask(told["kind"], told | {"known": [*known["phases"]]}, limits, ends, known)
        except measure.ChildFailed as failed:
            said = "\n".join(failed.tail)
            if told["graphs"] and duel.Uncaptured.__name__ in said:
                without = "graphs"
            elif told.get("reserve") and _status(failed) == "oom":
                without = "reserve"
            elif told["baseline"] and f"{told['request']['config']['variant']} misses its oracle" not in said:
                without = "baseline"
            else:
                raise
            told = told | {without: None}
            left_out.append(f"without {without}: {failed}")


def _ask(kind: str, told: dict[str, Any], limits: CostConfig, ends: float, known: dict[str, Any]) -> None:
    """Adds to what is known a child's answer within the cell's limit and before `ends`. Raises ChildFailed."""
    from attnbench import measure

    now = time.time()
    limit = max(0.0, min(limits.limit, ends - now))
    deadline = now + limit - max(2.0, limit / 20)  # it must have answered and ended by the limit
    failure = None
    try:
        answer = measure.in_child(f"attnbench.duel:{kind}", told | {"deadline": deadline}, limit)
    except measure.ChildFailed as failed:
        answer, failure = failed.answer or {}, failed
    known |= answer | {"phases": known["phases"] | answer.get("phases", {})}
    if failure is not None:
        raise failure


def _status(failed: Any) -> str:
    if failed.out_of_memory or "SIGKILL" in failed.ending:
        return "oom"
    return "timeout" if "took more than" in failed.ending else "crash"


def _rates(found: dict[str, Any], cell: Cell) -> dict[str, Any]:
    """The phases' timings, each with its FLOP/s as a share of the matrix product's; nothing where there are none."""
    from attnbench import duel

    size = duel.product_flops(cell.config.device)
    for phase, timings in found["phases"].items():
        flops = found["flops"].get(phase)
        if flops:
            own, product = flops / timings["own"]["median"], size / timings["product"]["median"]
            timings |= {"flops_per_second": own, "share_of_product": own / product}
    return {"phases": found["phases"], "flops": found["flops"]} if found["phases"] else {}


def _rival(cell: Cell) -> Any:
    """The baseline's request at the same side, batch and shape, to predict pixels; None for the baseline itself."""
    from attnbench import measure

    name = RunConfig().variant
    if cell.config.variant == name:
        return None
    model = cell.config.model.model_copy(update={"options": {}, "backend": "auto", "objective": "ar"})
    config = cell.config.model_copy(update={"variant": name, "code": None, "model": model})
    return measure.Request(config, cell.side, cell.side, VOCAB)


def too_large(cell: Cell, limits: CostConfig) -> str | None:
    """Why the cell is not even tried, by plan; None if it may fit."""
    from attnbench import measure, predict

    if cell.scope == "attention" or cell.config.device == "cuda":
        return None  # there an allocator refuses at once what does not fit
    try:
        need = predict.peak_bytes(measure.Request(cell.config, cell.side, cell.side, VOCAB))
    except Exception:  # too long to trace, or an own attention that fails: the child says how
        return None
    return None if need <= size_of(limits.memory) else f"needs {need / 1e9:,.1f} GB by plan, more than {limits.memory}"


def refused(cell: Cell) -> str | None:
    """Every reason why the backend that was asked for cannot run here, told by a narrow model; None if it can."""
    from attnbench import train

    model = cell.config.model
    if model.backend == "auto":
        return None
    one = model.model_copy(update={"dim": model.dim // model.heads, "heads": 1})
    try:
        train.make_model(cell.config.model_copy(update={"model": one, "device": "cpu"}), cell.side, cell.side, VOCAB)
    except Refusal as refusal:
        return str(refusal)
    return None


def run(
    config: CostConfig, todo: Sequence[Cell], say: Any = lambda cell, done: None, ends: float = math.inf
) -> list[dict[str, Any]]:
    """Measures every cell that is not measured yet, writes its record, and returns all records.

    What is not measured when it `ends`, in seconds since 1970, has no record, but a row with the status LEFT.
    """
    from attnbench import record

    done: list[dict[str, Any]] = []
    for cell in todo:
        found = None if config.force else record.find(config.out, cell.id, "ok", room=ROOM)
        if found is None:
            about = _identity(cell)
            found = about | _result(about, cell, config, done, ends)
            if found["status"] != LEFT:
                record.write(config.out, found, replace=config.force, room=ROOM)
        done.append(found)
        say(cell, found)
    return done


def _result(
    about: dict[str, Any], cell: Cell, config: CostConfig, done: Sequence[dict[str, Any]], ends: float
) -> dict[str, Any]:
    nothing: dict[str, Any] = {"backend": None, "metrics": {"peak_bytes": None}}
    if time.time() >= ends:
        return {"status": LEFT, **nothing}
    if (reason := refused(cell)) is not None:
        return {"status": "crash", "reason": reason, **nothing}
    if (reason := too_large(cell, config)) is not None:
        return {"status": "oom", "reason": reason, **nothing}
    rival = rival_label(about), cell.scope, cell.side
    same = [r["status"] for r in done if (label(r), r["scope"], r["side"]) == rival]
    found = measured(cell, config, "ok" in same or not same, ends)
    return found if found["status"] == "ok" or time.time() < ends else {"status": LEFT, **nothing}


def _identity(cell: Cell) -> dict[str, Any]:
    import models
    from attnbench import record

    return {
        "id": cell.id,
        "kind": "cost",
        "variant": cell.config.variant,
        **({} if cell.config.code is None else {"code": cell.config.code}),
        "family": models.VARIANTS[cell.config.variant].family,
        "scope": cell.scope,
        "side": cell.side,
        "tokens": cell.side**2,
        "config": cell.config.identity(),
        "environment": record.environment(),
    }


# --- the command ------------------------------------------------------------------------------------------------------


def _print(records: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    cost = Table("variant", "scope", "side", "phase", "median ms", "quartiles", "n", "of product", "/ baseline", "MB")
    for r in records:
        phases = r["metrics"].get("phases", {})
        peak = f"{r['metrics']['peak_bytes'] / 1e6:,.1f}" if r["metrics"]["peak_bytes"] else ""
        if r["status"] != "ok":
            cost.add_row(label(r), r["scope"], str(r["side"]), r["status"], "", r.get("reason", ""), "", "", "", peak)
        for phase, t in phases.items():
            own, ratio = t["own"], t.get("ratio")
            low, high = quartiles(own)
            spread = "" if low is None or high is None else f"{low * 1e3:,.2f} to {high * 1e3:,.2f}"
            share = f"{t['share_of_product']:.1%}" if "share_of_product" in t else ""
            against = f"{ratio['median']:.3f}" if ratio else ""
            row = (f"{own['median'] * 1e3:,.2f}", spread, str(own["n"]), share, against, peak)
            cost.add_row(label(r), r["scope"], str(r["side"]), phase, *row)
    console = Console()
    console.width = max(console.width, WIDTH)  # a figure that is cut is no figure
    console.print(cost)
    for (machine, count), cells in by_place(records).items():
        console.print(_fits(cells, f"{machine}, threads: {count}"))


def _fits(records: Sequence[dict[str, Any]], title: str) -> Any:
    """How each cost grows, of the cells of one place."""
    from rich.table import Table

    columns = "variant", "scope", "cost", "exponent in n", "95 %", "points", "last two", "cheaper from image side"
    fits = Table(*columns, title=title, title_justify="left")
    for curve in curves(records):
        fit = curve.fit
        between = "" if fit is None or fit.low is None else f"{fit.low:.2f} to {fit.high:.2f}"
        slope, last = ("" if value is None else f"{value:.2f}" for value in (fit and fit.value, curve.last))
        found = slope, between, str(len(curve.fitted)), last, curve.cheaper_from or ""
        fits.add_row(curve.label, curve.scope, curve.cost, *found)
    return fits


def main(argv: list[str] | None = None) -> int:
    config, ends = cli.parse(CostConfig, argv, prog="attnbench.cost"), math.inf
    goals: tuple[Goal, ...] = ()
    if config.suite is not None:
        declared = suite(config.suite)
        ends, goals = time.time() + declared.seconds, declared.goals
        if declared.needs == "cuda":
            _need_cuda(config.suite)
        config = config.model_copy(update=declared.model_dump(include={"budget", "limit", "memory"}))
    todo = cells(config)
    import torch

    from attnbench import storage

    torch.set_num_threads(threads())  # what the records say is what the children use
    storage.check_writable(config.out)

    def say(cell: Cell, done: dict[str, Any]) -> None:
        if done["status"] != LEFT:
            print(f"{label(done)} {cell.scope} {cell.side}: {done['status']} {done.get('reason', '')}", file=sys.stderr)

    done = run(config, todo, say, ends)
    _print(done)
    for goal in goals:
        print(judged(goal, done))
    if left := [f"{label(r)} {r['scope']} {r['side']}" for r in done if r["status"] == LEFT]:
        print(f"{LEFT}, the suite's time is up: {', '.join(left)}; the same command goes on", file=sys.stderr)
    print(config.out / ROOM)
    return 0


def _need_cuda(name: str) -> None:
    """Raises Refusal, with the reason, where there is no GPU that torch can use."""
    import torch

    if torch.cuda.is_available():
        return
    reason = "no device or no driver answers" if torch.version.cuda else f"torch {torch.__version__} has no CUDA"
    raise Refusal(f"suite {name} needs a CUDA GPU: {reason}; run it where python -m attnbench.doctor shows one")


if __name__ == "__main__":
    sys.exit(cli.command(main, stopped="stopped; the same command goes on")())
