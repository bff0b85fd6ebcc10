"""The compiled kernels against the oracles, at odd shapes and layouts, and as a backend."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from models import geometry, kernels, reference
from models.geometry import Grid, Scan
from models.kernels import compiler
from tests.oracles import (
    TOLERANCES,
    Attend,
    assert_same,
    biased_window,
    divided,
    faded,
    fading,
    forgetting,
    forgotten,
    inputs,
    local,
    needs_compiler,
    recurrent,
    rewriting,
    rewritten,
    scanned,
    square,
    started,
    whole,
    window,
)

FEW_AND_MANY = [1, 16]
"""Batches of one head of which local2d takes columns for lanes, and images."""
GRIDS = [(1, 1), (1, 7), (7, 1), (3, 5), (5, 3), (11, 13), (2, 37), (19, 17)]


@pytest.mark.parametrize("name", sorted(source.stem for source in compiler.HERE.glob("*.cpp")))
def test_every_kernel_is_had_where_a_compiler_is(name: str) -> None:
    """Else a slip in one of them would skip all of their tests."""
    reason = kernels.missing(name)
    assert reason is None or reason.startswith(("no C++ compiler", "the kernels are not built")), reason


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("radius", [1, 3, 20])
@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_local2d_equals_its_oracle(height: int, width: int, radius: int, dtype: torch.dtype) -> None:
    """Columns are the lanes for 1 and 5 images, images for 6, with empty lanes, and for 16."""
    for images, heads, dim in ((1, 1, 1), (5, 5, 5), (5, 1, 16), (5, 5, 24), (6, 3, 5), (16, 8, 3), (16, 8, 24)):
        given = inputs(images // heads, heads, height * width, dim, dtype)
        assert_same(local(height, width, radius), window(height, width, radius), *given)


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("radius", [1, 3, 20])
@pytest.mark.parametrize(("height", "width"), [*GRIDS, (67, 9)])
@pytest.mark.parametrize(("batch", "heads"), [(1, 5), (2, 3), (5, 3)])
def test_local2d_with_a_bias_by_offset_equals_its_oracle(
    batch: int, heads: int, height: int, width: int, radius: int, dtype: torch.dtype
) -> None:
    q, k, v = inputs(batch, heads, height * width, 5, dtype)
    table = torch.randn(heads, len(kernels.offsets(height, width, radius)[0]), dtype=dtype, requires_grad=True)
    fast = kernels.local2d(q, k, v, height, width, radius, table)
    slow = biased_window(table, height, width, radius)(q, k, v)
    forward, backward = TOLERANCES[dtype]
    assert_close(fast, slow, rtol=forward, atol=forward)
    upstream = torch.randn_like(slow)
    for got, want in zip(*(torch.autograd.grad(x, (q, k, v, table), upstream) for x in (fast, slow)), strict=True):
        assert_close(got, want, rtol=backward, atol=backward)


@needs_compiler
@pytest.mark.parametrize("batch", FEW_AND_MANY)
def test_a_bias_by_offset_on_the_wrong_side_is_noticed(batch: int) -> None:
    q, k, v = inputs(batch, 1, 35, 5)
    table = torch.randn(1, len(kernels.offsets(5, 7, 2)[0]), dtype=torch.float64)
    flipped = torch.cat([table[:, :1], table[:, 1:].flip(1)], dim=1)
    with pytest.raises(AssertionError):
        assert_close(kernels.local2d(q, k, v, 5, 7, 2, flipped), biased_window(table, 5, 7, 2)(q, k, v))


@needs_compiler
@pytest.mark.parametrize("images", [1, 8, 16])
def test_local2d_in_bands_of_rows_equals_its_oracle(images: int) -> None:
    assert_same(local(67, 9, 2), window(67, 9, 2), *inputs(images, 1, 67 * 9, 8))


@needs_compiler
@pytest.mark.parametrize("batch", FEW_AND_MANY)
@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shifted_mask_is_noticed(shift: int, batch: int) -> None:
    with pytest.raises(AssertionError, match="not close"):
        assert_same(local(3, 5, 1), window(3, 5, 1, shift), *inputs(batch, 1, 15, 4))


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("seq", [1, 2, 15, 63, 127, 128, 129, 300])
def test_linear_equals_its_oracle(seq: int, dtype: torch.dtype) -> None:
    for dim in (1, 5, 16, 39):
        assert_same(scanned, recurrent, *inputs(2, 3, seq, dim, dtype))


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("later", "started"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_decay2d_equals_its_oracle(height: int, width: int, later: bool, started: bool, dtype: torch.dtype) -> None:
    for dim in (1, 5, 8, 16, 39):
        given = inputs(2, 3, height * width, dim, dtype)
        assert_same(fading(height, width, later, started), faded(height, width, later, started), *given)


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("seq", [1, 2, 15, 127, 128, 129, 300])
def test_decayed_equals_its_oracle(seq: int, dtype: torch.dtype) -> None:
    for dim in (1, 5, 8, 16, 39):
        assert_same(forgetting, forgotten, *inputs(2, 3, seq, dim, dtype))


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("seq", [1, 2, 15, 129])
def test_the_delta_rule_of_two_kernels_equals_its_oracle(seq: int, dtype: torch.dtype) -> None:
    for dim in (1, 5, 8, 16, 39):
        assert_same(rewriting, rewritten, *inputs(2, 3, seq, dim, dtype))


@needs_compiler
@pytest.mark.parametrize("shift", [-1, 1])
def test_what_fades_a_slot_too_early_or_too_late_is_read_wrongly(shift: int) -> None:
    with pytest.raises(AssertionError, match="not close"):
        assert_same(rewriting, partial(rewritten, shift=shift), *inputs(1, 1, 15, 4))


@needs_compiler
@pytest.mark.parametrize(
    "shape", [(2, 3, 130, 1), (1, 3, 1, 1), (1, 3, 1, 6), (2, 3, 130, 6)], ids=["slot", "head", "channel", "both"]
)
def test_decayed_takes_a_decay_for_each_slot_and_channel_or_one_for_all(shape: tuple[int, ...]) -> None:
    q, k, v = (x.detach() for x in inputs(2, 3, 130, 6))
    v = v[..., :5]
    log_decay = (-torch.rand(shape, dtype=torch.float64)).requires_grad_()
    fast = kernels.decayed(q, k, v, log_decay)
    slow = reference.decayed_attention(q, k, v, log_decay.expand(2, -1, 130, -1).expand(2, 3, 130, 6))
    assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(slow)
    got, want = (torch.autograd.grad(x, log_decay, upstream)[0] for x in (fast, slow))
    assert_close(got, want, rtol=1e-10, atol=1e-10)


@needs_compiler
@pytest.mark.parametrize("shift", [-1, 1])
def test_a_decay_that_acts_a_slot_too_early_or_too_late_is_noticed(shift: int) -> None:
    q, k, v = (x.detach() for x in inputs(1, 1, 15, 4))
    log_decay = -torch.rand(1, 1, 15, 4, dtype=torch.float64)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(
            kernels.decayed(q, k, v, log_decay), reference.decayed_attention(q, k, v, log_decay.roll(shift, 2))
        )


@needs_compiler
@pytest.mark.parametrize("mistake", [{"swapped": True}, {"later": True}, {"shift": -1}, {"shift": 1}], ids=str)
def test_decay2d_with_its_axes_swapped_on_the_wrong_side_or_a_slot_off_is_noticed(mistake: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="not close"):
        assert_same(fading(3, 5, started=True), faded(3, 5, started=True, **mistake), *inputs(1, 1, 15, 4))


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("seq", [1, 2, 15, 16, 17, 40])
def test_a_head_by_its_root_mean_square_equals_its_definition(seq: int, dtype: torch.dtype) -> None:
    forward, backward = TOLERANCES[dtype]
    for dim in (1, 5, 8, 16, 39):
        x = inputs(2, 3, seq, dim, dtype)[0]
        got, want = kernels.unit(x, 1e-3), reference.unit_mean_square(x, 1e-3)
        assert_close(got, want, rtol=forward, atol=forward)
        upstream = torch.randn_like(want)
        ours, theirs = (torch.autograd.grad(y, x, upstream)[0] for y in (got, want))
        assert_close(ours, theirs, rtol=backward, atol=backward)


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seq", [1, 2, 15, 17, 63, 64, 65, 131])
def test_full_equals_its_oracle(seq: int, causal: bool, dtype: torch.dtype) -> None:
    for dim in (1, 5, 16, 39):
        assert_same(lambda q, k, v: kernels.full(q, k, v, causal), square(seq, causal), *inputs(2, 3, seq, dim, dtype))


def by_offset(table: Tensor, scan: Scan, mirrored: bool = False) -> Attend:
    """The oracle of full with a bias: table (heads, 2·height - 1, 2·width - 1) by (Δrow, Δcol), its first row the start
    token's too, by the query's column; or, wrongly, mirrored from left to right."""
    height, width = scan.grid.height, scan.grid.width
    slot = torch.arange(scan.grid.size)
    (row, col), (key_row, key_col) = scan.target(slot), scan.content(slot)
    right = (col[:, None] - key_col) * (-1 if mirrored else 1)
    scores = table[:, row[:, None] - key_row + height - 1, (right + width - 1).clamp(max=2 * width - 2)]
    scores = torch.where(scan.is_start(slot), table[:, 0, col, None], scores)
    seen = geometry.matrix(geometry.everything(scan), scan.grid.size)
    return lambda q, k, v: reference.softmax_attention(q, k, v, seen, scores)


def biased(table: Tensor, scan: Scan) -> Attend:
    """The kernel with the same table."""
    query, _, target, content = geometry.offsets(scan)
    to_start = scan.target(query[table[0].numel() :])[1]
    bias = torch.cat([table.flatten(1), table[:, 0, to_start]], dim=1)
    return lambda q, k, v: kernels.full(q, k, v, scan.causal, bias, target, content)


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("order", ["raster", "hilbert", "random"])
@pytest.mark.parametrize(("height", "width"), [*GRIDS, (4, 33)])
def test_full_with_a_bias_by_offset_equals_its_oracle(
    height: int, width: int, order: str, objective: str, dtype: torch.dtype
) -> None:
    scan = Scan(Grid(height, width), objective, order)
    given = inputs(2, 3, height * width, 5, dtype)
    table = torch.randn(3, 2 * height - 1, 2 * width - 1, dtype=dtype, requires_grad=True)
    forward, backward = TOLERANCES[dtype]
    fast, slow = biased(table, scan)(*given), by_offset(table, scan)(*given)
    assert_close(fast, slow, rtol=forward, atol=forward)
    upstream = torch.randn_like(slow)
    for got, want in zip(*(torch.autograd.grad(x, (*given, table), upstream) for x in (fast, slow)), strict=True):
        assert_close(got, want, rtol=backward, atol=backward)


@needs_compiler
def test_full_notices_a_mirrored_bias_and_bears_a_great_one() -> None:
    scan, table = Scan(Grid(5, 7)), torch.randn(1, 9, 13, dtype=torch.float64)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(biased(table, scan), by_offset(table, scan, mirrored=True), *inputs(1, 1, 35, 5))
    assert_same(biased(table * 1e4, scan), by_offset(table * 1e4, scan), *inputs(1, 1, 35, 5))


@pytest.mark.parametrize("order", ["raster", "snake", "column"])
def test_offsets_are_those_of_their_pairs(order: str) -> None:
    for objective in ("ar", "bert"):
        scan = Scan(Grid(3, 5), objective, order)
        for along, numbers in ((False, 45), (True, 29)):
            query, key, target, content = geometry.offsets(scan, along)
            offset = (target[query] - content[key.clamp(max=14)])[:numbers]
            held = key[:numbers] < 15  # no slot holds the last pixel
            assert torch.equal(offset[held].long(), torch.arange(numbers)[held])
            if objective == "ar":  # every query's number for the start token is one whose pair is that query's
                assert torch.equal(query[(target - content[0]).long()], torch.arange(15))
                assert not key[(target - content[0]).long()].any()


@needs_compiler
@pytest.mark.parametrize("shift", [-1, 1])
def test_full_with_a_shifted_mask_is_noticed(shift: int) -> None:
    with pytest.raises(AssertionError, match="not close"):
        assert_same(whole, square(15, shift=shift), *inputs(1, 1, 15, 4))


@needs_compiler
def test_linear_takes_features_wider_than_values_and_keeps_to_the_floor() -> None:
    torch.manual_seed(0)
    q, k = (torch.rand(2, 2, 170, 37, dtype=torch.float64) for _ in range(2))
    q[:, :, 7] = 0  # its normaliser is 0
    v = torch.randn(2, 2, 170, 9, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def slow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.linear_attention(q, k, v, lambda x: x, True, 1e-6)

    assert_same(lambda q, k, v: kernels.linear(q, k, v, "none", 1e-6), slow, leaves[0], leaves[1], leaves[2])


@needs_compiler
def test_linear_that_forgets_the_query_s_own_slot_is_noticed() -> None:
    def late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return recurrent(q, k.roll(1, dims=2), v.roll(1, dims=2))

    with pytest.raises(AssertionError, match="not close"):
        assert_same(scanned, late, *inputs(1, 1, 15, 4))


@needs_compiler
@pytest.mark.parametrize("batch", [1, 2])  # local2d takes columns for lanes, and images
@pytest.mark.parametrize("attend", [local(3, 5, 2), scanned, whole, started, forgetting, divided])
def test_views_and_expanded_gradients_are_read_by_their_strides(attend: Attend, batch: int) -> None:
    torch.manual_seed(0)
    trunk = torch.randn(batch, 15, 3, 4, 8, dtype=torch.float64, requires_grad=True)  # as qkv lies in the trunk
    turned = torch.randn(3, batch, 4, 8, 15, dtype=torch.float64, requires_grad=True)  # head_dim is not the last
    for leaf, views in ((trunk, trunk.permute(2, 0, 3, 1, 4)), (turned, turned.mT)):
        results = []
        for q, k, v in (views.unbind(0), views.contiguous().unbind(0)):
            out = attend(q, k, v)
            results.append((out, *torch.autograd.grad(out.sum(), leaf, retain_graph=True)))
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)


@needs_compiler
@pytest.mark.parametrize("batch", [2, 16])  # local2d takes columns for lanes, and images
@pytest.mark.parametrize("attend", [local(17, 5, 2), scanned, whole, fading(17, 5), forgetting, rewriting, divided])
def test_the_number_of_threads_changes_no_bit(attend: Attend, batch: int) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            q, k, v = inputs(batch, 2, 85, 8, torch.float32)
            out = attend(q, k, v)
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_compiler
@pytest.mark.parametrize("attend", [local(3, 5, 2), scanned, whole, started, forgetting, rewriting, divided])
def test_operators_work_under_compile_and_with_fake_and_meta_tensors(attend: Attend) -> None:
    q, k, v = inputs(2, 2, 15, 4)
    for got, want in zip(
        *(torch.autograd.grad(f(q, k, v).square().sum(), (q, k, v)) for f in
          (torch.compile(attend, backend="aot_eager", fullgraph=True), attend)), strict=True,
    ):  # fmt: skip
        assert_close(got, want, rtol=1e-12, atol=1e-12)
    with FakeTensorMode():
        fakes = [torch.empty(2, 2, 15, 4, requires_grad=True) for _ in range(3)]
        out = attend(*fakes)
        out.sum().backward()
    true = attend(q, k, v)
    assert (out.shape, out.stride()) == (true.shape, true.stride())
    assert [x.grad.shape for x in fakes if x.grad is not None] == [q.shape] * 3
    assert attend(*(x.to("meta") for x in (q, k, v))).device.type == "meta"


@needs_compiler
@pytest.mark.parametrize(
    ("attend", "products"), [(scanned, 2 * 5 / 4), (forgetting, 2), (rewriting, 4), (fading(3, 5), 4)],
    ids=["linear", "decayed", "delta", "decayed2d"],
)  # fmt: skip
def test_torch_counts_products_with_states_three_times_as_many_backwards(attend: Attend, products: float) -> None:
    """Two FLOPs for each number of a state and product; linear attention's has the mass as a fifth column."""
    q, k, v = inputs(2, 3, 15, 4)
    with FlopCounterMode(display=False) as counter:
        out = attend(q, k, v)
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 2 * 3 * 15 * 4 * 4 * 2 * products
    assert counter.get_total_flops() == 4 * forward


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", FEW_AND_MANY)
@pytest.mark.parametrize("attend", [local(3, 5, 2), scanned, whole, started, forgetting, rewriting, divided])
def test_what_is_no_number_is_not_hidden(attend: Attend, batch: int, dtype: torch.dtype) -> None:
    """Of either sign: an x86's own is negative."""
    for index, sign in itertools.product(range(3), (1.0, -1.0)):
        given = [x.detach().clone().to(dtype) for x in inputs(batch, 1, 15, 4)]
        given[index][0, 0, 4] = math.copysign(math.nan, sign)
        assert attend(*given).isnan().any()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_at_the_edge_of_the_normal_numbers_are_as_good_as_none(dtype: torch.dtype) -> None:
    """Scores that fall below the first by the least exponent, and by a little more and less, in small steps."""
    least, slots = math.log(torch.finfo(dtype).tiny), 301
    falls = torch.linspace(least - 2, least + 1, slots, dtype=torch.float64)
    falls[0] = 0  # every query sees one key that counts
    q, v = torch.ones(1, 1, slots, 1), torch.arange(1.0, slots + 1)[None, None, :, None]
    out = whole(*(x.to(dtype) for x in (q, falls[None, None, :, None], v)))
    assert_close(out, torch.ones_like(out), rtol=1e-6, atol=0)


@needs_compiler
@pytest.mark.parametrize("batch", FEW_AND_MANY)
def test_great_scores_neither_overflow_nor_vanish(batch: int) -> None:
    q, k, v = (x.detach() for x in inputs(batch, 1, 15, 4))
    for fast, slow in ((local(3, 5, 2), window(3, 5, 2)), (whole, square(15))):
        assert_close(fast(q * 1e3, k * 1e3, v), slow(q * 1e3, k * 1e3, v), rtol=1e-12, atol=1e-12)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "function", "shape", "tensors"),
    [
        ("full", "full_forward", (1, 1, 1, 2**50, 1, 0), 8),
        ("linear", "linear_forward", (1, 1, 1, 1, 2**50, 0, 1), 6),
        ("decay", "decay_grid", (1, 1, 1, 2**50, 1, 1, 0, 0, 0), 5),
        ("decay", "decay_line", (1, 1, 1, 1, 2**50, 1, 0, 0, 0), 5),
        ("decay", "decay_solve", (1, 1, 1, 1, 2**50, 1, 0, 0, 0), 5),
        ("local2d", "local2d_forward", (1, 1, 1, 1, 2**50, 1), 6),
        ("local2d", "local2d_backward", (2**50, 1, 1, 1, 1, 1), 11),
    ],
)
def test_where_memory_does_not_suffice_python_goes_on(
    name: str, function: str, shape: tuple[int, ...], tensors: int
) -> None:
    with pytest.raises(MemoryError, match=function):
        compiler.call(name, function, shape, 1.0, *[torch.empty(1, 1, 1, 1)] * tensors)
