"""What a model would cost, on a machine that need not hold it: `python -m attnbench.plan --variant local2d --side 224`.

`--preset igpt-l` takes the paper's shape; `--memory 80GB` asks for the largest side that fits. No tensor is allocated.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field, PositiveInt, create_model, model_validator

from attnbench import cli
from attnbench.config import Memory, ModelConfig, RunConfig, Settings, StepConfig, TrainConfig, size_of
from attnbench.errors import Refusal

if TYPE_CHECKING:
    from rich.table import Table

    from attnbench.predict import Prediction

PRESETS: dict[str, dict[str, int]] = yaml.safe_load(Path(__file__).with_name("presets.yaml").read_text())
LARGEST = 2**15
"""No larger side is looked for."""
START = 64
"""The side that the search asks for first, whatever else is planned: so it has one answer."""

DECIMAL = 10**9


class PlannedStep(StepConfig):
    """The training step."""

    batch: PositiveInt = Field(default=1, description=StepConfig.model_fields["batch"].description)


class PlanConfig(Settings):
    """Predicted parameters, FLOPs, peak memory by kind, and the largest side that fits; nothing is allocated."""

    variant: str = RunConfig().variant
    """Which attention."""
    position: str | None = None
    """Positional encoding in place of the variant's own."""
    preset: str | None = None
    """Shape of a published model: igpt-s, igpt-m, igpt-l or igpt-xl; --model.* flags win."""
    side: PositiveInt | None = None
    """Images of side × side tokens."""
    height: PositiveInt | None = None
    """Rows of tokens, where images are not square."""
    width: PositiveInt | None = None
    """Columns of tokens, where images are not square."""
    vocab: PositiveInt = 512
    """Colours or levels: how many values a token takes."""
    memory: Memory | None = None
    """Bytes to fit into, such as 80GB or 24GiB: asks for the largest side."""
    model: ModelConfig = ModelConfig()
    train: PlannedStep = PlannedStep()

    @model_validator(mode="after")
    def _shape(self) -> PlanConfig:
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"there is no preset {self.preset!r}; choose from {', '.join(PRESETS)}")
        if (self.height is None) != (self.width is None):
            raise ValueError("--height and --width go together; or give --side for a square")
        if self.side is not None and self.height is not None:
            raise ValueError("--side is for squares; give it, or --height and --width")
        if self.side is None and self.height is None and self.memory is None:
            raise ValueError("nothing to plan; give --side, --height and --width, or --memory")
        return self

    @property
    def shape(self) -> tuple[int, int] | None:
        """height, width; None where only the largest side is asked for."""
        if self.height is not None and self.width is not None:
            return self.height, self.width
        return None if self.side is None else (self.side, self.side)

    @property
    def limit(self) -> int | None:
        """Bytes to fit into."""
        return None if self.memory is None else size_of(self.memory)

    def run(self) -> RunConfig:
        """The run that is planned: on a CPU."""
        train = TrainConfig(**self.train.on("cpu").model_dump())
        model = ModelConfig(**self.model.model_dump())
        return RunConfig(variant=self.variant, position=self.position, model=model, train=train, device="cpu")


def parse(argv: Sequence[str] | None = None) -> PlanConfig:
    """The command line's plan; a preset's shape stands where the defaults stood, so that flags win. Raises Refusal."""
    told = list(sys.argv[1:] if argv is None else argv)
    words = [word for flag in told for word in flag.split("=", 1)]
    named = [after for word, after in itertools.pairwise(words) if word == "--preset"]
    name = named[-1] if named else None  # as of every flag that is given twice
    config = cli.parse(_with_preset(PRESETS.get(name or "", {})), told, prog="attnbench.plan")
    if config.preset != name:
        raise Refusal(f"preset {config.preset!r} stands in a file; give it as a flag: --preset {config.preset}")
    return config


def _with_preset(shape: dict[str, int]) -> type[PlanConfig]:
    """PlanConfig whose model has this shape by default."""
    if not shape:
        return PlanConfig
    fields: dict[str, Any] = {key: (PositiveInt, value) for key, value in shape.items()}
    model = create_model("ModelConfig", __base__=ModelConfig, __doc__=ModelConfig.__doc__, **fields)
    return create_model("PlanConfig", __base__=PlanConfig, __doc__=PlanConfig.__doc__, model=(model, model()))


def largest_side(bytes_of: Callable[[int], int], limit: int, turns: Sequence[int] = ()) -> int:
    """The largest side, up to LARGEST, whose `bytes_of` is at most `limit`; 0 if none.

    `bytes_of` may fall with the side at `turns` alone.  Where it falls elsewhere, what is returned still fits, and the
    next side does not, but a larger one may.

    Above the last turn, or else between two, a parabola in the side through the last two answers guesses the next;
    where it goes wrong, bisection.
    """
    known: dict[int, int] = {}
    fits, over = 0, LARGEST + 1
    for turn in sorted(turns, reverse=True):
        if (need := bytes_of(turn)) <= limit:
            fits, known = turn, {turn: need}
            break
        over = turn
    guess = min(max(START, 2 * fits), over - 1)
    while over - fits > 1:
        known[guess] = bytes_of(guess)
        fits, over = (guess, over) if known[guess] <= limit else (fits, guess)
        guess = _guess(known, limit, guess)
        if len(known) > 8 or not fits < guess < over:
            guess = min(max(guess, fits + 1), over - 1) if len(known) <= 8 else (fits + over) // 2
    return fits


def _guess(known: dict[int, int], limit: int, last: int) -> int:
    """Where bytes = a + b·side² through the last and its nearest neighbour meets the limit."""
    others = sorted((abs(s - last), s) for s in known if s != last)
    if not others:
        return max(1, int(last * min(8.0, math.sqrt(limit / known[last]))))
    other = others[0][1]
    slope = (known[last] - known[other]) / (last**2 - other**2)
    if slope <= 0:
        return 2 * last
    return math.isqrt(max(1, int(last**2 + (limit - known[last]) / slope)))


def _table(config: PlanConfig, shape: tuple[int, int], found: Prediction) -> Table:
    from rich.table import Table

    height, width = shape
    out = Table(title=f"{config.variant} · {height} × {width} = {height * width:,} tokens", title_justify="left")
    out.add_column("figure")
    out.add_column("predicted", justify="right")
    out.add_column("unit", style="dim")
    model = config.model
    out.add_row("model", f"{model.depth} × {model.dim}, {model.heads} heads", "depth × dim")
    out.add_row("parameters", f"{found.parameters / 1e6:,.2f}", "million")
    out.add_row("forward", f"{found.flops:.3e}", "FLOPs/image")
    out.add_row("training", f"{3 * found.flops:.3e}", "FLOPs/image")
    out.add_row("peak memory", f"{found.bytes / DECIMAL:,.3f}", f"GB, {_step(config.run().train)}")
    for kind, size in found.kinds.items():
        out.add_row(f"  {kind}", f"{size / DECIMAL:,.3f}", "GB")
    return out


def _step(train: TrainConfig) -> str:
    """The training step in words."""
    images = f"{train.batch} image{'s' if train.batch > 1 else ''} a step"
    parts = [f"in {train.accumulate} parts"] * (train.accumulate > 1)
    return ", ".join([images, *parts, train.precision, train.optimiser, *["recomputed"] * train.recompute])


def _answer(memory: str, limit: int, bytes_of: Callable[[int], int], turns: Sequence[int]) -> str:
    """The largest side that fits, in a line."""
    side = largest_side(bytes_of, limit, turns)
    if not side:
        return f"no side fits into {memory}: a single pixel needs {bytes_of(1) / DECIMAL:,.3f} GB"
    need = f"{side * side:,} tokens, {bytes_of(side) / DECIMAL:,.3f} GB"
    if side == LARGEST:
        return f"largest side that fits into {memory}: {side} or more ({need}; no larger one is looked for)"
    more = bytes_of(side + 1) / DECIMAL
    return f"largest side that fits into {memory}: {side} ({need}; {side + 1} needs {more:,.3f} GB)"


@contextlib.contextmanager
def _own_refused(variant: str) -> Iterator[None]:
    """What fails in anyone's own attention is a Refusal; in the catalogue's it is a bug, and stays one."""
    from attnbench import variants

    try:
        yield
    except Exception as error:
        if isinstance(error, Refusal) or variants.code(variant) is None:
            raise
        raise Refusal(f"{variant}: {type(error).__name__}: {' '.join(str(error).split())}; mend it") from error


def main(argv: list[str] | None = None) -> int:
    config = parse(argv)
    from functools import cache

    import torch
    from rich.console import Console  # after parsing: --help and a wrong flag answer at once

    from attnbench import predict, variants
    from attnbench.measure import Request

    torch.set_num_threads(1)  # tables of whole numbers are all that is computed
    shape, limit = config.shape, config.limit
    run = variants.with_objective(config.run())
    with _own_refused(run.variant):
        predictor = predict.Predictor(Request(run, *(shape or (8, 8)), config.vocab))
        if shape is not None:
            Console().print(_table(config, shape, predictor(*shape)))
        if config.memory is not None and limit is not None:
            print(_answer(config.memory, limit, cache(lambda side: predictor.bytes(side, side)), predictor.turns()))
    return 0


if __name__ == "__main__":
    sys.exit(cli.command(main)())
