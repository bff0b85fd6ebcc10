"""Local 2D attention in Triton against its oracle: on CUDA where there is one, else by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from models import geometry, kernels, reference
from models.geometry import Grid, Scan

GRIDS = [(1, 1), (1, 7), (7, 1), (9, 21), (5, 18)]
BOUNDS = {torch.float32: 2e-5, torch.float16: 3e-3}
if torch.cuda.is_available():  # the interpreter knows no products of bfloat16
    BOUNDS[torch.bfloat16] = 2e-2


def off_by(got: Tensor, want: Tensor) -> float:
    """The length of the difference, relative to the wanted one's (at least 1, where a gradient is zero)."""
    return float((got.double() - want).norm() / want.norm().clamp(min=1.0))


def errors(height: int, width: int, radius: int, dim: int, dtype: torch.dtype, shown: int = 0) -> list[float]:
    """How far the output and the gradients of q, k, v are from the oracle's, whose radius is larger by `shown`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    packed = torch.randn(2, height * width, 3, 3, dim, device=device, dtype=dtype)  # as a projection lays them out
    q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in packed.unbind(2))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    mask = geometry.matrix(geometry.window2d(Scan(Grid(height, width)), radius + shown), height * width).to(device)
    out = kernels.window.attend(q, k, v, height, width, radius)
    want = reference.softmax_attention(wide[0], wide[1], wide[2], mask)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), upstream)
    true = torch.autograd.grad(want, wide, upstream.double())
    return [off_by(got, right.detach()) for got, right in zip((out.detach(), *grads), (want, *true), strict=True)]


def test_the_kernel_equals_its_oracle() -> None:
    pytest.importorskip("triton", reason="triton is not installed (extra gpu)")
    environment = dict(os.environ) if torch.cuda.is_available() else os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-m", "tests.test_window"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == f"{len(GRIDS) * len(BOUNDS) * 2} compared"


def test_what_it_cannot_serve_is_said() -> None:
    q = torch.zeros(1, 1, 6, 4)
    assert kernels.window.unfit(q) == "is for CUDA, not cpu"
    if not torch.cuda.is_available():
        assert any("not installed" in reason or "no CUDA" in reason for reason in kernels.window.reasons(8, 3))


@pytest.mark.parametrize(
    ("dim", "radius", "said"),
    [
        (128, 3, None),
        (128, 24, None),
        (128, 25, "at most 64 columns"),
        (64, 25, None),
        (129, 1, "at most 128 channels"),
    ],
)
def test_what_leaves_a_program_no_registers_is_refused(dim: int, radius: int, said: str | None) -> None:
    refused = [r for r in kernels.window.reasons(dim, radius) if "at most" in r]
    assert len(refused) == bool(said) and (said is None or said in refused[0])


def test_wide_heads_are_refused_in_float32_alone() -> None:
    def wide(dtype: torch.dtype, dim: int) -> Tensor:
        return SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=dtype, shape=(1, 1, 6, dim))  # type: ignore[return-value]

    assert kernels.window.unfit(wide(torch.float32, 32)) is kernels.window.unfit(wide(torch.bfloat16, 64)) is None
    assert kernels.window.unfit(wide(torch.float32, 33)) == "takes float32 heads of at most 32 channels, not 33"


def test_a_launch_is_long_along_the_first_axis_only_and_reaches_no_further_than_the_grid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA's other axes end at 65,535; and each row and column that is reached for makes the kernel longer."""
    launched: list[tuple[tuple[int, ...], int]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *given, **told: launched.append((grid, told["RADIUS"]))

    monkeypatch.setitem(sys.modules, "models.kernels.window_kernels", SimpleNamespace(attend=Kernel()))
    q = torch.zeros(70_000, 1, 6, 1)
    kernels.window.attend(q, q, q, 2, 3, radius=50)
    ((grid, radius),) = launched
    assert grid[0] >= 70_000 and all(size <= 65_535 for size in grid[1:])
    assert radius == 3


def main() -> None:
    compared = 0
    for dtype, bound in BOUNDS.items():
        for height, width in GRIDS:
            for radius, dim in ((1, 8), (3, 24)):
                worst = max(errors(height, width, radius, dim, dtype))
                assert worst < bound, (height, width, radius, dim, dtype, worst)
                compared += 1
        assert max(errors(9, 21, 2, 8, dtype, shown=1)) > 10 * bound, "a window too small was not seen"
    print(f"{compared} compared")


if __name__ == "__main__":
    main()
