"""`python -m attnbench.check NAME …`: the conformance suite, on the catalogue or on anyone's own attention."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import tyro
from pydantic import Field

from attnbench import cli
from attnbench.config import Scalar, Settings, threads
from attnbench.errors import Refusal


class CheckConfig(Settings):
    """Proves that a variant is what it says: oracle, causality, mask, decoding, cost; draws its receptive field."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Variants, or your own attention as my_module:MyAttention or path/to/file.py:MyAttention."""
    all: bool = False
    """Every variant of the catalogue."""
    options: dict[str, Scalar] = Field(default_factory=dict)
    """The variant's own options, for example --options.radius 5."""
    out: Path = Path("results/check")
    """Folder of the receptive fields."""


def main(argv: list[str] | None = None) -> int:
    config = cli.parse(CheckConfig, argv, prog="attnbench.check")
    if config.all == bool(config.names):
        raise Refusal("name the variants to check, or give --all")

    import models
    from attnbench import storage, terminal, variants

    build: Any = models.build  # the options are the variant's own to judge
    names = list(config.names) or list(models.VARIANTS)
    for name in names:
        variants.find(name)
        unknown = set(config.options) - set(models.options(name))
        if unknown:
            raise Refusal(f"{name} has no option {min(unknown)!r}; it has {', '.join(models.options(name)) or 'none'}")
        if not config.options:
            continue  # an own attention that cannot be built gets its table
        try:
            build(name, height=16, width=16, vocab=2, dim=16, depth=2, heads=2, **config.options)
        except (ValueError, TypeError) as error:
            raise Refusal(f"{error}; choose another") from error
    storage.check_writable(config.out)
    return terminal.checks(names, config.options, config.out, threads())


if __name__ == "__main__":
    sys.exit(cli.command(main)())
