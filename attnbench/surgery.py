"""`python -m attnbench.surgery RECORD --radii 1,2,3,5,8`: a trained model under a window it was not trained with (C4).

With `--imagegpt FOLDER` in place of RECORD, others' weights. Records go to OUT/runs (RESULTS/surgery by default), the
curve to OUT/SOURCE.csv, its path the last line.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml
from pydantic import Field, PositiveFloat, PositiveInt

from attnbench import cli
from attnbench.config import Scalar, Settings, WholeNumbers, numbers
from attnbench.errors import Refusal


def _default(key: str) -> str:
    text = Path(__file__).with_name("defaults.yaml").read_text(encoding="utf-8")
    return str(yaml.safe_load(text)["surgery"][key])


class SurgeryConfig(Settings):
    """Trained softmax attention under narrower and narrower masks, without training or with a few steps of it."""

    record: Annotated[Path | None, tyro.conf.Positional] = None
    """The run's record, OUT/runs/ID.json."""
    imagegpt: Path | None = None
    """A Hugging Face ImageGPT folder in its place: config.json, safetensors, preprocessor_config.json."""
    variant: str = Field(default_factory=lambda: _default("variant"))
    """The mask: any variant with softmax over visible pixels."""
    option: str = Field(default_factory=lambda: _default("option"))
    """Which of its options is varied; "" for none."""
    radii: WholeNumbers = "1,2,3,5,8"
    """The values of that option, whole numbers with commas between."""
    options: dict[str, Scalar] = Field(default_factory=dict)
    """Its other options, also as --options.NAME VALUE."""
    finetune: Annotated[int, Field(ge=0)] = 0
    """Steps of training after the cut."""
    lr: PositiveFloat | None = None
    """Learning rate of these; a tenth of the run's own if none is given."""
    images: PositiveInt | None = None
    """Most test images."""
    data: str | None = None
    """Data set for others' weights, in colour; photos if none is named. A record has its own."""
    data_root: Path | None = None
    """Folder that holds the data set's files, where the data set needs any."""
    own: str | None = None
    """The attention of somebody's own that the run had, FILE.py:CLASS; its code runs only if it is named here."""
    out: Path | None = None
    """Folder of the records; RESULTS/surgery beside the run, or results/surgery."""
    force: bool = False
    """Cut again although a record exists."""

    @property
    def values(self) -> list[int | None]:
        """Each value once, in order; [None] where no option is varied."""
        return [*numbers(self.radii)] if self.option else [None]


def main(argv: list[str] | None = None) -> int:
    config = cli.parse(SurgeryConfig, argv, prog="attnbench.surgery")
    if (config.record is None) == (config.imagegpt is None):
        raise Refusal("name either a run's record or --imagegpt FOLDER")
    if config.record is not None and config.data is not None:
        raise Refusal("--data is for --imagegpt; a record has its own data")
    from rich.console import Console

    from attnbench import masked, storage

    if config.record is not None:
        subject = masked.of_record(config.record, config.data_root, config.own)
    else:
        assert config.imagegpt is not None
        subject = masked.of_folder(config.imagegpt, config.data or "photos", config.data_root)
    settings = []
    for value in config.values:
        options = config.options | ({} if value is None else {config.option: value})
        settings.append((value, masked.masked(subject, config.variant, options, config.finetune, config.lr)))
    out = config.out or subject.config.out / "surgery"
    storage.check_writable(out)
    console = Console()
    with console.status("the mask that was trained") as status:
        uncut, done = masked.uncut(subject, config.images), []
        for value, cut in settings:
            status.update(f"{config.variant} {config.option} {value or ''}")
            done.append(masked.operate(subject, cut, value, uncut, config.finetune, out, config.force))
    console.print(_table(config, done))
    print(masked.write_csv(out, subject.source))
    return 0


def _table(config: SurgeryConfig, done: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    first = done[0]["surgery"]
    trained = f"as trained: {first['uncut_nats_per_token']:.4f} nats/token"
    out = Table(title=f"{first['source']}, {trained}", title_justify="left")
    for heading in (config.option or "mask", "nats/token", "cost", "95 % interval over images"):
        out.add_column(heading, justify="right")
    for found in done:
        cut = found["surgery"]
        low, high = cut["cost_low"], cut["cost_high"]
        interval = "" if low is None else f"{low:+.4f} to {high:+.4f}"
        value = config.variant if cut["value"] is None else str(cut["value"])
        out.add_row(value, f"{found['metrics']['nats_per_token']:.4f}", f"{cut['cost_nats_per_token']:+.4f}", interval)
    return out


if __name__ == "__main__":
    sys.exit(cli.command(main)())
