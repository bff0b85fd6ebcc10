"""Local 2D attention on CUDA (window_kernels.py) as a torch operator: eager, under autograd and under torch.compile.

Shapes: q, k, v, out (batch, heads, seq, head_dim), seq = height · width; mass (batch, heads, seq) float32: the
logarithm to base 2 of the sum of a query's weights, from which the backward pass computes them again.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from math import log, prod
from typing import Any

import torch
from torch import Tensor

from .layout import dense, like

TALL, WIDE = 4, 16
"""Rows and columns of a patch."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


WORKING = 64 * 128
"""Numbers that the rows of keys may hold which a program reads at a time: more leave it no registers."""
LARGEST = 32
"""Channels of a float32 head: products of full precision take as many registers again."""


def reasons(head_dim: int, radius: int) -> list[str]:
    """Why the kernel cannot serve heads of this width and windows of this radius here; empty if it can."""
    missing = [] if find_spec("triton") else ["triton is not installed: pip install 'attnbench[gpu]'"]
    if not torch.cuda.is_available():
        missing.append("its kernel is for CUDA, and no CUDA device is here")
    told = _settings(head_dim, 1, radius, torch.bfloat16)
    if head_dim > 128:
        missing.append(f"takes heads of at most 128 channels, not {head_dim}")
    elif told["REACH"] * told["DIM"] > WORKING:
        widest = WORKING // told["DIM"]
        missing.append(f"reads at most {widest} columns of heads of {head_dim} channels at a time, not {told['REACH']}")
    return missing


def unfit(*tensors: Tensor) -> str | None:
    """Why the kernel cannot take these tensors, or None if it can."""
    for tensor in tensors:
        if tensor.device.type != "cuda":
            return f"is for CUDA, not {tensor.device.type}"
        if tensor.dtype not in DTYPES:
            return f"sums in float32, not {str(tensor.dtype).removeprefix('torch.')}"
        if tensor.dtype == torch.float32 and tensor.shape[3] > LARGEST:
            return f"takes float32 heads of at most {LARGEST} channels, not {tensor.shape[3]}"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, height: int, width: int, radius: int) -> Tensor:
    """Softmax attention over the start token and the raster-earlier pixels within `radius` (geometry.window2d, "ar").

    float32, bfloat16 or float16, summed in float32.  The result lies in memory as (batch, seq, heads, head_dim).
    """
    reach = min(radius, max(height, width))  # a radius beyond the grid is as good as the grid's
    return _Window.apply(q, k, v, height, width, reach)


def _parts(q: Tensor, height: int, width: int) -> tuple[int, int]:
    """Heads of all images, and patches: programs stand in that order along one axis, as CUDA's others end at 65,535."""
    return q.shape[0] * q.shape[1], -(-height // TALL) * -(-width // WIDE)


@cache
def _settings(dim: int, heads: int, radius: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "HEADS": heads, "RADIUS": radius, "TALL": TALL, "WIDE": WIDE,
        "dim": dim, "DIM": max(16, 1 << (dim - 1).bit_length()),
        "REACH": max(16, 1 << (WIDE + 2 * radius - 1).bit_length()),
        "EXACT": "ieee" if dtype == torch.float32 else "tf32",
    }  # fmt: skip


def _steps(*tensors: Tensor) -> list[int]:
    return [step for x in tensors for step in x.stride()[:3]]


@torch.library.custom_op("attnbench::window", mutates_args=(), device_types=("cuda", "cpu"))
def _forward(q: Tensor, k: Tensor, v: Tensor, height: int, width: int, radius: int) -> tuple[Tensor, Tensor]:
    q, k, v = dense(q), dense(k), dense(v)
    from .window_kernels import attend as kernel  # Triton is loaded where it is used

    out, mass = _shapes(q, k, v, height, width, radius)
    told = _settings(q.shape[3], q.shape[1], radius, q.dtype)
    kernel[(prod(_parts(q, height, width)),)](
        q, k, v, out, mass, *_steps(q, k, v, out), height, width, q.shape[3] ** -0.5 / log(2), **told
    )
    return out, mass


@_forward.register_fake
def _shapes(q: Tensor, k: Tensor, v: Tensor, height: int, width: int, radius: int) -> tuple[Tensor, Tensor]:
    return like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("attnbench::window_backward", mutates_args=(), device_types=("cuda", "cpu"))
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, mass: Tensor, height: int, width: int, radius: int
) -> tuple[Tensor, Tensor, Tensor]:
    from .window_kernels import keys, queries

    grad, q, k, v = (dense(x) for x in (grad, q, k, v))
    dq, dk, dv = like(q), like(k), like(v)
    agreement, parts = torch.empty_like(mass), _parts(q, height, width)
    start_dk, start_dv = mass.new_empty(2, *parts, q.shape[3])
    grid = (prod(parts),)
    told = height, width, q.shape[3] ** -0.5 / log(2)
    settings = _settings(q.shape[3], q.shape[1], radius, q.dtype)
    queries[grid](
        q, k, v, out, grad, mass, dq, agreement, start_dk, start_dv, *_steps(q, k, v, out, grad, dq), *told, **settings
    )
    keys[grid](
        q, k, v, grad, mass, agreement, start_dk, start_dv, dk, dv, *_steps(q, k, v, grad, dk, dv), *told,
        ROUNDS=-(-parts[1] // 64), **settings,
    )  # fmt: skip
    return dq, dk, dv


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, mass: Tensor, height: int, width: int, radius: int
) -> tuple[Tensor, Tensor, Tensor]:
    return like(q), like(k), like(v)


class _Window(torch.autograd.Function):
    """Ties the two operators together, with a little less overhead a call than a registered autograd formula."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, height: int, width: int, radius: int) -> Tensor:
        out, mass = _forward(q, k, v, height, width, radius)
        ctx.save_for_backward(q, k, v, out, mass)
        ctx.grid = height, width, radius
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_backward(grad, *ctx.saved_tensors, *ctx.grid), None, None, None)
