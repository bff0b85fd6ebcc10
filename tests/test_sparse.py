"""Sparse attention equals its oracle over several tiles and along every scan; costs and hybrids are as declared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

import models
from models.full import Dense
from models.geometry import Grid, Scan, matrix
from models.local import Local2D
from models.mixer import ExactMixer, Layer
from models.orders import ORDERS
from models.sparse import Axial, Block2D, Dilated2D, Fixed, GlobalLocal2D, Strided

CASES: list[tuple[type[Any], dict[str, int]]] = [
    (Dilated2D, {"radius": 1, "dilation": 2}),
    (Block2D, {"block": 3, "memory": 2}),
    (GlobalLocal2D, {"radius": 1}),
    (Axial, {}),
    (Strided, {}),
    (Strided, {"stride": 4}),
    (Fixed, {}),
    (Fixed, {"stride": 5, "columns": 2}),
]
NAMES = ("dilated2d", "block2d", "axial", "strided", "fixed", "global-local2d", "hybrid-local2d")


def mixers(cls: type[Any], options: dict[str, int], scan: Scan, backend: str = "auto") -> list[ExactMixer]:
    """Two layers of it: they may differ."""
    return [cls(Layer(scan, 2, 4, index=index, depth=2, backend=backend), **options) for index in (0, 1)]


def qkv(size: int, *, grad: bool = False) -> list[torch.Tensor]:
    return [torch.randn(2, 2, size, 4, dtype=torch.float64, requires_grad=grad) for _ in range(3)]


def slope(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A bias that tells every pair apart."""
    return torch.tensor([0.1, -0.2], dtype=torch.float64).view(2, *[1] * (query - key).ndim) * (query - 2 * key)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("cls", "options"), CASES)
@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_blocked_equals_the_oracle(cls: type[Any], options: dict[str, int], objective: str, biased: bool) -> None:
    for height, width in [(1, 1), (1, 9), (9, 1), (3, 5), (11, 13)]:
        scan, bias = Scan(Grid(height, width), objective), slope if biased else None
        for mixer in mixers(cls, options, scan):
            assert mixer.backend == "blocked"
            leaves = qkv(scan.grid.size, grad=True)
            upstream = torch.randn_like(leaves[0])
            results = []
            for attend in (mixer, mixer.oracle):
                out = attend(leaves[0], leaves[1], leaves[2], bias)
                results.append([out, *torch.autograd.grad(out, leaves, upstream)])
            assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)
            assert_close(results[0][1:], results[1][1:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", [order for order in ORDERS if order != "raster"])
@pytest.mark.parametrize(("cls", "options"), CASES)
def test_blocked_equals_the_oracle_along_every_scan(cls: type[Any], options: dict[str, int], order: str) -> None:
    scan = Scan(Grid(9, 10), order=order)
    for mixer in mixers(cls, options, scan):
        q, k, v = qkv(90)
        assert_close(mixer(q, k, v), mixer.oracle(q, k, v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("cls", "options"), CASES)
def test_the_comparison_would_catch_a_mask_shifted_by_one(
    cls: type[Any], options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = qkv(90)
    for mixer in mixers(cls, options, Scan(Grid(9, 10))):
        visible, out = mixer.visible(), mixer(q, k, v)
        monkeypatch.setattr(mixer, "visible", lambda see=visible: lambda query, key: see(query, key + 1) | (key == 0))
        assert not torch.allclose(out, mixer.oracle(q, k, v))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", ORDERS)
def test_decoding_equals_the_full_pass(name: str, order: str) -> None:
    torch.manual_seed(0)
    model: Any = models.build(name, height=4, width=6, vocab=4, dim=8, depth=4, heads=2, scan=order).double()
    with torch.no_grad():
        model.head.weight.normal_()
        tokens = torch.randint(4, (2, 4, 6))
        full = model(tokens).flatten(1, 2)[:, model.order]
        state, pixel = model.start(2), None
        for slot, place in enumerate(model.order):
            logits, state = model.step(pixel, state)
            assert_close(logits, full[:, slot], rtol=1e-10, atol=1e-10)
            pixel = tokens.flatten(1)[:, place]


def test_decoding_keeps_what_later_pixels_see_and_no_more() -> None:
    """H = 12 rows of W = 10: a row, a row and the row ends, a window and the row starts, each with the start token."""
    layer, like = Layer(Scan(Grid(12, 10)), 1, 4), torch.zeros(1)
    assert Axial(layer).start(1, like).k.shape[2] <= 1 + 10
    assert Fixed(layer).start(1, like).k.shape[2] <= 1 + 10 + 12
    assert GlobalLocal2D(layer, radius=1).start(1, like).k.shape[2] <= 1 + 2 * 10 + 12
    assert Strided(layer).start(1, like).k.shape[2] == 120


def seen(mixers: list[ExactMixer], row: int, col: int) -> set[tuple[int, int]]:
    """The pixels that a target depends on through these layers, the last one last."""
    scan = mixers[0].layer.scan
    size = scan.grid.size
    reach = torch.eye(size, dtype=torch.bool)  # on which slots' embeddings a slot depends: itself, by the residual
    for mixer in mixers:
        step = matrix(mixer.visible(), size) | torch.eye(size, dtype=torch.bool)
        reach = (step.float() @ reach.float()) > 0
    slots = reach[int(scan.rank[row * scan.grid.width + col])].nonzero().flatten()
    rows, cols = scan.content(slots[slots > 0])
    return set(zip(rows.tolist(), cols.tolist(), strict=True))


def test_two_axial_layers_reach_what_the_docstring_says() -> None:
    layers = mixers(Axial, {}, Scan(Grid(4, 5)))
    assert seen(layers[:1], 2, 3) == {(2, 0), (2, 1), (2, 2)}
    earlier = {(r, c) for r in (0, 1) for c in range(4)}
    assert seen(layers, 2, 3) == earlier | {(2, 0), (2, 1), (2, 2)}
    assert seen(layers, 2, 4) == {(0, 4), (1, 4)} | {(2, c) for c in range(4)}


def test_dilated2d_sees_no_neighbour_in_one_layer() -> None:
    (layer, _) = mixers(Dilated2D, {"radius": 1, "dilation": 2}, Scan(Grid(5, 5)))
    # The slot's own content, (2, 1), comes by the residual stream.
    assert seen([layer], 2, 2) == {(0, 0), (0, 2), (0, 4), (2, 0), (2, 1)}


@pytest.mark.parametrize(
    ("depth", "every", "dense"), [(4, 3, [3]), (8, 3, [3, 7]), (2, 3, [1]), (1, 3, [0]), (4, 1, [1, 3])]
)
def test_a_hybrid_has_one_dense_layer_for_every_so_many(depth: int, every: int, dense: list[int]) -> None:
    model: Any = models.build("hybrid-local2d", height=3, width=3, vocab=2, dim=8, heads=2, depth=depth, every=every)
    assert [i for i, mixer in enumerate(model.mixers) if isinstance(mixer, Dense)] == dense
    assert all(isinstance(m, Local2D) and m.radius == 3 for i, m in enumerate(model.mixers) if i not in dense)


@pytest.mark.parametrize(
    ("cls", "power"),
    [(Axial, 1.5), (Strided, 1.5), (Fixed, 1.5), (GlobalLocal2D, 1.5), (Dilated2D, 1.0), (Block2D, 1.0)],
)
def test_flops_are_those_of_the_mask_and_grow_as_declared(cls: type[Any], power: float) -> None:
    flops = []
    for side in (24, 48):
        scan = Scan(Grid(side, side))
        (mixer, _) = mixers(cls, {}, scan)
        assert mixer.flops() == 4 * 2 * 4 * int(matrix(mixer.visible(), side * side).sum())
        flops.append(mixer.flops())
    assert flops[1] / flops[0] < 4**power * 1.2  # at the borders there is less to see


def test_strided_keeps_memory_of_order_n_root_n() -> None:
    """What the backward pass keeps, at 8 times the pixels, grows by 8^1.5 and not by 8²."""
    kept = []
    for side in (16, 64):
        (mixer, _) = mixers(Strided, {}, Scan(Grid(side, side)))
        storages: dict[int, int] = {}

        def pack(x: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[x.untyped_storage().data_ptr()] = x.numel()
            return x

        q, k, v = (x.float()[:1].detach().requires_grad_() for x in qkv(side * side))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            mixer(q, k, v)
        kept.append(sum(storages.values()))
    assert kept[1] / kept[0] < 16**1.55


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("dilated2d", {"dilation": 0}, "dilation must be a whole number"),
        ("block2d", {"memory": -1}, "memory must be a whole number"),
        ("strided", {"stride": 2.5}, "stride must be a whole number"),
        ("fixed", {"stride": 3, "columns": 4}, "columns 4 must not exceed stride 3"),
        ("hybrid-local2d", {"every": 0}, "every must be a whole number"),
        ("hybrid-local2d", {"backend": "sdpa"}, "backend 'sdpa' cannot run Local2D"),
    ],
)
def test_an_option_that_cannot_be_is_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        models.build(name, height=3, width=3, vocab=2, **options)
