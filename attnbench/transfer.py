"""`python -m attnbench.transfer RECORD --sides 8,16,32`: a trained model at sides that it was not trained at.

Masks, rotary and relative encodings carry over as they are; a learned table of places is resized by interpolation, and
its row says so. Images are cut into the tokens of the training side. Records go to OUT/runs (RESULTS/transfer by
default), all of a run's rows to OUT/ID.csv, its path the last line.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from pydantic import PositiveInt

from attnbench import cli
from attnbench.config import Settings, WholeNumbers, numbers
from attnbench.errors import Refusal

if TYPE_CHECKING:
    from attnbench.config import RunConfig
    from attnbench.trained import Trained


class TransferConfig(Settings):
    """A trained model's likelihood at other sides than the one it was trained at."""

    record: Annotated[Path, tyro.conf.Positional]
    """The run's record, OUT/runs/ID.json."""
    sides: WholeNumbers
    """Sides in pixels, whole numbers with commas between."""
    images: PositiveInt | None = None
    """Most test images."""
    data_root: Path | None = None
    """Folder that holds the data set's files, where the data set needs any."""
    own: str | None = None
    """The attention of somebody's own that the run had, FILE.py:CLASS; its code runs only if it is named here."""
    out: Path | None = None
    """Folder of the records; RESULTS/transfer beside the run."""
    force: bool = False
    """Evaluate again although a record exists."""


def evaluate_at(run: Trained, side: int, images: int | None, out: Path, force: bool) -> dict[str, Any]:
    """The run's weights at side × side pixels; the record, written to out/runs, or the one that is there already, if it
    is of these weights.

    Raises Refusal: images that cannot be had at that side, weights that do not fit.
    """
    import torch

    import models
    from attnbench import evaluate, record, variants

    if run.config.model.objective not in models.OBJECTIVES:
        raise Refusal(f"{run.record['id']} has no likelihood; choose a run that has one")
    config = run.config.model_copy(update={"data": run.at(side), "measure": False})
    told = {"source": run.record["id"], "images": images}
    name = f"{record.identify(config)}-at-{side}-{hashlib.sha256(record.canonical(told)).hexdigest()[:8]}"
    before, weights = record.find(out, name, status="ok"), run.record["sha256"]
    if before is not None and not force and before.get("source_sha256", weights) == weights:
        return before
    pixels = run.pixels("test", side)[:images]
    tokens = torch.from_numpy(run.tokeniser.encode(pixels))
    height, width = tokens.shape[1:]
    model, resized = _at(run, config, height, width)
    test = evaluate.likelihood(model.to(config.device), tokens, config)
    about = {"trained_height": run.shape[0], "trained_width": run.shape[1], "interpolated": resized}
    found = {
        "id": name, "status": "ok", "variant": config.variant, "family": variants.find(config.variant).family,
        "backend": model.backend, "seed": config.seed, "config": config.identity(), "environment": record.environment(),
        "data": run.record["data"] | {"height": height, "width": width}, "transfer": told | about,
        "source_sha256": weights,
        "metrics": {
            "parameters": sum(p.numel() for p in model.parameters()), "nats_per_token": test.nats_per_token,
            **evaluate.bits(test.nats_per_token, run.tokeniser, pixels, config),
        },
        **test.recorded(),
    }  # fmt: skip
    return record.read(record.write(out, found, replace=before is not None))


def _at(run: Trained, config: RunConfig, height: int, width: int) -> tuple[Any, list[str]]:
    """The model at that size with the run's weights, and which of its tables were resized."""
    from attnbench import train, variants
    from models.geometry import Grid, Scan
    from models.resize import load_resized

    if not variants.attends(config.variant):
        return run.model(), []  # convolutions take pictures of any size
    model: Any = train.make_model(config, height, width, run.shape[2])
    trained = Scan(Grid(*run.shape[:2]), config.model.objective, config.scan)
    try:
        return model, load_resized(model, run.weights, trained)
    except ValueError as error:
        raise Refusal(f"{run.record['id']} at {height}×{width}: {error}; run that cell again") from error


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a side."""
    return [
        {
            "variant": found["variant"],
            "source": found["transfer"]["source"],
            "trained_at": f"{found['transfer']['trained_height']}×{found['transfer']['trained_width']}",
            "height": found["data"]["height"],
            "width": found["data"]["width"],
            "tables": "interpolated" if found["transfer"]["interpolated"] else "carried over",
            "nats_per_token": found["metrics"]["nats_per_token"],
            "bits_per_dim": found["metrics"]["bits_per_dim"],
        }
        for found in done
    ]


def main(argv: list[str] | None = None) -> int:
    config = cli.parse(TransferConfig, argv, prog="attnbench.transfer")
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

    from attnbench import record, storage, trained

    run = trained.load(config.record, config.data_root, config.own)
    out = config.out or run.config.out / "transfer"
    storage.check_writable(out)
    sides = numbers(config.sides)
    for side in sides:
        run.pixels("test", side)  # refused, if it is, before any of them is evaluated
    done = [evaluate_at(run, side, config.images, out, config.force) for side in sides]
    shown = Table(title=f"{run.record['id']}, trained at {run.shape[0]}×{run.shape[1]}", title_justify="left")
    for heading in ("side", "tables of places", "nats/token"):
        shown.add_column(heading, justify="right")
    for row in rows(done):
        shown.add_row(f"{row['height']}×{row['width']}", row["tables"], f"{row['nats_per_token']:.4f}")
    Console().print(shown)
    known = [found for found in record.read_all(out)[0] if found.get("transfer", {}).get("source") == run.record["id"]]
    table = pd.DataFrame(rows(known)).sort_values(["height", "width"])
    print(storage.write_text(out / f"{run.record['id']}.csv", table.to_csv(index=False)))
    return 0


if __name__ == "__main__":
    sys.exit(cli.command(main)())
