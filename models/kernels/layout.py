"""How tensors lie in memory where kernels read and write them."""

from __future__ import annotations

from torch import Tensor


def like(x: Tensor) -> Tensor:
    """Room for a tensor (batch, heads, seq, dim), in the order in which the trunk's projections read and write."""
    batch, heads, seq, dim = x.shape
    return x.new_empty(batch, seq, heads, dim).transpose(1, 2)


def dense(x: Tensor) -> Tensor:
    """Itself, or a copy where its last dimension is not contiguous: all that a kernel asks for."""
    return x if x.stride(3) == 1 else x.contiguous()
