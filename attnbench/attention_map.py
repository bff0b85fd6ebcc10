"""`python -m attnbench.attention_map RECORD`: is dense attention local by itself (C4); what does a row start cost (C2)?

For a run with softmax attention: the share of each head's attention that stays within radius R of the target, beside
what it would be if all visible pixels were looked at alike; and the likelihood's map, edges against the interior.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro
from pydantic import PositiveInt

from attnbench import cli
from attnbench.config import Settings, WholeNumbers, numbers
from attnbench.errors import Refusal

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor, nn

CHUNK = 8
"""Images whose attention is laid out at a time."""


class AttentionMapConfig(Settings):
    """Where a trained model's attention goes, per layer and head, and where its nats go."""

    record: Annotated[Path, tyro.conf.Positional]
    """The run's record, OUT/runs/ID.json."""
    radii: WholeNumbers = "1,2,3,5,8"
    """Radii in rows and columns, whole numbers with commas between."""
    images: PositiveInt = 64
    """Test images that are looked at."""
    data_root: Path | None = None
    """Folder that holds the data set's files, where the data set needs any."""
    own: str | None = None
    """The attention of somebody's own that the run had, FILE.py:CLASS; its code runs only if it is named here."""
    out: Path | None = None
    """Folder of attention_map.json; that of the run's artifacts, where the report looks for it."""


def attention(model: nn.Module, tokens: Tensor, radii: tuple[int, ...]) -> dict[str, Any]:
    """Of images (count, height, width): per layer, and in it per head, where attention goes; as JSON can hold it.

    `within`, `mean_distance`: of the attention on pixels; `uniform_*`: the same, were all visible pixels looked at
    alike. Raises Refusal for a model without attention weights.
    """
    from models import attention_mass
    from models.igpt import ImageGPT

    if not isinstance(model, ImageGPT):
        raise Refusal(f"{type(model).__name__} is no trunk with attention; choose a run with softmax attention")
    try:
        parts = [attention_mass.measure(model, part, radii) for part in tokens.split(CHUNK)]
        alike = attention_mass.measure(model, tokens[:1], radii, uniform=True)
    except ValueError as error:
        raise Refusal(f"{error}; choose a run with softmax attention") from error
    mass = parts[0]
    for part in parts[1:]:
        mass = mass + part
    return {
        "images": len(tokens),
        "start_share": mass.start_share.tolist(),
        "mean_distance": mass.mean_distance.tolist(),
        "within": {str(radius): mass.share_within(radius).tolist() for radius in radii},
        "uniform_mean_distance": alike.mean_distance[:, 0].tolist(),
        "uniform_within": {str(radius): alike.share_within(radius)[:, 0].tolist() for radius in radii},
    }


def edges(nll_map: list[list[float]] | np.ndarray[Any, Any]) -> dict[str, float | None]:
    """Mean nats per token by place, from a record's nll_map (height, width); None where there is no such pixel.

    row_start_jump: how much more a row's first pixel costs than the one before it in the sequence, the last of the row
    above; row_start_excess: how much more than the interior.
    """
    nats = np.asarray(nll_map, dtype=np.float64)

    def mean(part: np.ndarray[Any, Any]) -> float | None:
        return float(part.mean()) if part.size else None

    first_column, interior = mean(nats[1:, 0]), mean(nats[1:, 1:])
    return {
        "first_pixel": mean(nats[:1, :1]),
        "first_row": mean(nats[0, 1:]),
        "first_column": first_column,
        "interior": interior,
        "row_start_excess": None if first_column is None or interior is None else first_column - interior,
        "row_start_jump": mean(nats[1:, 0] - nats[:-1, -1]),
    }


def table(found: dict[str, Any]) -> Table:
    """A row a layer, means over heads."""
    from rich.table import Table

    out = Table(title="attention on pixels, share within radius R (if all were looked at alike)", title_justify="left")
    for heading in ("layer", "on start token", *(f"R = {radius}" for radius in found["within"]), "mean distance"):
        out.add_column(heading, justify="right")
    for layer, start in enumerate(found["start_share"]):
        near = (
            f"{np.mean(share[layer]):.2f} ({found['uniform_within'][radius][layer]:.2f})"
            for radius, share in found["within"].items()
        )
        far = f"{np.mean(found['mean_distance'][layer]):.2f} ({found['uniform_mean_distance'][layer]:.2f})"
        out.add_row(str(layer + 1), f"{np.mean(start):.2f}", *near, far)
    return out


def main(argv: list[str] | None = None) -> int:
    config = cli.parse(AttentionMapConfig, argv, prog="attnbench.attention_map")
    from rich.console import Console

    from attnbench import experiment, storage, trained
    from attnbench import record as records

    run = trained.load(config.record, config.data_root, config.own)
    place = config.out or experiment.artifacts(run.config).with_name(run.record["id"])
    storage.check_writable(place)
    tokens = run.images("test")[: config.images].to(run.config.device)
    found = attention(run.model().eval(), tokens, tuple(numbers(config.radii)))
    nats = edges(run.record["nll_map"])
    told = {"id": run.record["id"], "variant": run.record["variant"], "attention": found, "edges": nats}
    console = Console()
    console.print(table(found))
    for name, value in nats.items():
        if value is not None:
            console.print(f"{name.replace('_', ' '):17} {value:8.4f} nats/token")
    print(storage.write_json(place / "attention_map.json", records.plain(told)))
    return 0


if __name__ == "__main__":
    sys.exit(cli.command(main)())
