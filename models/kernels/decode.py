"""Decoding on CPU (decode.cpp): one slot through the trunk, on to the next mixer that must be asked, or to the logits.

Without gradients, fake tensors or torch.compile: `decodes` says whether it can be used.
Shapes: x, mixed (batch, 1, dim); k, v (batch, heads, places, head_dim).
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, addressof, byref, c_double, c_int64, c_void_p
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from .compiler import entry, missing, unfit

if TYPE_CHECKING:
    from ..mixer import Kept

Norm = Any
"""A module with a gain and an eps."""
Parts = tuple[Norm, nn.Linear, nn.Linear | None, nn.Linear, Norm, nn.Linear, nn.Linear]
"""A block's norm, qkv, gates, out, second norm, up and down."""
_NAMES = ("gain",), *[("weight", "bias")] * 3, ("gain",), *[("weight", "bias")] * 2
_HEAD = ("gain",), ("weight", "bias")


class _Layer(Structure):
    _fields_ = (
        *[(name, c_void_p) for name in (
            "gain", "qkv", "qkv_bias", "gates", "gates_bias", "out", "out_bias",
            "last_gain", "up", "up_bias", "down", "down_bias",
        )],
        ("gated", c_int64), ("wide", c_int64), ("eps", c_double), ("last_eps", c_double),
    )  # fmt: skip


class _Kept(Structure):
    _fields_ = (
        ("k", c_void_p), ("v", c_void_p), ("places", c_void_p), ("scores", c_void_p), ("turns", c_void_p),
        ("count", c_int64), ("place", c_int64),
        ("k_strides", c_int64 * 3), ("v_strides", c_int64 * 3),
    )  # fmt: skip


class _Job(Structure):
    _fields_ = (
        *[(name, c_void_p) for name in ("layers", "kept", "gain", "head", "head_bias")], ("eps", c_double),
        *[(name, c_int64) for name in ("depth", "dim", "heads", "vocab", "threads", "rows", "first", "stop")],
        *[(name, c_void_p) for name in ("x", "mixed", "stream", "out")],
    )  # fmt: skip


def decodes(x: Tensor) -> bool:
    """Whether the kernel can take x here and now."""
    return (
        not torch.is_grad_enabled()
        and type(x) is Tensor
        and x.device.type == "cpu"
        and unfit(x) is None
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and missing("decode") is None
    )


def _plain(module: Any, name: str) -> bool:
    """Whether what the module computes with lies as the kernel reads it: a parameter of its own, or no bias.

    One that is pruned or parametrized is another tensor, made anew.
    """
    own = module._parameters.get(name)
    if own is None:
        return name == "bias" and getattr(module, name) is None
    return type(own) is Parameter and own.is_contiguous() and own.device.type == "cpu"


class Stack:
    """A trunk's weights as the kernel reads them, where they are: changed in place they are read as they are then.

    One that was moved, or that stands in for another, makes the stack no longer `current`.
    """

    def __init__(self, blocks: Sequence[Parts], head: tuple[Norm, nn.Linear], heads: int) -> None:
        parts = [*zip((part for block in blocks for part in block), _NAMES * len(blocks), strict=True)]
        parts += zip(head, _HEAD, strict=True)
        self._owners = [({} if m is None else m._parameters, name) for m, names in parts for name in names]
        plain = all(_plain(m, name) for m, names in parts if m is not None for name in names)
        dtypes = {p.dtype for owner, name in self._owners if (p := owner.get(name)) is not None}
        self.dtype = dtypes.pop() if plain and len(dtypes) == 1 else None
        """What x must be; none: the kernel cannot read these weights."""
        self._addresses = self._now()
        self._layers, self._kept = (_Layer * len(blocks))(), (_Kept * len(blocks))()
        each = len(_Layer._fields_) - 4
        self._widths = []
        for index, (norm, _, gates, _, last, up, _) in enumerate(blocks):
            gated, where = 0 if gates is None else gates.out_features, self._addresses[index * each :][:each]
            self._layers[index] = _Layer(*where, gated, up.out_features, norm.eps, last.eps)
            self._widths.append(3 * up.in_features + gated)
        norm, last = head
        self._widths.append(last.out_features)
        self._job = _Job(
            addressof(self._layers), addressof(self._kept), *self._addresses[-3:], norm.eps,
            len(blocks), last.in_features, heads, last.out_features,
        )  # fmt: skip

    def _now(self) -> list[int]:
        return [0 if (p := owner.get(name)) is None else p.data_ptr() for owner, name in self._owners]

    @property
    def current(self) -> bool:
        """Whether every weight still lies where it lay."""
        return self._addresses == self._now()

    def keep(self, kept: Sequence[Kept | None]) -> None:
        """Where the kernel finds each layer's keys at this slot; the caller holds these tensors until it has run.

        Raises ValueError for keys of another dtype than the weights'.
        """
        for to, known in zip(self._kept, kept, strict=True):
            if known is None:
                continue
            k, v, place, keys, *others = known
            if k.dtype != self.dtype:
                raise ValueError(f"a state that began in {k.dtype} cannot go on in {self.dtype}; start anew")
            to.k, to.v, to.count, to.place = k.data_ptr(), v.data_ptr(), len(keys), place
            to.places, to.scores, to.turns = (None if other is None else other.data_ptr() for other in others)
            to.k_strides, to.v_strides = k.stride()[:3], v.stride()[:3]

    def run(self, x: Tensor, mixed: Tensor | None, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """From layer `first` on, before which goes the rest of a layer whose mixer made `mixed`.

        At layer `stop` the stream and its projections, (batch, 1, 3 · dim + heads · gates); or, past the last layer,
        (batch, 1, vocab).  Every layer between must have been told by `keep`.  Raises MemoryError.
        """
        x, mixed = x.contiguous(), None if mixed is None else mixed.contiguous()
        stream, out = torch.empty_like(x), x.new_empty(len(x), 1, self._widths[stop])
        job = self._job
        job.threads, job.rows, job.first, job.stop = torch.get_num_threads(), len(x), first, stop
        job.x, job.mixed = x.data_ptr(), None if mixed is None else mixed.data_ptr()
        job.stream, job.out = stream.data_ptr(), out.data_ptr()
        if entry("decode", "decode_step", x.dtype)(byref(job)):
            raise MemoryError("not enough memory for the decode kernel's working rows")
        return stream, out
