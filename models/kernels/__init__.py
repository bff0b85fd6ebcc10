"""Kernels of our own: for CPU in C++, compiled when first asked for, and one for CUDA in Triton.

Where one cannot be had, its refusal says why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from . import block, window
from .compiler import missing, reasons, unfit
from .decay import decayed, decayed2d, solved, unit
from .decode import Parts, Stack, decodes
from .full import full
from .linear import linear
from .local2d import local2d, offsets, working_rows

if TYPE_CHECKING:
    from ..mixer import Mixer

__all__ = [
    "Parts", "Stack", "block", "decayed", "decayed2d", "decodes", "full", "linear", "local2d", "missing", "offsets",
    "reasons", "serves", "solved", "unfit", "unit", "window", "working_rows",
]  # fmt: skip


_UNFIT = {"compiled": unfit, "triton": window.unfit}
"""By backend, why its kernels cannot take some tensors; none if they can."""


def serves(mixer: Mixer, *tensors: Tensor) -> bool:
    """Whether the mixer's backend is "compiled" or "triton" and takes these tensors, whose device and dtype come late.

    If it cannot and the backend was left open, the mixer's next takes over for good, and its name with it.
    Raises ValueError if it cannot and was asked for.
    """
    while mixer.backend in _UNFIT:
        if (reason := _UNFIT[mixer.backend](*tensors)) is None:
            return True
        later = mixer.backends[mixer.backends.index(mixer.backend) + 1 :]
        others = [name for name in later if not mixer.refusals(name)]
        if mixer.layer.backend != "auto" or not others:
            way_out = f"take {' or '.join(others)}" if others else "move the model"
            raise ValueError(f"backend {mixer.backend!r} {reason}; {way_out}")
        mixer.backend = others[0]
    return False
