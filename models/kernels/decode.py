"""Decoding on CPU (decode.cpp): what a block does around its mixer for one slot, and one query over the kept keys.

Without gradients, fake tensors or torch.compile: `decodes` says whether these functions can be used.
Shapes: x, mixed, out (batch, 1, dim); q, out (batch, heads, 1, head_dim); k, v (batch, heads, kept, head_dim).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from .compiler import call, missing, unfit
from .layout import dense

MOST_ROWS = 64
"""Images at a time up to which weights, read number by number, are not read too often."""


def decodes(x: Tensor, *parameters: Tensor) -> bool:
    """Whether the kernels can take x (batch, …) and these parameters here and now."""
    return (
        not torch.is_grad_enabled()
        and len(x) <= MOST_ROWS
        and all(type(p) is Parameter and p.dtype == x.dtype and p.is_contiguous() for p in parameters)
        and type(x) is Tensor
        and x.device.type == "cpu"
        and unfit(x) is None
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and missing("decode") is None
    )


def project(x: Tensor, gain: Tensor, eps: float, weight: Tensor) -> Tensor:
    """(x / root mean square · gain) Wᵀ: (batch, 1, width)."""
    out = x.new_empty(len(x), 1, len(weight))
    call("decode", "decode_project", (len(x), *weight.T.shape), eps, x.contiguous(), gain, weight, out)
    return out


def finish(x: Tensor, mixed: Tensor, weight: Tensor, gain: Tensor, eps: float, up: Tensor, down: Tensor) -> Tensor:
    """y + down(gelu(up(norm(y)))) with y = x + mixed Wᵀ: (batch, 1, dim)."""
    out, given = torch.empty_like(x), (x.contiguous(), mixed.contiguous(), weight, gain, up, down)
    call("decode", "decode_finish", (len(x), *up.T.shape), eps, *given, out)
    return out


def attend(q: Tensor, k: Tensor, v: Tensor, places: Tensor) -> Tensor:
    """softmax(qKᵀ/√d)V over the keys at `places`, int64 (count,), read where they are."""
    batch, heads, _, dim = q.shape
    out = q.new_empty(batch, 1, heads, dim).transpose(1, 2)
    call("decode", "decode_attend", (batch, heads, dim, len(places)), dim**-0.5, dense(q), k, v, out, places)
    return out
