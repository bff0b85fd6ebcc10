"""What a run is told: frozen pydantic models, an unknown key is an error. Never imports torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tyro
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationInfo,
    model_validator,
)

Scalar = bool | int | float | str


def _whole_numbers(text: str, info: ValidationInfo) -> str:
    if not all(part.strip().isdecimal() and int(part) > 0 for part in text.split(",")):
        wrong = f"{info.field_name} {text!r} are not whole numbers of at least 1"
        raise ValueError(f"{wrong}; write them with commas between, such as 1,2,3")
    return text


WholeNumbers = Annotated[str, AfterValidator(_whole_numbers)]
"""Whole numbers from 1 with commas between, as on a command line."""


def numbers(text: WholeNumbers) -> list[int]:
    """Each of them once, in their order."""
    return list(dict.fromkeys(int(part) for part in text.split(",")))


def size_of(text: str) -> int:
    """Bytes, of a size as people write it: 80GB, 24GiB.  Raises ValueError."""
    return int(TypeAdapter(ByteSize).validate_python(text))


def _memory(text: str) -> str:
    if size_of(text) < 1:
        raise ValueError("a size in bytes must be above 0; write such as 24GB")
    return text


Memory = Annotated[str, AfterValidator(_memory)]
"""A size in bytes, as people write it."""


class Settings(BaseModel):
    """Base of every group of settings: immutable, closed, documented by attribute docstrings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class DataConfig(Settings):
    """Which images, at which side, cut into which tokens."""

    name: Annotated[str, tyro.conf.arg(aliases=["--data"])] = "digits"
    """digits, photos, fashion-mnist, folder:PATH, hub:OWNER/NAME, source:NAME (above, mesh, place, mirror, recall)."""
    side: PositiveInt | None = None
    """Resize every image to side × side pixels (the down-sampling of C1); none: the native size, of a source 8."""
    tokens: Literal["auto", "levels", "palette", "subpixel"] = "auto"
    """levels: exact grey values; palette: k-means colours; subpixel: R, G and B in turn, 256 values each, which is
    lossless on a grid three times as wide; auto: levels for grey images, else palette."""
    colours: PositiveInt = 512
    """Size of the palette."""
    root: Path | None = None
    """Folder that holds the data set's files, where the data set needs any; of hub: a local copy of the repository."""
    revision: str | None = None
    """Commit, tag or branch of a data set of the hub; none: the newest commit, which the record names."""
    height: PositiveInt | None = None
    """Rows of a source where its images are not square; none: side."""
    width: PositiveInt | None = None
    """Columns of a source where its images are not square; none: side."""
    levels: PositiveInt | None = None
    """Colours of a source, 2 to 256; none: 4."""
    count: PositiveInt | None = None
    """Training images that a source draws, a fifth as many each for validation and test; none: 10,000."""
    options: Annotated[dict[str, Scalar], tyro.conf.arg(metavar="NAME VALUE")] = Field(default_factory=dict)
    """A source's own options, also as --data.options.NAME VALUE."""


class ModelConfig(Settings):
    """The trunk's shape and what the attention is told."""

    dim: PositiveInt = 64
    """Width of the residual stream."""
    depth: PositiveInt = 4
    """Number of blocks."""
    heads: PositiveInt = 4
    """Attention heads; must divide dim."""
    objective: Literal["ar", "bert", "supervised"] = "ar"
    """ar: next pixel; bert: 15 % of the pixels hidden, loss on those alone; supervised: the class, for the one variant
    that learns nothing else, which takes it by itself."""
    backend: str = "auto"
    """Which implementation of the attention; auto picks the fastest exact one and the record names it."""
    options: Annotated[dict[str, Scalar], tyro.conf.arg(metavar="NAME VALUE")] = Field(default_factory=dict)
    """The variant's own options, also as --model.options.NAME VALUE."""

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> ModelConfig:
        if self.dim % self.heads:
            fit = [h for h in range(1, self.dim + 1) if self.dim % h == 0][:8]
            raise ValueError(f"heads {self.heads} does not divide dim {self.dim}; heads that do: {fit}")
        return self


class StepConfig(Settings):
    """A training step: all of training that its memory depends on."""

    batch: PositiveInt = 64
    """Images a step, over all accumulated parts."""
    accumulate: PositiveInt = 1
    """Parts that a batch is cut into; must divide batch."""
    optimiser: Literal["adam", "muon"] = "adam"
    """adam: (0.9, 0.95), as Image GPT; muon: for the matrices inside the blocks, with adam for all else."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on CUDA, float32 elsewhere."""
    recompute: bool = False
    """Keep only each block's input for the backward pass and compute what is inside again: less memory, more time."""

    @model_validator(mode="after")
    def _parts_divide_batch(self) -> Self:
        if self.batch % self.accumulate:
            raise ValueError(
                f"accumulate {self.accumulate} does not divide batch {self.batch}; pick one of its divisors"
            )
        return self

    def on(self, device: str) -> Self:
        """The same with the precision that auto is on that device."""
        if self.precision != "auto":
            return self
        return self.model_copy(update={"precision": "bfloat16" if device == "cuda" else "float32"})


class TrainConfig(StepConfig):
    """The optimiser, its budget and its schedule: linear warm-up, cosine to zero."""

    steps: PositiveInt = 400
    """Optimiser steps."""
    lr: PositiveFloat = 3e-3
    """Peak learning rate."""
    warmup: Annotated[int, Field(ge=0)] = 50
    """Steps of linear warm-up."""
    clip: PositiveFloat = 1.0
    """Gradient norm is clipped to this."""
    validate_every: PositiveInt = 50
    """Steps between validations; the best weights by validation are the ones evaluated."""
    validation_images: PositiveInt = 512
    """Most images a validation during training looks at."""
    checkpoint_every: PositiveInt = 200
    """Steps between checkpoints: what a kill can lose at most."""
    compile: bool = False
    """Compile the model with torch.compile."""


class EvaluateConfig(Settings):
    """Likelihood of the test images."""

    images: PositiveInt = 2000
    """Most test images."""
    votes: PositiveInt = 5
    """Sets of hidden pixels that "bert" is averaged over."""


class ProbeConfig(Settings):
    """Linear probes on every layer."""

    enabled: bool = True
    """Fit the probes."""
    normalise: bool = True
    """Probe the normed residual stream (as iGPT does) rather than the raw one."""
    images: PositiveInt = 2000
    """Most training images a probe is fitted on."""


class SampleConfig(Settings):
    """Samples and half-image completions drawn at the end."""

    count: Annotated[int, Field(ge=0)] = 16
    """How many of each."""
    temperature: PositiveFloat = 1.0
    """Softmax temperature."""


def _default_variant() -> str:
    """The variant of a run that names none, from defaults.yaml: no Python file here knows a variant by name."""
    defaults = yaml.safe_load(Path(__file__).with_name("defaults.yaml").read_text(encoding="utf-8"))
    return str(defaults["variant"])


class RunConfig(Settings):
    """One run: train, measure, record."""

    variant: str = Field(default_factory=_default_variant)
    """Which attention: a name of models.VARIANTS."""
    code: str | None = None
    """Of an own attention, the hash of its file: filled in by itself; where it is told, no other code is run."""
    position: str | None = None
    """Positional encoding in place of the variant's own."""
    scan: Literal["raster", "snake", "column", "hilbert", "random"] = "raster"
    """The order in which the pixels are read."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Initial weights, data order, hidden pixels and samples all follow from it."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    probe: ProbeConfig = ProbeConfig()
    sample: SampleConfig = SampleConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """Under torchrun, ddp: every process holds the model; fsdp: a share of it each, for models that do not fit; auto:
    ddp among several. The losses are those of one process, so it is the same run; its record tells which it was."""
    measure: bool = True
    """Measure memory and throughput, in processes of their own."""
    out: Path = Path("results")
    """Folder of records (out/runs), checkpoints, pictures and the report."""
    force: bool = False
    """Run again although a finished record exists."""

    def identity(self, exclude_defaults: bool = False) -> dict[str, Any]:
        """What makes two runs the same run: not where files lie, nor on how many processes, nor whether to repeat.

        An own attention's code does too, but stands beside: two versions of it are compared with what is the same.
        """
        elsewhere: dict[str, Any] = {"out": True, "force": True, "parallel": True, "code": True, "data": {"root"}}
        return self.model_dump(mode="json", exclude=elsewhere, exclude_defaults=exclude_defaults)


def threads() -> int:
    """CPU threads a run uses: OMP_NUM_THREADS if set, else the cores this process may use."""
    told = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if told.isdigit() and int(told) > 0:
        return int(told)
    # macOS and Windows know no affinity.
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
