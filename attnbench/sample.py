"""`python -m attnbench.sample RECORD --complete 0.5`: samples and completions of a finished run, as PNG sheets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field, PositiveFloat, PositiveInt

from attnbench import cli
from attnbench.config import Settings
from attnbench.errors import Refusal


class PictureConfig(Settings):
    """Draws pictures with a trained model: from nothing, or going on from the first part of test images."""

    record: Annotated[Path, tyro.conf.Positional]
    """The run's record, OUT/runs/ID.json."""
    complete: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each test image that the model is shown, along the scan; 0 draws from nothing."""
    count: PositiveInt = 16
    """How many pictures."""
    temperature: PositiveFloat = 1.0
    """Softmax temperature."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draws."""
    data_root: Path | None = None
    """Folder that holds the data set's files, where the data set needs any."""
    own: str | None = None
    """The attention of somebody's own that the run had, FILE.py:CLASS; its code runs only if it is named here."""
    out: Path = Path("sample.png")
    """The sheet."""


def main(argv: list[str] | None = None) -> int:
    config = cli.parse(PictureConfig, argv, prog="attnbench.sample")
    from attnbench import pictures, storage, train, trained
    from attnbench.draw import draw, shown

    storage.check_writable(config.out.parent)
    run = trained.load(config.record, config.data_root, config.own)
    if run.config.model.objective != "ar":
        why = f"{run.record['id']} has objective {run.config.model.objective!r} and no order to draw in"
        raise Refusal(f"{why}; choose a run with objective 'ar'")
    truth = run.images("test")[: config.count] if config.complete else None
    count = config.count if truth is None else len(truth)
    generator = train.generator("samples", config.seed)
    model, each = run.model(), run.tokeniser.tokens_per_pixel
    drawn = draw(model, count, generator, config.temperature, truth, config.complete, each)
    images = run.tokeniser.decode(drawn.cpu().numpy())
    if truth is None:
        sheet = pictures.sheet([images])
    else:
        known = shown(model, config.complete, each)
        sheet = pictures.completions(run.tokeniser.decode(truth.numpy()), images, known)
    print(storage.write_bytes(config.out, sheet))
    return 0


if __name__ == "__main__":
    sys.exit(cli.command(main, stopped="stopped")())
