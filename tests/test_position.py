"""Positional encodings: each against its formula at true coordinates, on any scan, in decoding, and at another side."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import models
from models import kernels
from models.full import BLOCK, Dense
from models.geometry import Grid, Scan
from models.mixer import Layer
from models.orders import ORDERS
from models.position import POSITIONS, Position, Shape

DENSE = {name: v for name, v in models.VARIANTS.items() if v.cls is Dense}
ROTARY = ("rope1d", "rope2d", "mixed2d")
ANY_SIDE = ("sin1d", "sin2d", "rope1d", "rope2d", "mixed2d", "alibi1d", "alibi2d", "relbias2d")


def make(
    name: str, height: int = 3, width: int = 5, objective: str = "ar", order: str = "raster", learning: bool = False
) -> Any:
    """A position in float64 with every parameter drawn anew."""
    torch.manual_seed(0)
    made: Any = POSITIONS[name](Shape(Scan(Grid(height, width), objective, order), dim=16, depth=2, heads=2)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made.requires_grad_(learning)


def coordinates(scan: Scan) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(row, col) of every slot's target and of its content, by hand."""
    target = [divmod(int(pixel), scan.grid.width) for pixel in scan.path]
    return target, ([(target[0][0], -1), *target[:-1]] if scan.causal else target)


def build(name: str, height: int, width: int, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = models.build(name, height=height, width=width, vocab=5, dim=16, depth=2, heads=2, **settings).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def test_the_catalogue_is_registered() -> None:
    suffixes = ("-sin1d", "-rope1d", "-alibi1d", "-sin2d", "-rope2d", "-mixed2d", "-relbias2d", "-alibi2d")
    assert {"dense-none", "dense1d", "dense2d", *(f"dense{s}" for s in suffixes)} == set(DENSE)
    assert all(DENSE[f"dense{s}"].position == s[1:] for s in suffixes)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("order", ORDERS)
def test_decoding_equals_the_full_pass_on_every_scan(name: str, order: str) -> None:
    model = build(name, 3, 5, scan=order)
    tokens = torch.randint(5, (2, 3, 5))
    with torch.no_grad():
        full = model(tokens).flatten(1, 2)[:, model.order]
        state, pixel = model.start(2), None
        for slot, place in enumerate(model.order):
            logits, state = model.step(pixel, state)
            assert_close(logits, full[:, slot], rtol=1e-10, atol=1e-10)
            pixel = tokens.flatten(1)[:, place]


@pytest.mark.parametrize("name", [name for name in DENSE if name != "dense-none"])
def test_a_position_is_felt(name: str) -> None:
    """With the pixels of the past exchanged, the last logits change; without a position they do not."""
    tokens = torch.arange(15).view(1, 3, 5) % 5
    swapped = tokens.clone()
    swapped[0, 0, 0], swapped[0, 1, 1] = tokens[0, 1, 1], tokens[0, 0, 0]
    assert tokens[0, 0, 0] != tokens[0, 1, 1]
    last = {}
    for variant in (name, "dense-none"):
        # One layer: with two, causality itself tells places apart.
        model = models.build(variant, height=3, width=5, vocab=5, dim=16, depth=1, heads=2).double()
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)  # more, and softmax looks at one pixel only
            last[variant] = float((model(tokens)[0, 2, 4] - model(swapped)[0, 2, 4]).abs().max())
    assert last["dense-none"] < 1e-12 < 1e-6 < last[name]


@pytest.mark.parametrize("order", ["raster", "hilbert"])
@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("name", ROTARY)
def test_a_rotary_score_is_the_formula_at_true_coordinates(name: str, objective: str, order: str) -> None:
    """q·k after turning = Σ over pairs of |q||k| cos(angle between them + frequency · offset)."""
    made = make(name, objective=objective, order=order)
    scan, pairs = made.shape.scan, made.shape.head_dim // 2
    q, k = torch.randn(2, 1, 2, 15, 2 * pairs, dtype=torch.float64)
    turned_q, turned_k = made.rotate(q, k, torch.arange(15), layer=1)
    targets, contents = coordinates(scan)
    frequency = made.frequencies(1).expand(-1, 2, -1)
    for i, j in [(0, 0), (3, 1), (14, 0), (9, 9), (13, 5)]:
        if name == "rope1d":
            offset = torch.tensor([i - (j - 1 if scan.causal else j)])
        else:
            offset = torch.tensor(targets[i]) - torch.tensor(contents[j])
        angle = torch.einsum("c,chp->hp", offset.double(), frequency)
        as_complex = [torch.complex(x[0, :, :pairs], x[0, :, pairs:]) for x in (q[:, :, i], k[:, :, j])]
        want = (as_complex[0] * torch.polar(torch.ones_like(angle), angle) * as_complex[1].conj()).real.sum(-1)
        assert_close((turned_q[0, :, i] * turned_k[0, :, j]).sum(-1), want, rtol=1e-6, atol=1e-6)


def test_rope2d_gives_each_axis_its_half() -> None:
    frequency = make("rope2d").frequencies(0)[:, 0]
    assert frequency[0].count_nonzero() == frequency[1].count_nonzero() == 2
    assert not (frequency[0] * frequency[1]).any()


def test_mixed2d_starts_with_directions_that_differ_by_head() -> None:
    model = models.build("dense-mixed2d", height=3, width=5, vocab=5, dim=32, depth=1, heads=4)
    row, col = model.position.frequency[0].detach().double()  # type: ignore[union-attr, index]
    assert_close(torch.hypot(row, col)[0], torch.tensor([1, 1, 10**-0.5, 10**-0.5], dtype=torch.float64))
    assert len({round(float(a), 4) for a in torch.atan2(row[:, 0], col[:, 0])}) == 4
    assert_close(row[:, 0] * row[:, 1] + col[:, 0] * col[:, 1], torch.zeros(4, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("order", ["raster", "snake", "random"])
@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("name", ["alibi1d", "alibi2d", "relbias2d"])
def test_a_bias_is_the_formula_at_true_coordinates(name: str, objective: str, order: str) -> None:
    made = make(name, objective=objective, order=order)
    targets, contents = coordinates(made.shape.scan)
    slot = torch.arange(15)
    bias = made.bias(1)(slot[:, None], slot[None, :])
    assert bias.shape == (2, 15, 15)
    causal = objective == "ar"
    for head in range(2):
        slope = 2 ** (-8 * (head + 1) / 2)
        for i, (row, col) in enumerate(targets):
            for j, (key_row, key_col) in enumerate(contents):
                if causal and j > i:
                    continue
                if name == "alibi1d":
                    want = -slope * abs(i - (j - causal))
                elif name == "alibi2d":
                    want = -slope * (abs(row - key_row) + abs(col - key_col))
                elif causal and j == 0:
                    want = float(made.start[1, head])
                else:
                    down = row - key_row + (0 if causal and order != "random" else 2)
                    want = float(made.table[1, head, down, col - key_col + 4])
                assert math.isclose(float(bias[head, i, j]), want, abs_tol=1e-12), (head, i, j)


def test_relbias2d_makes_no_entry_that_a_raster_never_asks_for() -> None:
    assert make("relbias2d").table.shape == (2, 2, 3, 9)
    assert make("relbias2d", order="hilbert").table.shape == (2, 2, 5, 9)
    assert make("relbias2d", objective="bert").table.shape == (2, 2, 5, 9)


def test_sinusoids_are_their_formula() -> None:
    one, two = make("sin1d"), make("sin2d")
    slots = torch.arange(15)
    assert_close(one.embed(slots)[7, 3] / one.scale[0], torch.tensor(math.sin(7 / 10_000 ** (3 / 8))).double())
    assert_close(one.embed(slots)[7, 8 + 3] / one.scale[0], torch.tensor(math.cos(7 / 10_000 ** (3 / 8))).double())
    row, col = 1, 2  # of slot 7 in a grid of width 5
    assert_close(two.embed(slots)[7, 1] / two.scale[0], torch.tensor(math.sin(row / 10_000 ** (1 / 4))).double())
    assert_close(two.embed(slots)[7, 8 + 1] / two.scale[0], torch.tensor(math.sin(col / 10_000 ** (1 / 4))).double())
    fresh = models.build("dense-sin1d", height=8, width=8, vocab=5)
    assert_close(fresh.position.embed(torch.arange(64)).square().mean().sqrt(), torch.tensor(0.01))  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("name", ANY_SIDE)
@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_what_was_trained_at_one_side_runs_at_another_and_means_the_same(name: str, objective: str) -> None:
    """Pixels at the same coordinates (1D: places) get the same treatment in the larger grid."""
    small, large = make(name, 3, 5, objective), make(name, 6, 7, objective)
    large.load_state_dict(small.state_dict())
    assert dict(large.named_parameters()).keys() == dict(small.named_parameters()).keys()
    flat = name.endswith("1d")
    here = torch.arange(15)
    there = here if flat else (here // 5) * 7 + here % 5
    if small.needs == "rotate":
        x = torch.randn(1, 2, 15, 8, dtype=torch.float64)
        turned = [made.rotate(x, x, slots, 1)[0] for made, slots in ((small, here), (large, there))]
    elif small.needs == "bias":
        # Queries in row 2, keys whose content is in row 1: the same pixels in both grids.
        query, key = here[10:15, None], here[None, 5:10] + (objective == "ar")
        shift = 0 if flat else 2
        turned = [small.bias(1)(query, key), large.bias(1)(query + 2 * shift, key + shift)]
    else:
        turned = [made.embed(slots) for made, slots in ((small, here), (large, there))]
    assert_close(turned[0], turned[1])


def test_a_relative_bias_beyond_the_trained_offsets_takes_the_farthest() -> None:
    small, large = make("relbias2d", 3, 5), make("relbias2d", 9, 12)
    large.load_state_dict(small.state_dict())
    bias = large.bias(0)(torch.tensor(8 * 12 + 11), torch.tensor([1]))  # (8, 11) looks at (0, 0)
    assert_close(bias[:, 0], small.table[0, :, 2, 8])
    with pytest.raises(RuntimeError, match="size mismatch"):
        Position.load_state_dict(large, {"table": torch.zeros(1, 2, 3, 9), "start": small.start})


@pytest.mark.parametrize(
    ("name", "dim", "heads"),
    [("rope1d", 6, 2), ("rope2d", 12, 2), ("mixed2d", 10, 2), ("sin1d", 7, 1), ("sin2d", 6, 1)],
)
def test_a_width_that_cannot_be_split_is_refused_with_the_reason(name: str, dim: int, heads: int) -> None:
    with pytest.raises(ValueError, match=f"{name}.*equal parts.*change dim or heads"):
        models.build("dense-none", height=2, width=2, vocab=3, dim=dim, heads=heads, position=name)


def layer(height: int, width: int, objective: str = "ar", **settings: Any) -> Layer:
    return Layer(Scan(Grid(height, width), objective), heads=2, head_dim=8, **settings)


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("name", [None, "alibi2d", "relbias2d"])
@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
def test_dense_over_several_blocks_equals_the_oracle(backend: str, name: str | None, objective: str) -> None:
    """Forward, and the gradients of q, k, v and of the bias's own table."""
    height, width = 13, 11
    assert height * width > BLOCK
    mixer = Dense(layer(height, width, objective, backend=backend))
    made = make(name, height, width, objective, learning=True) if name else None
    leaves = [torch.randn(2, 2, height * width, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    wanted = leaves + (list(made.parameters()) if made else [])
    upstream = torch.randn_like(leaves[0])
    results = []
    for attend in (mixer, mixer.oracle):
        out = attend(leaves[0], leaves[1], leaves[2], made.bias(1) if made else None)
        results.append([out, *torch.autograd.grad(out, wanted, upstream)])
    assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)
    assert_close(results[0][1:], results[1][1:], rtol=1e-10, atol=1e-10)
    shifted = mixer.oracle(
        leaves[0], leaves[1], leaves[2], lambda query, key: (query - key).double() * torch.ones(2, 1, 1)
    )
    assert not torch.allclose(results[0][0], shifted)


class Largest(TorchDispatchMode):
    """Remembers the most elements that any operation gave."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("name", ["alibi1d", "relbias2d"])
def test_a_bias_on_blocked_dense_never_lays_out_the_square(name: str) -> None:
    """Neither forward nor backward, nor kept in between; "sdpa" does keep it, so the test can tell."""
    n = 3 * BLOCK
    made = make(name, 3, BLOCK, learning=True)
    leaves = [torch.randn(1, 2, n, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    largest, kept = {}, {}
    for backend in ("blocked", "sdpa"):
        mixer = Dense(layer(3, BLOCK, backend=backend, biased=True))
        storages: dict[int, int] = {}

        def pack(x: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.numel()
            return x

        with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            mixer(*leaves, made.bias(0)).square().sum().backward()
        largest[backend], kept[backend] = seen.numel, sum(storages.values())
    assert largest["blocked"] <= 2 * BLOCK * n < 2 * n * n <= largest["sdpa"]
    assert kept["blocked"] < n * n <= kept["sdpa"]


def test_auto_takes_blocked_where_no_kernel_adds_the_bias() -> None:
    backends = {name: build(name, 3, 5).backend for name in DENSE}
    biased = {"dense-alibi1d", "dense-relbias2d", "dense-alibi2d"}
    assert {backends[name] for name in biased} == {"blocked" if kernels.missing("full") else "compiled"}
    assert "blocked" not in {backend for name, backend in backends.items() if name not in biased}
    half = build("dense-relbias2d", 3, 5).bfloat16()
    half(torch.zeros(1, 3, 5, dtype=torch.long))
    assert half.backend == "blocked"


@pytest.mark.parametrize("name", ["sin1d", "sin2d", "alibi2d", "relbias2d", "rope2d", "mixed2d"])
def test_any_exact_attention_carries_any_position(name: str) -> None:
    model = build("local2d", 3, 5, position=name, radius=1)
    reference = build("local2d", 3, 5, position=name, radius=1, backend="math")
    tokens = torch.randint(5, (2, 3, 5))
    assert_close(model(tokens), reference(tokens), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "need"), [("rope1d", "rotate"), ("alibi2d", "bias")])
def test_a_pair_that_cannot_be_is_refused_with_the_reason(name: str, need: str) -> None:
    with pytest.raises(ValueError, match=f"linear cannot carry position '{name}', which needs '{need}'"):
        models.build("linear", height=3, width=5, vocab=2, position=name)
