"""A block's kernels against the block in torch's own operations, at odd shapes; and where the trunk takes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from models import build, igpt, kernels
from models.kernels import block, compiler

needs_compiler = pytest.mark.skipif(bool(kernels.missing("block")), reason=str(kernels.missing("block")))
TOLERANCES = {torch.float64: (1e-12, 1e-10), torch.float32: (1e-5, 1e-4)}
SHAPES: list[tuple[int, int, int, int]] = [
    (1, 1, 1, 1),
    (2, 3, 5, 3),
    (1, 96, 16, 48),
    (3, 65, 20, 7),
    (2, 97, 33, 70),
    (4, 200, 32, 128),
]
EPS = 1e-5

Function = Callable[..., Tensor]


def inputs(batch: int, seq: int, dim: int, width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, mixed, outer, gain, up, down."""
    torch.manual_seed(0)
    rows = [torch.randn(batch, seq, dim, dtype=dtype) for _ in range(2)]
    gain = 1 + 0.1 * torch.randn(dim, dtype=dtype)
    outer, up, down = (torch.randn(*s, dtype=dtype) / s[1] ** 0.5 for s in ((dim, dim), (width, dim), (dim, width)))
    return [x.requires_grad_() for x in (*rows, outer, gain, up, down)]


def norm(x: Tensor, gain: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * gain


def finish(
    x: Tensor, mixed: Tensor, outer: Tensor, gain: Tensor, up: Tensor, down: Tensor, slope: float = 1.702
) -> Tensor:
    """The oracle; another slope of the sigmoid is wrong."""
    y = x + F.linear(mixed, outer)
    inside = F.linear(norm(y, gain), up)
    return y + F.linear(inside * torch.sigmoid(slope * inside), down)


def fused_finish(x: Tensor, mixed: Tensor, outer: Tensor, gain: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return block.finish(x, mixed, outer, gain, EPS, up, down)


def project(x: Tensor, _mixed: Tensor, _outer: Tensor, gain: Tensor, weight: Tensor, _down: Tensor) -> Tensor:
    return F.linear(norm(x, gain), weight)


def fused_project(x: Tensor, _mixed: Tensor, _outer: Tensor, gain: Tensor, weight: Tensor, _down: Tensor) -> Tensor:
    return block.project(x, gain, EPS, weight)


PAIRS = [pytest.param(fused_project, project, id="project"), pytest.param(fused_finish, finish, id="finish")]


def results(function: Function, given: list[Tensor]) -> tuple[Tensor, ...]:
    """The output and the gradients that there are."""
    out = function(*given)
    gradients = torch.autograd.grad(out.sin().sum(), given, allow_unused=True)
    return (out, *(g for g in gradients if g is not None))


def assert_same(fast: Function, slow: Function, given: list[Tensor]) -> None:
    forward, backward = TOLERANCES[given[0].dtype]
    (out, *gradients), (true, *wanted) = results(fast, given), results(slow, given)
    assert_close(out, true, rtol=forward, atol=forward)
    for got, want in zip(gradients, wanted, strict=True):
        assert_close(got, want, rtol=backward, atol=backward)


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("fast", "slow"), PAIRS)
def test_equals_its_oracle(
    fast: Function, slow: Function, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    assert_same(fast, slow, inputs(*shape, dtype=dtype))


@needs_compiler
@pytest.mark.parametrize(("fast", "slow"), PAIRS)
def test_no_rows_are_none_and_the_weights_gradients_zero(fast: Function, slow: Function) -> None:
    assert_same(fast, slow, inputs(0, 3, 5, 7))


@needs_compiler
def test_another_activation_is_noticed() -> None:
    with pytest.raises(AssertionError, match="not close"):
        assert_same(fused_finish, partial(finish, slope=1.7), inputs(2, 3, 5, 3))


@needs_compiler
@pytest.mark.parametrize(("fast", "slow"), PAIRS)
def test_views_are_read_by_their_strides(fast: Function, slow: Function) -> None:
    x, mixed, *weights = inputs(2, 30, 8, 24)
    turned = [x.detach().mT.contiguous().mT.requires_grad_() for x in (x, mixed)]
    assert_same(fast, slow, [*turned, *weights])


@needs_compiler
@pytest.mark.parametrize("function", [fused_project, fused_finish])
def test_the_number_of_threads_changes_no_bit(function: Function) -> None:
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(results(function, inputs(6, 200, 16, 64, torch.float32)))
    finally:
        torch.set_num_threads(before)
    for other in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], other, strict=True))


@needs_compiler
@pytest.mark.parametrize("function", [fused_project, fused_finish])
def test_works_under_compile_and_with_fake_tensors(function: Function) -> None:
    given = inputs(2, 30, 8, 24)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for got, want in zip(results(compiled, given), results(function, given), strict=True):
        assert_close(got, want, rtol=1e-12, atol=1e-12)
    with FakeTensorMode():
        fakes = results(function, [torch.empty(x.shape, requires_grad=True) for x in given])
    assert [(x.shape, x.stride()) for x in fakes] == [(x.shape, x.stride()) for x in results(function, given)]


@needs_compiler
def test_neither_hides_what_is_no_number_nor_makes_it() -> None:
    given = [x.detach() for x in inputs(1, 3, 4, 16)]
    for index in range(len(given)):
        spoilt = [x.clone() for x in given]
        spoilt[index].view(-1)[1] = float("nan")
        assert fused_finish(*spoilt).isnan().any()
    given[3] *= 1e150  # an activation beyond any exponent
    assert fused_finish(*given).isfinite().all()


# --- in the trunk -----------------------------------------------------------------------------------------------------


def whole(model: Any, tokens: Tensor) -> list[Tensor]:
    out = model(tokens)
    return [out, *torch.autograd.grad(out.sin().sum(), list(model.parameters()))]


@needs_compiler
@pytest.mark.parametrize("name", ["dense1d", "local2d", "ssd", "linear"])
def test_a_trunk_is_the_same_with_them_and_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name, height=3, width=5, vocab=7, dim=8, depth=2, heads=2).double()
    torch.nn.init.normal_(model.get_parameter("head.weight"))
    tokens = torch.randint(7, (5, 3, 5), generator=torch.Generator().manual_seed(0))
    taken: list[str] = []

    def call(name: str, function: str, *rest: Any) -> None:
        taken.append(function)
        compiler.call(name, function, *rest)

    monkeypatch.setattr("models.kernels.block.call", call)
    fused = whole(model, tokens)
    assert taken.count("block_finish_forward") == taken.count("block_finish_backward") == 2
    assert taken.count("block_project_forward") == taken.count("block_project_backward") == 3
    monkeypatch.setattr(block, "serves", lambda *tensors: False)
    for got, want in zip(fused, whole(model, tokens), strict=True):
        assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert len(taken) == 10


@needs_compiler
def test_torch_counts_their_products() -> None:
    model = build("local2d", height=3, width=5, vocab=7, dim=8, depth=1, heads=2)  # whose kernel it does not count
    tokens = torch.zeros(2, 3, 5, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    trunk: Any = model
    matrices = trunk.flops() - sum(mixer.flops() for mixer in trunk.mixers)
    assert counter.get_total_flops() == 3 * len(tokens) * matrices


@needs_compiler
def test_a_block_is_one_graph() -> None:
    model = build("dense1d", height=3, width=5, vocab=7, dim=8, depth=1, heads=2)
    inner, x = model.get_submodule("blocks.0"), torch.randn(2, 15, 8, requires_grad=True)
    compiled = torch.compile(inner, backend="aot_eager", fullgraph=True)
    slots = torch.arange(15)
    gradients = [torch.autograd.grad(run(x, slots).sin().sum(), x)[0] for run in (compiled, inner)]
    assert_close(gradients[0], gradients[1])


@needs_compiler
def test_what_a_mixer_makes_of_another_shape_or_dtype_is_refused() -> None:
    model: Any = build("local2d", height=3, width=5, vocab=7, dim=8, depth=1, heads=2)
    (mixer,), tokens = model.mixers, torch.zeros(2, 3, 5, dtype=torch.int64)
    changes: list[Function] = [lambda out: out.double(), lambda out: out[:, :, :7], lambda out: out[:1]]
    for change in changes:
        mixer.forward = lambda q, k, v, change=change: change(v)
        with pytest.raises(ValueError, match=r"^Local2D made .* where \(2, 15, 8\) in torch.float32 is wanted"):
            model(tokens)


@needs_compiler
def test_the_trunk_takes_them_only_where_they_serve() -> None:
    model = build("dense1d", height=3, width=5, vocab=7, dim=8, depth=1, heads=2)
    inner: Any = model.get_submodule("blocks.0")
    norms, matrices = (inner.attention_norm, inner.mlp_norm), (inner.attention.qkv, inner.mlp.up)
    x = torch.empty(4, 15, 8)
    assert igpt.fuses(x, norms, matrices)
    assert not igpt.fuses(x.double(), norms, matrices)
    assert not igpt.fuses(x.to("meta"), norms, matrices)
    assert not igpt.fuses(torch.empty(1, 1, block.MOST_CHANNELS + 1), norms, matrices)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not igpt.fuses(x, norms, matrices)
    inner.mlp.up.bias = torch.nn.Parameter(torch.ones(32))
    assert not igpt.fuses(x, norms, matrices)
