"""What a block does around its mixer on CPU (block.cpp) as torch operators: autograd, fake tensors, torch.compile.

Shapes: x, mixed, out (batch, seq, dim); u (batch, seq, width): what the MLP's activation is given, kept for the
backward pass, which computes the rest again; sums (parts, …): room in which the gradients of weights are added up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .compiler import call, missing, unfit

MOST_CHANNELS = 512
"""Beyond it torch's products are as fast, and the sums take more room than they save."""
MOST_PARTS, ROWS_A_PART = 16, 512


def serves(x: Tensor, *parameters: Tensor) -> bool:
    """Whether the kernels can take x and these parameters; which batch it is, plays no part."""
    return (
        x.shape[-1] <= MOST_CHANNELS
        and x.device.type == "cpu"
        and all(p.device.type == "cpu" and p.dtype == x.dtype for p in parameters)
        and unfit(x) is None
        and not torch.is_autocast_enabled("cpu")
        and _built()
    )


@torch.compiler.assume_constant_result
def _built() -> bool:
    return missing("block") is None


def project(x: Tensor, gain: Tensor, eps: float, weight: Tensor) -> Tensor:
    """norm(x) Wᵀ with norm(x) = x / √(mean of squares + eps) · gain: (batch, seq, width)."""
    return _Project.apply(x, gain, weight, eps)


def finish(x: Tensor, mixed: Tensor, outer: Tensor, gain: Tensor, eps: float, up: Tensor, down: Tensor) -> Tensor:
    """y + down(gelu(up(norm(y)))) with y = x + mixed Wᵀ, W = `outer`, and gelu(u) = u·σ(1.702u)."""
    return _Finish.apply(x, mixed, outer, gain, up, down, eps)


def _parts(x: Tensor) -> int:
    """In how many parts the gradients of weights are summed, which run at the same time: a power of two."""
    wanted = min(MOST_PARTS, max(1, x.shape[:-1].numel() // ROWS_A_PART))
    return 1 << wanted.bit_length() - 1


def _run(function: str, x: Tensor, width: int, eps: float, *tensors: Tensor) -> None:
    shape = (x.shape[:-1].numel(), x.shape[-1], width, _parts(x))
    call("block", f"block_{function}", shape, eps, *(tensor.contiguous() for tensor in tensors))


@torch.library.custom_op("attnbench::project", mutates_args=(), device_types="cpu")
def _project(x: Tensor, gain: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = _projected(x, gain, weight, eps)
    _run("project_forward", x, len(weight), eps, x, gain, weight, out)
    return out


@_project.register_fake
def _projected(x: Tensor, gain: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


@torch.library.custom_op("attnbench::project_backward", mutates_args=(), device_types="cpu")
def _project_backward(grad: Tensor, x: Tensor, gain: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    made = _project_gradients(grad, x, gain, weight, eps)
    _run("project_backward", x, len(weight), eps, grad, x, gain, weight, *made)
    return made


@_project_backward.register_fake
def _project_gradients(grad: Tensor, x: Tensor, gain: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    return _like(x, x, gain, weight)


def _like(x: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Room for their gradients, and for the sums of those of weights, which come after the activations."""
    gradients = [x.new_empty(tensor.shape) for tensor in tensors]
    weights = sum(tensor.numel() for tensor in tensors if tensor.dim() < 3)
    return [*gradients, x.new_empty(_parts(x), weights)]


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, gain, weight)
        ctx.eps = eps
        return _project(x, gain, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_project_backward(grad, *ctx.saved_tensors, ctx.eps)[:-1], None)


@torch.library.custom_op("attnbench::finish", mutates_args=(), device_types="cpu")
def _finish(
    x: Tensor, mixed: Tensor, outer: Tensor, gain: Tensor, up: Tensor, down: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    made = _finished(x, mixed, outer, gain, up, down, eps)
    _run("finish_forward", x, len(up), eps, x, mixed, outer, gain, up, down, *made)
    return made


@_finish.register_fake
def _finished(
    x: Tensor, mixed: Tensor, outer: Tensor, gain: Tensor, up: Tensor, down: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(*x.shape[:-1], len(up))


@torch.library.custom_op("attnbench::finish_backward", mutates_args=(), device_types="cpu")
def _finish_backward(
    grad: Tensor, mixed: Tensor, outer: Tensor, gain: Tensor, up: Tensor, down: Tensor, y: Tensor, u: Tensor, eps: float
) -> list[Tensor]:
    made = _finish_gradients(grad, mixed, outer, gain, up, down, y, u, eps)
    _run("finish_backward", y, len(up), eps, grad, mixed, outer, gain, up, down, y, u, *made)
    return made


@_finish_backward.register_fake
def _finish_gradients(
    grad: Tensor, mixed: Tensor, outer: Tensor, gain: Tensor, up: Tensor, down: Tensor, y: Tensor, u: Tensor, eps: float
) -> list[Tensor]:
    return _like(y, y, mixed, outer, gain, up, down)


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mixed: Tensor, outer: Tensor, gain: Tensor, up: Tensor, down: Tensor, eps: float
    ) -> Tensor:
        out, y, u = _finish(x, mixed, outer, gain, up, down, eps)
        ctx.save_for_backward(mixed, outer, gain, up, down, y, u)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_finish_backward(grad, *ctx.saved_tensors, ctx.eps)[:-1], None)


# What torch's counter counts of them: the products, and in the backward pass two for each.


def _project_flops(x: torch.Size, gain: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x[:-1].numel() * weight.numel()


def _finish_flops(
    x: torch.Size, mixed: torch.Size, outer: torch.Size, gain: torch.Size, up: torch.Size, down: torch.Size,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    return 2 * x[:-1].numel() * (outer.numel() + up.numel() + down.numel())


register_flop_formula(torch.ops.attnbench.project)(_project_flops)
register_flop_formula(torch.ops.attnbench.project_backward)(lambda grad, *rest, **_: 2 * _project_flops(*rest))
register_flop_formula(torch.ops.attnbench.finish)(_finish_flops)
register_flop_formula(torch.ops.attnbench.finish_backward)(lambda grad, *rest, **_: 2 * _finish_flops(grad, *rest))
