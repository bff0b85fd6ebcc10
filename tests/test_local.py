"""Local attention equals its oracle, and decodes, along every scan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models
from models import kernels
from models.geometry import Grid, Scan, matrix
from models.local import Local1D, Local2D
from models.mixer import AHEAD, Layer, allot
from models.orders import ORDERS

LOCAL: list[tuple[type[Any], dict[str, int]]] = [(Local1D, {"window": 3}), (Local2D, {"radius": 1})]


@pytest.mark.parametrize(("cls", "options"), LOCAL)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_every_backend_equals_the_oracle_along_every_scan(
    cls: type[Any], options: dict[str, int], order: str, objective: str
) -> None:
    layer = Layer(Scan(Grid(9, 10), objective, order), heads=2, head_dim=4)
    oracle = cls(layer, **options)
    q, k, v = (torch.randn(2, 2, 90, 4, dtype=torch.float64) for _ in range(3))
    for backend in (name for name in oracle.backends if not oracle.refusals(name)):
        mixer = cls(Layer(layer.scan, 2, 4, backend=backend), **options)
        assert_close(mixer(q, k, v), oracle.oracle(q, k, v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["local1d", "local2d", "dense1d", "dense2d", "linear"])
@pytest.mark.parametrize("order", ORDERS)
def test_decoding_along_a_scan_equals_the_full_pass(name: str, order: str) -> None:
    torch.manual_seed(0)
    model = models.build(name, height=3, width=5, vocab=4, dim=8, depth=2, heads=2, scan=order).double()
    with torch.no_grad():
        model.head.weight.normal_()  # type: ignore[union-attr, operator]
        tokens = torch.randint(4, (2, 3, 5))
        full = model(tokens).flatten(1, 2)[:, model.order]  # type: ignore[index]
        state, pixel = model.start(2), None  # type: ignore[operator]
        for slot, place in enumerate(model.order):  # type: ignore[arg-type]
            logits, state = model.step(pixel, state)  # type: ignore[operator]
            assert_close(logits, full[:, slot], rtol=1e-10, atol=1e-10)
            pixel = tokens.flatten(1)[:, place]


def test_local2d_sees_the_true_neighbours_whatever_the_scan() -> None:
    """Of a target, on every scan: the pixels next to it that the scan has passed, and no other."""
    for order in ORDERS:
        scan = Scan(Grid(5, 5), order=order)
        mask = matrix(Local2D(Layer(scan, 1, 4), radius=1).visible(), 25)
        target = int(scan.rank[2 * 5 + 2])
        row, col = scan.content(mask[target].nonzero().flatten()[1:])
        passed = {(r, c) for r in (1, 2, 3) for c in (1, 2, 3) if int(scan.rank[r * 5 + c]) < target}
        assert set(zip(row.tolist(), col.tolist(), strict=True)) == passed, order


def test_decoding_keeps_no_more_than_the_window() -> None:
    scan = Scan(Grid(20, 10))
    like = torch.zeros(1)
    assert Local1D(Layer(scan, 1, 4), window=7).start(1, like).k.shape[2] == 1 + 7
    # 2R rows and columns of halo: R rows and R pixels before the target, and the start token.
    assert Local2D(Layer(scan, 1, 4), radius=2).start(1, like).k.shape[2] <= 1 + 2 * 10 + 2 + 1


def test_a_decoded_pixel_costs_the_same_in_a_large_image() -> None:
    """No tensor that a step makes, looking ahead included, grows with the image's height."""
    q, k, v = torch.randn(3, 1, 1, 1, 4)
    largest = {}
    for height in (24, 1024):
        mixer = Local2D(Layer(Scan(Grid(height, 16)), 1, 4), radius=2)
        state = mixer.start(1, q)
        with Sizes() as sizes:
            state.slot = 16 * height // 2
            for _ in range(3 * AHEAD):
                mixer.step(q, k, v, state)
        largest[height] = max(sizes.seen[len(sizes.seen) // 3 :])  # once it follows on what it saw before
    assert largest[24] == largest[1024] <= AHEAD * (2 * 2 + 4) * 16


class Sizes(TorchDispatchMode):
    """How many numbers each tensor has that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        self.seen += [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        return out


def test_places_are_taken_again_only_after_their_last_use() -> None:
    last_use = [9, 1, 2, 6, 4, 5, 9, 7, 9, 9]
    places, count = allot(last_use)
    held: dict[int, int] = {}
    for slot, place in enumerate(places):
        assert last_use[held.get(place, slot)] < slot or place not in held
        held[place] = slot
    assert count == max(sum(s <= t <= last for s, last in enumerate(last_use)) for t in range(10))


class Overtaken(Local2D):
    """Whose table of who sees whom another thread replaces as soon as it was read."""

    @property
    def _seen(self) -> Any:
        return self.__dict__.pop("kept", None)

    @_seen.setter
    def _seen(self, seen: Any) -> None:
        self.__dict__["kept"] = seen


def test_two_threads_may_decode_with_one_model() -> None:
    layer, (q, k, v) = Layer(Scan(Grid(3, 5)), 2, 4), torch.randn(3, 1, 2, 1, 4)
    outputs = []
    for mixer in (Overtaken(layer, radius=1), Local2D(layer, radius=1)):
        state = mixer.start(1, q)
        outputs.append([mixer.step(q, k, v, state)[0] for _ in range(3)])
    assert_close(*outputs)


def test_offsets_are_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    right, asked = kernels.offsets, []
    monkeypatch.setattr(kernels, "offsets", lambda *window: asked.append(window) or right(*window))  # type: ignore[func-returns-value]
    model = models.build("local2d", height=3, width=5, vocab=4, dim=8, depth=1, heads=2, position="relbias2d")
    if model.backend != "compiled":
        pytest.skip("asked for by the compiled kernel alone")
    for _ in range(2):
        model(torch.zeros(1, 3, 5, dtype=torch.long))
    assert asked == [(3, 5, 3)]


@pytest.mark.parametrize(("name", "option"), [("local1d", "window"), ("local2d", "radius")])
@pytest.mark.parametrize("value", [0, -1, 1.5, "3"])
def test_a_window_that_is_no_whole_number_is_refused(name: str, option: str, value: object) -> None:
    with pytest.raises(ValueError, match=option):
        models.build(name, height=3, width=3, vocab=2, **{option: value})  # type: ignore[arg-type]


@pytest.mark.skipif(bool(kernels.missing("local2d")), reason=str(kernels.missing("local2d")))
def test_a_window_whose_working_rows_outgrow_a_dense_layer_is_not_compiled() -> None:
    def local(height: int, width: int, radius: int) -> Local2D:
        return Local2D(Layer(Scan(Grid(height, width)), 2, 8), radius=radius)

    assert local(28, 28, 13).backend == local(8, 8, 8).backend == local(256, 256, 3).backend == "compiled"
    for height, width, radius in ((1, 64, 64), (32, 32, 32), (128, 1, 128)):
        assert local(height, width, radius).backend == "blocked"
        assert any("working rows" in reason for reason in local(height, width, radius).refusals("compiled"))
