"""What the compiled kernels are held against: attention by its definition, and mistakes of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from models import geometry, kernels, reference
from models.geometry import Grid, Scan

needs_compiler = pytest.mark.skipif(
    any(map(kernels.missing, ("local2d", "linear", "full", "decode", "decay"))),
    reason=str(kernels.missing("local2d")),
)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

TOLERANCES = {torch.float64: (1e-12, 1e-10), torch.float32: (1e-5, 1e-4)}


def inputs(batch: int, heads: int, seq: int, dim: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, heads, seq, dim, dtype=dtype, requires_grad=True) for _ in range(3)]


def assert_same(fast: Attend, slow: Attend, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Outputs and all gradients, within the tolerance of the dtype."""
    forward, backward = TOLERANCES[v.dtype]
    out, true = fast(q, k, v), slow(q, k, v)
    assert_close(out, true, rtol=forward, atol=forward)
    upstream = torch.randn_like(true)
    for got, want in zip(*(torch.autograd.grad(x, (q, k, v), upstream) for x in (out, true)), strict=True):
        assert_close(got, want, rtol=backward, atol=backward)


def window(height: int, width: int, radius: int, shift: int = 0) -> Attend:
    """The oracle of local2d; `shift` moves its mask by so many slots, wrongly."""
    mask = geometry.matrix(geometry.window2d(Scan(Grid(height, width)), radius), height * width)
    if shift:
        mask = mask.roll(shift, dims=1) | (torch.arange(height * width) == 0)
    return lambda q, k, v: reference.softmax_attention(q, k, v, mask)


def biased_window(table: Tensor, height: int, width: int, radius: int) -> Attend:
    """The oracle of local2d with a bias by offset: the start token's; then (Δrow, Δcol) from (R, R) to (0, 1)."""
    scan, reach, slot = Scan(Grid(height, width)), min(radius, max(height, width)), torch.arange(height * width)
    down = (scan.target(slot)[0][:, None] - scan.content(slot)[0]).clamp(0, reach)
    right = (scan.target(slot)[1][:, None] - scan.content(slot)[1]).clamp(-reach, reach)
    index = 1 + (reach - down) * (2 * reach + 1) + reach - right
    index = index.where(~scan.is_start(slot), 0).clamp(max=table.shape[1] - 1)
    mask = geometry.matrix(geometry.window2d(scan, radius), height * width)
    return lambda q, k, v: reference.softmax_attention(q, k, v, mask, table[:, index])


def local(height: int, width: int, radius: int) -> Attend:
    return lambda q, k, v: kernels.local2d(q, k, v, height, width, radius)


def recurrent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference.linear_attention(q, k, v, lambda x: F.elu(x) + 1, True)


def scanned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return kernels.linear(q, k, v, "elu+1")


def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return kernels.full(q, k, v, True)


def square(seq: int, causal: bool = True, shift: int = 0) -> Attend:
    """The oracle of dense attention; `shift` moves its mask by so many slots, wrongly."""
    mask = torch.ones(seq, seq, dtype=torch.bool)
    mask = mask.tril().roll(shift, dims=1) | torch.eye(seq, dtype=torch.bool) if causal else mask
    return lambda q, k, v: reference.softmax_attention(q, k, v, mask)


def fades(q: Tensor) -> Tensor:
    """λ_row and λ_col of every head, all different."""
    return torch.linspace(0.4, 0.95, 2 * q.shape[1], dtype=q.dtype).view(2, -1)


def fading(height: int, width: int, later: bool = False, started: bool = False) -> Attend:
    return lambda q, k, v: kernels.decayed2d(
        q, k, v, fades(q), height, width, scale=q.shape[-1] ** -0.5, later=later, started=started
    )


def faded(
    height: int, width: int, later: bool = False, started: bool = False, swapped: bool = False, shift: int = 0
) -> Attend:
    """The oracle of decay2d: pixels by their slots; or, wrongly, columns for rows, or keys so many slots too late."""
    target = torch.arange(height * width)
    content = target - int(started) - shift
    rows = (target[:, None] // width - content[None, :] // width).abs()
    cols = (target[:, None] % width - content[None, :] % width).abs()
    seen = target[:, None] < content[None, :] if later else target[:, None] > content[None, :]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        down, across = fades(q).flip(0) if swapped else fades(q)
        weight = down[:, None, None] ** rows * across[:, None, None] ** cols * seen
        if started:
            weight[:, :, 0] = 1
        return reference.weighted_attention(q, k, v, weight) / q.shape[-1] ** 0.5

    return attend


started = fading(3, 5, started=True)


def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A head by its root mean square."""
    return kernels.unit(q + k + v, 1e-5)


def forgetting(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A decay of its own for each channel, known from the keys, whose gradient thus has a part of its own."""
    return kernels.decayed(q * q.shape[-1] ** -0.5, k, v, F.logsigmoid(k) / 4)


def _strengths(k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys of length 1, log decays and β of the delta rule, all known from the keys."""
    return F.normalize(k, dim=-1), F.logsigmoid(k[..., :1]) / 4, k[..., -1:].sigmoid()


def rewriting(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The delta rule by the kernels."""
    k, log_decay, beta = _strengths(k)
    return kernels.decayed(q, k, kernels.solved(beta * k, k, beta * v, log_decay), log_decay)


def rewritten(q: Tensor, k: Tensor, v: Tensor, shift: int = 0) -> Tensor:
    """Its oracle; `shift` lets decays act by so many slots too late, wrongly."""
    k, log_decay, beta = _strengths(k)
    return reference.delta_rule(q, k, v, log_decay[..., 0].roll(shift, 2), beta[..., 0])


def forgotten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The oracle of decayed."""
    return reference.decayed_attention(q, k, v, F.logsigmoid(k) / 4) / q.shape[-1] ** 0.5
