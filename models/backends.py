"""Attention by other libraries, each asked for by name: FlexAttention, xformers, NATTEN, flash-linear-attention.

They train on CUDA only.  Each has a function that lists every reason why it cannot serve a layer, and one that
computes; the library is imported when first needed.

Shapes: q, k, v, out (batch, heads, seq, head_dim).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Predicate, Scan

CUDA_ONLY = ("triton", "flex", "xformers", "natten", "fla")
"""The backends that train on CUDA only: a kernel of our own, and those of other libraries."""

FAR = -80.0
"""Added to a score to make its weight vanish: e⁻⁸⁰. Much more would cost the log of the mass its digits in float32."""


def _missing(module: str, what: str = "attnbench[gpu]") -> list[str]:
    """What to install is the extra that brings the module, or the module itself where attnbench brings it already."""
    return [] if find_spec(module) else [f"{module} is not installed: pip install '{what}'"]


def _no_cuda(why: str) -> list[str]:
    return [] if torch.cuda.is_available() else [f"{why}, and no CUDA device is here"]


# --- FlexAttention: any predicate, any bias ---------------------------------------------------------------------------


def flex_reasons(head_dim: int) -> list[str]:
    """Why FlexAttention (Dong et al., 2024) cannot train a layer here."""
    small = [f"takes heads of at least 16 channels, not {head_dim}"] if head_dim < 16 else []
    return _no_cuda("on a CPU it has no backward pass") + small


@cache
def _flex(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled it lays out all scores: good enough to be compared with on a CPU, where nobody trains with it.
    kernel: Callable[..., Any] = flex_attention
    return kernel if device == "cpu" else torch.compile(kernel, dynamic=False)


FLEX_BLOCK = 128
"""Queries and keys of a block that is computed or left out as a whole."""


class FlexPlan(NamedTuple):
    """How FlexAttention serves a mask: the order in which slots stand there, how to come back, and its BlockMask."""

    order: Tensor | None  # int64 (n,): the slot at each place; none: as they are
    places: Tensor | None  # int64 (n,): the place of each slot
    block_mask: Any


def flex_plan(visible: Predicate, size: int, device: torch.device, order: Tensor | None = None) -> FlexPlan:
    """To be made once, it takes a while.

    order: which slots stand together, so that few blocks hold a visible pair; none: as they are.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    places = None
    if order is not None:
        order, places = order.to(device), torch.argsort(order).to(device)
    first = torch.zeros((), dtype=torch.int64, device=device)
    visible(first, first)  # what a scan keeps must be made before the predicate is traced

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(query, key) if order is None else visible(order[query], order[key])

    # Compiled it never lays out the n² pairs; a CPU, where this is only compared with, need not wait for a compiler.
    mask = create_block_mask(mask_mod, None, None, size, size, device, FLEX_BLOCK, _compile=device.type == "cuda")
    return FlexPlan(order, places, mask)


def flex(q: Tensor, k: Tensor, v: Tensor, plan: FlexPlan, bias: Callable[..., Tensor] | None = None) -> Tensor:
    """Softmax over the visible keys; the bias is worked out score by score."""
    order = plan.order

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert bias is not None
        return score + (bias(query, key, head) if order is None else bias(order[query], order[key], head))

    if order is not None:
        q, k, v = (x.index_select(2, order) for x in (q, k, v))
    out: Tensor = _flex(q.device.type)(q, k, v, score_mod=score_mod if bias else None, block_mask=plan.block_mask)
    return out if plan.places is None else out.index_select(2, plan.places)


# --- xformers: dense, or a window along the scan ----------------------------------------------------------------------


def xformers_reasons(scan: Scan, window: int | None, biased: bool) -> list[str]:
    """Why memory_efficient_attention (Lefaudeux et al., xFormers, 2022) cannot serve dense attention or a window."""
    reasons = _missing("xformers", "xformers") + _no_cuda("its kernels are for CUDA")
    if biased:
        reasons.append("would lay out the n² bias")
    if window is not None and scan.causal:
        reasons.append("its bias classes know no start token beside a window")
    return reasons


def xformers_bias(scan: Scan, window: int | None) -> Any:
    """The bias class that is the mask of dense attention, or of window1d with "bert"; none if all is visible."""
    from xformers.ops.fmha import attn_bias

    if window is not None:
        return attn_bias.LocalAttentionFromBottomRightMask(window_left=window, window_right=window)
    return attn_bias.LowerTriangularMask() if scan.causal else None


def xformers(q: Tensor, k: Tensor, v: Tensor, bias: Any) -> Tensor:
    """Softmax over the keys that the bias class leaves visible, as `xformers_bias` makes it; None: over all."""
    from xformers.ops import memory_efficient_attention

    heads_later = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out: Tensor = memory_efficient_attention(*heads_later, attn_bias=bias)
    return out.transpose(1, 2)


# --- NATTEN: local2d --------------------------------------------------------------------------------------------------


def natten_reasons(scan: Scan, radius: int, biased: bool) -> list[str]:
    """Why NATTEN (Hassani et al., Neighborhood Attention Transformer, 2023) cannot serve local2d."""
    reasons = _missing("natten") + _no_cuda("on a CPU it has no backward pass")
    if biased:
        reasons.append("adds no bias to the scores")
    if scan.order != "raster":
        reasons.append(f"reads along the raster only, not {scan.order!r}")
    if radius < 2 and scan.causal:
        reasons.append("its windows are at least 2 wide, a radius of 1 makes one of 1")
    return reasons


def natten(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scan: Scan,
    radius: int,
) -> Tensor:
    """window2d along a raster.

    NATTEN knows no raster-causal neighbourhood: of its per-axis `is_causal`, (True, True) hides what is above to the
    right, and (True, False) shows what is to the right.  So the rows above, the own row and the start token are three
    calls, the first two with their keys shifted by one row and by one column, merged by the log of their masses.

    NATTEN also moves a window at the border inward, to keep its size.  So the grid gets a margin, whose keys the first
    of a few more channels makes invisible.  The outputs are merged before it is cut off: NATTEN's merge is
    differentiable for views of what its kernels gave, not for copies.
    """
    from natten.functional import attention, merge_attentions, na1d, na2d

    height, width = scan.grid.height, scan.grid.width
    head_dim, wide = q.shape[-1], 2 * radius + 1
    settings: dict[str, Any] = {"scale": head_dim**-0.5, "return_lse": True}
    # On a CPU through FlexAttention, to be compared; on CUDA NATTEN picks its kernel.
    fna, fmha = ("flex-fna", "flex-fmha") if q.device.type == "cpu" else (None, None)
    # Its kernels take multiples of eight, FlexAttention powers of two.
    more = 8 if fna is None else (1 << head_dim.bit_length()) - head_dim
    near: dict[str, Any] = {**settings, "backend": fna, "attention_kwargs": {"backend": fmha}}
    on_grid = partial(_on_grid, height=height, width=width, more=more)
    query, content = on_grid(q, first=1.0, shift=0), partial(on_grid, first=0.0)
    if not scan.causal:
        margin = ((radius, radius), (radius, radius))
        out, _ = na2d(
            *_margin(query, content(k, shift=0), content(v, shift=0), head_dim, *margin), kernel_size=wide, **near
        )
        return _cut(out, height, width, radius, radius, head_dim)
    top = max(0, radius + 1 - height)
    margin = ((top, 0), (radius, radius))
    # A pixel's key stands in the row below it; in the first row no key stands.
    lower = [F.pad(content(x, shift=1)[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)) for x in (k, v)]
    lower[0][:, 0, :, :, head_dim] = FAR * head_dim**0.5
    padded = _margin(query, lower[0], lower[1], head_dim, *margin)
    above = na2d(*padded, kernel_size=(radius, wide), is_causal=(True, False), **near)
    # A pixel's key stands right of it, which is its slot's own place; in the first column no key stands.
    right = [content(x, shift=0) for x in (k, v)]
    right[0][:, :, 0, :, head_dim] = FAR * head_dim**0.5
    rows = [x.flatten(0, 1) for x in _margin(query, right[0], right[1], head_dim, *margin)]
    beside = na1d(*rows, kernel_size=radius, is_causal=True, **near)
    start = [F.pad(x[:, :, :1].transpose(1, 2), (0, more)).contiguous() for x in (k, v)]  # (batch, 1, heads, channels)
    first = attention(padded[0].flatten(1, 2), *start, backend=fmha, **settings)
    batch, heads = q.shape[:2]
    parts = [
        (out.reshape(batch, -1, heads, head_dim + more), lse.reshape(batch, -1, heads))
        for out, lse in (above, beside, first)
    ]
    fused = fna is None
    merged, _ = merge_attentions([out for out, _ in parts], [lse for _, lse in parts], fused, fused)
    return _cut(merged.unflatten(1, (top + height, -1)), height, width, top, radius, head_dim)


def _on_grid(x: Tensor, first: float, height: int, width: int, shift: int, more: int) -> Tensor:
    """(batch, heads, seq, d) -> (batch, height, width, heads, d + more): slot t + shift at pixel t; the channels more
    are `first` and zeros; what has no slot is 0."""
    dim = x.shape[-1]
    x = F.pad(x[:, :, shift:], (0, more, 0, shift))
    x[..., dim] = first
    return x.unflatten(2, (height, width)).permute(0, 2, 3, 1, 4).contiguous()


def _margin(
    q: Tensor, k: Tensor, v: Tensor, head_dim: int, rows: tuple[int, int], cols: tuple[int, int]
) -> list[Tensor]:
    """(batch, height, width, heads, channels) with rows and columns around them, whose keys nobody sees."""
    q, k, v = (F.pad(x, (0, 0, 0, 0, *cols, *rows)) for x in (q, k, v))
    inside = torch.zeros(k.shape[1:3], dtype=torch.bool, device=k.device)
    inside[rows[0] : k.shape[1] - rows[1], cols[0] : k.shape[2] - cols[1]] = True
    channel = torch.zeros_like(k[0, 0, 0, 0])
    channel[head_dim] = FAR * head_dim**0.5  # the scale takes the root away again
    return [q, k + channel * ~inside[None, :, :, None, None], v]


def _cut(x: Tensor, height: int, width: int, top: int, left: int, head_dim: int) -> Tensor:
    """The grid without margin and extra channels: (batch, …, …, heads, …) -> (batch, heads, seq, head_dim)."""
    return x[:, top : top + height, left : left + width, :, :head_dim].flatten(1, 2).transpose(1, 2)


# --- flash-linear-attention: sums that fade, and those that do not ----------------------------------------------------


def fla_reasons(scan: Scan, head_dim: int = 0, limit: int = 0) -> list[str]:
    """Why flash-linear-attention (Yang & Zhang, package fla, 2024) cannot serve a layer.

    limit: the widest head that the kernel takes; 0 for any, as its blocks are filled up.
    """
    reasons = _missing("fla") + _missing("triton") + _no_cuda("its kernels are for CUDA")
    if not scan.causal:
        reasons.append(f"its kernels are causal: serves objective 'ar' only, not {scan.objective!r}")
    if limit and head_dim > limit:
        reasons.append(f"takes heads of at most {limit} channels, not {head_dim}")
    return reasons


def fla_kernel(name: str, q: Tensor) -> Callable[..., tuple[Tensor, Any]]:
    """fla.ops.NAME.chunk_NAME, which takes (batch, seq, heads, …) and returns such and a state.

    Raises ValueError for tensors that it cannot serve, whose device and dtype come late.
    """
    if q.dtype == torch.float64:
        raise ValueError("backend 'fla' sums in float32, where float64 loses its digits; take blocked")
    if q.device.type != "cuda":
        raise ValueError(f"backend 'fla' has kernels for CUDA, and these tensors are on {q.device.type}; take blocked")
    kernel: Callable[..., tuple[Tensor, Any]] = getattr(import_module(f"fla.ops.{name}"), f"chunk_{name}")
    return kernel


def _fla(name: str, **given: Tensor) -> Tensor:
    # They scale by 1/√width unless told otherwise; ours is in q already, or in the features.
    heads_later = {key: x.transpose(1, 2).contiguous() for key, x in given.items()}
    out, _ = fla_kernel(name, given["q"])(**heads_later, scale=1.0)
    return out.transpose(1, 2)


def fla_decayed(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> Tensor:
    """q_t S_t, S_t = exp(log_decay_t) ∘ S_{t-1} + k_t v_tᵀ; float32, its products TF32 where the GPU has it.

    log_decay (batch or 1, heads, seq or 1, 1 or width); none where nothing fades.
    """
    if log_decay is None:
        return _fla("simple_gla", q=q, k=k, v=v)
    g = log_decay.expand(len(q), -1, q.shape[2], -1)
    return _fla("simple_gla", q=q, k=k, v=v, g=g[..., 0]) if g.shape[-1] == 1 else _fla("gla", q=q, k=k, v=v, g=g)


def fla_delta(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """The gated delta rule as recurrence.delta sums it; log_decay, beta (batch, heads, seq).

    The library's kernel refuses q, k and v in float32: they are rounded to bfloat16, two to three digits, and what it
    returns is as coarse; log_decay, beta and the states stay float32.
    """
    narrow = (x.bfloat16() if x.dtype == torch.float32 else x for x in (q, k, v))
    q, k, v, dtype = *narrow, q.dtype
    return _fla("gated_delta_rule", q=q, k=k, v=v, g=log_decay, beta=beta).to(dtype)
