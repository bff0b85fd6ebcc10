"""`python -m attnbench.compare A B`: two folders of results side by side, for a change of code or of machine.

Runs of the same configuration are paired by id, so by seed, and by test image. A figure is worse where its whole
interval lies beyond what is tolerated; then, or where a run that ended well no longer does, the exit status is 1.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import NonNegativeFloat

from attnbench import cli, record
from attnbench.config import Settings
from attnbench.errors import Refusal


class CompareConfig(Settings):
    """Two folders of results side by side; exit status 1 where the second is worse beyond what is tolerated."""

    a: Annotated[Path, tyro.conf.Positional]
    """Folder of results before."""
    b: Annotated[Path, tyro.conf.Positional]
    """Folder of results after."""
    nats: NonNegativeFloat = 0.01
    """Tolerated rise of nats per token."""
    accuracy: NonNegativeFloat = 0.02
    """Tolerated fall of the best probe accuracy."""
    memory: NonNegativeFloat = 0.05
    """Tolerated rise of peak memory, as a share."""
    speed: NonNegativeFloat = 0.2
    """Tolerated fall of throughput, as a share."""


@dataclass(frozen=True)
class Row:
    """One figure of one setting in both folders; `change`, its ends and `tolerated` on a scale where more is worse."""

    setting: str
    context: str
    metric: str
    before: float
    after: float
    change: float
    low: float | None
    high: float | None
    seeds: int
    tolerated: float

    @property
    def worse(self) -> bool:
        """Beyond what is tolerated, with the whole interval where there is one."""
        return (self.change if self.low is None else self.low) > self.tolerated


@dataclass(frozen=True)
class Metric:
    """A figure that is compared: how a change is measured so that more is worse, and how it is written."""

    name: str
    change: Callable[[float, float], float]
    tolerance: Callable[[CompareConfig], float]
    form: str
    unit: str


def _log_ratio(numerator: float, denominator: float) -> float:
    return math.log(numerator / denominator) if numerator > 0 and denominator > 0 else math.nan


METRICS = (
    Metric("nats_per_token", lambda a, b: b - a, lambda c: c.nats, "{:.4f}", "nats/token"),
    Metric("probe_accuracy_best", lambda a, b: a - b, lambda c: c.accuracy, "{:.3f}", "accuracy"),
    Metric("train_peak_bytes", lambda a, b: _log_ratio(b, a), lambda c: math.log1p(c.memory), "{:,.0f}", "bytes"),
    *(
        Metric(f"{phase}_images_per_second", lambda a, b: _log_ratio(a, b), lambda c: -math.log1p(-min(c.speed, 0.999)),
               "{:,.1f}", "images/s")
        for phase in ("train", "eval", "sample")
    ),
)  # fmt: skip


def compare(before: Path, after: Path, config: CompareConfig) -> tuple[list[Row], list[str]]:
    """Every figure that both folders have, and a line for every run that is lost. Raises Refusal if none is shared."""
    from attnbench import frame

    old, new = ({done["id"]: done for done in _read(folder)} for folder in (before, after))
    shared = [name for name in old if name in new]
    if not shared:
        raise Refusal(f"{before} and {after} have no run in common; compare folders that ran the same suite")
    lost = [
        f"{name} ended well before and in {new[name]['status']} now: {new[name].get('reason') or 'no reason given'}"
        for name in shared
        if _well(old[name]) and not _well(new[name])
    ]
    lost += [f"{name} ended well before and is not there now" for name in old if name not in new and _well(old[name])]
    both = [name for name in shared if _well(old[name]) and _well(new[name])]
    runs = frame.frame([old[name] for name in both])
    rows = [
        row
        for setting, context, names in _settings(runs)
        for metric in METRICS
        if (row := _row(metric, config, setting, context, [(old[name], new[name]) for name in names])) is not None
    ]
    return rows, lost


def _settings(runs: Any) -> Iterator[tuple[str, str, list[str]]]:
    """(setting, context, ids) of all runs: a setting at every rate that was tried, the rate said where there are some.

    The frame's choice of a rate is of no use here: it may have been another before.
    """
    for (context, setting), tries in runs.groupby(["context", "setting"], sort=False):
        for lr, own in tries.groupby("lr", sort=False, dropna=False):
            yield f"{setting} lr={lr:g}" if tries["lr"].nunique() > 1 else str(setting), str(context), list(own["id"])


def _well(done: dict[str, Any]) -> bool:
    return bool(done["status"] == "ok")


def _read(folder: Path) -> list[dict[str, Any]]:
    if not folder.is_dir():
        raise Refusal(f"{folder} is no folder; name a folder of results that has runs/ in it")
    records, problems = record.read_all(folder)
    for problem in problems:
        print(problem, file=sys.stderr)
    return records


def _row(
    metric: Metric, config: CompareConfig, setting: str, context: str, couples: list[tuple[Any, Any]]
) -> Row | None:
    import numpy as np

    from attnbench import frame, stats

    known = [
        (a, b, x, y)
        for a, b in couples
        if (x := frame.number(frame.part(a, "metrics").get(metric.name))) is not None
        and (y := frame.number(frame.part(b, "metrics").get(metric.name))) is not None
    ]
    if not known:
        return None
    images = [_images(a, b, y - x) for a, b, x, y in known] if metric.name == "nats_per_token" else [None]
    if all(one is not None for one in images) and len({len(one) for one in images if one is not None}) == 1:
        values = np.asarray(images, dtype=float)
    else:
        values = np.asarray([[metric.change(x, y)] for _, _, x, y in known])
    if not np.isfinite(values).all():
        return None
    found = stats.interval(values)
    low, high = found.low, found.high
    if low is None and values.shape[1] > 1:
        low, high = stats.unit_interval(values[0].tolist())  # one seed: what its test images say
    before, after = float(np.mean([x for _, _, x, _ in known])), float(np.mean([y for _, _, _, y in known]))
    tolerated = metric.tolerance(config)
    return Row(setting, context, metric.name, before, after, found.estimate, low, high, len(known), tolerated)


def _images(a: Any, b: Any, change: float) -> Any:
    """Differences by test image; None where the images or the reported means do not agree."""
    from attnbench import frame

    left, right = a.get("per_image_nats"), b.get("per_image_nats")
    same = a.get("data", {}).get("checksum") == b.get("data", {}).get("checksum")
    if not isinstance(left, list) or not isinstance(right, list) or len(left) != len(right) or not left or not same:
        return None
    both = frame.numbers([left, right])
    if both is None:
        return None
    found = both[1] - both[0]
    return found if math.isclose(float(found.mean()), change, abs_tol=1e-4) else None


def table(rows: list[Row]) -> Any:
    """The rows as a rich table, what is worse in red and with a word."""
    from rich.markup import escape
    from rich.table import Table

    forms = {metric.name: metric for metric in METRICS}
    out = Table(title="before and after", title_justify="left")
    for name in ("setting", "figure", "before", "after", "worse by (95 % interval)", "n", ""):
        out.add_column(name, overflow="fold")
    for row in rows:
        metric = forms[row.metric]
        written = [metric.form.format(value) for value in (row.before, row.after)]
        ratio = metric.unit in ("bytes", "images/s")
        ends = (
            "" if row.low is None or row.high is None else f" ({_change(row.low, ratio)} to {_change(row.high, ratio)})"
        )
        style = "red" if row.worse else None
        place = escape(f"{row.setting} on {row.context}")
        change, verdict = _change(row.change, ratio) + ends, "worse" if row.worse else ""
        out.add_row(place, f"{row.metric} ({metric.unit})", *written, change, str(row.seeds), verdict, style=style)
    return out


def _change(value: float, ratio: bool) -> str:
    return f"{math.expm1(value):+.1%}" if ratio else f"{value:+.4f}"


def main(argv: list[str] | None = None) -> int:
    config = cli.parse(CompareConfig, argv, prog="attnbench.compare")
    from rich.console import Console

    rows, lost = compare(config.a, config.b, config)
    console = Console()
    console.print(table(rows))
    for line in lost:
        console.print(line, markup=False, soft_wrap=True)
    worse = sum(row.worse for row in rows) + len(lost)
    print(f"{worse} worse beyond what is tolerated, of {len(rows)} figures and {len(lost)} lost runs")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(cli.command(main)())
