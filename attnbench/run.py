"""`python -m attnbench.run --variant local2d`: one run; its last line is the record's path."""

from __future__ import annotations

import sys

from attnbench import cli
from attnbench.config import RunConfig


def main(argv: list[str] | None = None) -> int:
    config = cli.parse(RunConfig, argv, prog="attnbench.run")
    from rich.console import Console  # after parsing: --help and a wrong flag answer at once

    from attnbench import experiment, record, report, terminal

    console = Console()
    config = experiment.resolve(config)
    with terminal.bar(console, config.variant, config.train.steps, config.train.batch) as watch:
        path = experiment.execute(config, watch)
    done = record.read(path)
    page = report.refresh(config.out)
    console.print(terminal.table(done))
    pictures = experiment.artifacts(config)
    if (pictures / "samples.png").exists():
        console.print(
            f"samples      {pictures / 'samples.png'}\ncompletions  {pictures / 'completions.png'}", soft_wrap=True
        )
    console.print(f"report       {page}\nrecord:", soft_wrap=True)
    print(path)
    return 0 if done["status"] == "ok" else 1


if __name__ == "__main__":
    sys.exit(cli.command(main)())
