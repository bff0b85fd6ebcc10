"""decay2d: its weights are the true two-dimensional ones, however it is tiled, and mistakes in them are caught."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import models
from models.decay2d import Decay2D, evened
from models.geometry import Grid, Scan
from models.mixer import Layer

SHAPES = [(1, 1), (1, 17), (17, 1), (3, 5), (9, 10), (17, 19)]


def make(height: int, width: int, objective: str = "ar", cls: type[Any] = Decay2D, **options: Any) -> Any:
    return cls(Layer(Scan(Grid(height, width), objective), heads=2, head_dim=4), **{"learned": True} | options).double()


def draw(mixer: Any) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 2, mixer.layer.size, 4, dtype=torch.float64) for _ in range(3)]


def agrees(mixer: Any) -> bool:
    given = draw(mixer)
    return torch.allclose(mixer(*given), mixer.oracle(*given), rtol=1e-12, atol=1e-12)


def test_the_weights_of_a_small_grid_by_hand() -> None:
    """2 × 3 pixels, λ_row = λ_col = 1/2 in the first head: what the target (1, 1) reads, by what slots contain."""
    mixer = make(2, 3)
    weight = mixer.weight(torch.zeros((), dtype=torch.float64))[0]
    start, above, left = 1.0, [1 / 4, 1 / 2, 1 / 4], 1 / 2
    assert_close(weight[4].tolist(), [start, *above, left, 0.0], rtol=1e-6, atol=0.0)
    assert_close(weight[3].tolist(), [start, 1 / 2, 1 / 4, 1 / 8, 0.0, 0.0], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize(("band", "strip"), [(1, 1), (2, 3), (4, 8)])
def test_every_tiling_equals_the_oracle(objective: str, height: int, width: int, band: int, strip: int) -> None:
    mixer = make(height, width, objective, band=band, strip=strip)
    given = [x.requires_grad_() for x in draw(mixer)]
    leaves = [*given, *mixer.parameters()]
    fast, slow = mixer(*given), mixer.oracle(*given)
    assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(fast)
    assert_close(torch.autograd.grad(fast, leaves, upstream), torch.autograd.grad(slow, leaves, upstream),
                 rtol=1e-10, atol=1e-10)  # fmt: skip


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_decoding_keeps_a_state_for_every_column_and_equals_the_oracle(height: int, width: int) -> None:
    mixer = make(height, width)
    q, k, v = draw(mixer)
    state, rows = mixer.start(2, q), []
    with torch.no_grad():
        for t in range(mixer.layer.size):
            out, state = mixer.step(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], state)
            rows.append(out)
    assert_close(torch.cat(rows, dim=2), mixer.oracle(q, k, v), rtol=1e-12, atol=1e-12)
    kept = sum(x.numel() for x in vars(state).values() if isinstance(x, Tensor))
    assert kept == 2 * 2 * 4 * 4 * 2 * (width + 1)  # batch · heads · d² · 2(width + 1), whatever the height


class Mistaken(Decay2D):
    """An oracle with other weights: what the fast form would be, had it made that mistake."""

    def weight(self, like: Tensor) -> Tensor:
        return self.mistake(super().weight(like))

    def mistake(self, weight: Tensor) -> Tensor:
        return weight


class DecayTwice(Mistaken):
    def mistake(self, weight: Tensor) -> Tensor:
        return weight * weight


class StartFades(Mistaken):
    def mistake(self, weight: Tensor) -> Tensor:
        return torch.cat([weight[:, :, :1] * 0.9, weight[:, :, 1:]], dim=2)


class ShiftedByOne(Mistaken):
    def mistake(self, weight: Tensor) -> Tensor:
        return torch.cat([weight[:, :, :1], weight[:, :, 1:].roll(1, dims=2)], dim=2).tril()


class OnSlotNumbers(Mistaken):
    """Keys taken to stand where their slot's target stands: skewed by a column."""

    def mistake(self, weight: Tensor) -> Tensor:
        return torch.cat([weight[:, :, :1], weight[:, :, 1:].roll(-1, dims=2)], dim=2).tril()


class SwappedAxes(Mistaken):
    def weight(self, like: Tensor) -> Tensor:
        other = Decay2D(self.layer).to(like.dtype)
        other.log_rates = torch.nn.Parameter(self.log_rates.flip(0))
        return other.weight(like)


@pytest.mark.parametrize("cls", [DecayTwice, StartFades, ShiftedByOne, OnSlotNumbers, SwappedAxes])
def test_mistakes_are_caught(cls: type[Any]) -> None:
    def varied(cls: type[Any]) -> Any:
        mixer = make(9, 10, cls=cls)
        with torch.no_grad():
            mixer.log_rates[0] += 0.5  # rows and columns fade differently
        return mixer

    assert agrees(varied(Mistaken)) and not agrees(varied(cls))


def test_pixels_do_not_wrap_round_at_row_starts() -> None:
    """The last pixel of a row is next to the first of the next row in the raster, and far away on the grid."""
    mixer = make(4, 16, learned=False)
    weight = mixer.weight(torch.zeros((), dtype=torch.float64))[0]
    assert weight[16, 16] < 1e-4 < weight[16, 1]


def test_fixed_rates_are_no_parameters() -> None:
    assert not list(make(3, 5, learned=False).parameters())
    assert [p.shape for p in make(3, 5).parameters()] == [(2, 2)]
    assert_close(make(3, 5, learned=False)(*draw(make(3, 5))), make(3, 5)(*draw(make(3, 5))))


def test_a_scan_without_whole_earlier_rows_is_refused() -> None:
    for scan in ("snake", "column", "hilbert", "random"):
        with pytest.raises(ValueError, match="raster"):
            models.build("decay2d", height=3, width=5, vocab=4, dim=8, heads=2, scan=scan)


@pytest.mark.parametrize("rate", [-20.0, 6.0])
def test_rates_near_zero_and_beyond_any_float_are_harmless(rate: float) -> None:
    """λ from 1 - 2e-9 down to exp(-403), in float32: no overflow, no 0/0, finite gradients."""
    mixer = make(40, 24).float()
    with torch.no_grad():
        mixer.log_rates.fill_(rate)
    given = [x.float().requires_grad_() for x in draw(mixer)]
    out = mixer(*given)
    assert_close(out, mixer.oracle(*given), rtol=1e-3, atol=1e-3)
    assert all(x.isfinite().all() for x in torch.autograd.grad((out**2).sum(), [*given, *mixer.parameters()]))


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_nothing_is_copied_to_the_device_on_the_way(objective: str) -> None:
    """A number of Python's made a tensor there is a copy that waits, and no CUDA graph may hold one."""
    mixer, asked = make(9, 10, objective, band=2, strip=3), []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.append(function.name())
            return function(*args, **(kwargs or {}))

    with Recorder():
        mixer(*draw(mixer)).sum().backward()
    assert "aten::bmm" in asked and "aten::lift_fresh" not in asked


def test_sides_are_cut_evenly() -> None:
    assert [evened(side, 8) for side in (1, 8, 9, 28, 32)] == [1, 8, 5, 7, 8]
