"""`python -m attnbench.run --variant local2d`: one run; its last line is the record's path.

`torchrun --nproc-per-node N -m attnbench.run …` shares it among N processes, of which the first writes and prints.
"""

from __future__ import annotations

import sys

from attnbench import cli
from attnbench.config import RunConfig


def main(argv: list[str] | None = None) -> int:
    config = cli.parse(RunConfig, argv, prog="attnbench.run")
    scheme, _, name = config.data.name.partition(":")
    if scheme == "hub" and config.data.root is None:
        from attnbench import hub

        hub.check_reachable(name)  # at once, not after torch was imported
    from attnbench import distributed, experiment, measure  # after parsing: --help and a wrong flag answer at once

    config = experiment.resolve(config)
    measure.keep_freed()
    with distributed.world(config):
        if distributed.first():
            return _first(config)
        experiment.execute(config)
        return 0


def _first(config: RunConfig) -> int:
    """The process that a person watches."""
    from rich.console import Console

    from attnbench import experiment, record, report, terminal

    console = Console()
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
