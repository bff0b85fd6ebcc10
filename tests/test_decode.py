"""Decoding by kernel against the oracle, layer by layer, and where it must give way to the trunk's own steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.testing import assert_close

from models import build, kernels, reference
from models.igpt import Norm
from models.kernels import compiler
from models.mixer import Kept

needs_compiler = pytest.mark.skipif(kernels.missing("decode") is not None, reason=str(kernels.missing("decode")))
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
TOKENS = torch.arange(20) % 4


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pairs of channels as complex numbers."""
    first, second = x.chunk(2, dim=-1)
    whole = torch.complex(first, second) * torch.complex(cos, sin)[:, None]
    return torch.cat([whole.real, whole.imag], dim=-1)


class Weights:
    """A trunk's layers and head with biases and gates of a width of their own, and what they are by definition."""

    def __init__(self, depth: int, dim: int, wide: int, vocab: int, dtype: torch.dtype, bias: bool = True) -> None:
        torch.manual_seed(0)

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, dtype=dtype)

        def norm() -> Norm:
            made = Norm(dim, eps=0.1).to(dtype)
            nn.init.normal_(made.gain)
            return made

        self.blocks: list[Any] = [
            (
                norm(),
                linear(dim, 3 * dim),
                linear(dim, 5),
                linear(dim, dim),
                norm(),
                linear(dim, wide),
                linear(wide, dim),
            )
            for _ in range(depth)
        ]
        self.head = norm(), linear(dim, vocab)

    def finish(self, layer: int, x: Tensor, mixed: Tensor) -> Tensor:
        *_, out, norm, up, down = self.blocks[layer]
        x = x + out(mixed)
        inside = up(norm(x))
        return x + down(inside * torch.sigmoid(1.702 * inside))

    def attend(self, layer: int, x: Tensor, kept: Kept, heads: int) -> Tensor:
        norm, qkv = self.blocks[layer][:2]
        q, k, v = rearrange(qkv(norm(x)), "b n (t h d) -> t b h n d", t=3, h=heads)
        if kept.turns is not None:
            (cos_q, cos_k), (sin_q, sin_k) = kept.turns.unflatten(0, (2, 2))
            q, k = turned(q, cos_q, sin_q), turned(k, cos_k, sin_k)
        all_k, all_v = kept.k.clone(), kept.v.clone()
        all_k[:, :, kept.place], all_v[:, :, kept.place] = k[:, :, 0], v[:, :, 0]
        places = torch.arange(len(kept.keys)) if kept.places is None else kept.places
        mask = torch.ones(1, len(places), dtype=torch.bool)
        scores = None if kept.scores is None else kept.scores[:, None]
        mixed = reference.softmax_attention(q, all_k[:, :, places], all_v[:, :, places], mask, scores)
        return self.finish(layer, x, rearrange(mixed, "b h n d -> b n (h d)"))


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("batch", "heads", "head_dim", "room", "wide"),
    [
        (1, 1, 1, 1, 1),
        (2, 3, 5, 37, 7),
        (8, 4, 32, 64, 512),
        (16, 4, 32, 50, 512),
        (3, 2, 20, 5, 160),
        (37, 2, 17, 9, 70),
    ],
)
def test_layers_and_logits_equal_the_oracle(
    batch: int, heads: int, head_dim: int, room: int, wide: int, dtype: torch.dtype, bias: bool
) -> None:
    """A layer that sees all keys, then one that sees some in any order, biased and, if it can be, turned."""
    dim, vocab = heads * head_dim, 19
    weights = Weights(2, dim, wide, vocab, dtype, bias)
    stack, x = kernels.Stack(weights.blocks, weights.head, heads), torch.randn(batch, 1, dim, dtype=dtype)
    true, told = x, []
    for layer, places in enumerate((None, torch.randperm(room)[: room // 2 + 1])):
        k, v = (3 * torch.randn(batch, room, heads, head_dim, dtype=dtype).transpose(1, 2) for _ in range(2))
        seen = torch.arange(room if places is None else len(places))
        kept = Kept(k, v, room - 1 if places is None else int(places[-1]), seen, places)
        if places is not None:
            turns = torch.randn(4, heads, head_dim // 2, dtype=dtype) if head_dim % 2 == 0 else None
            kept = kept._replace(scores=torch.randn(heads, len(seen), dtype=dtype), turns=turns)
        true = weights.attend(layer, true, kept, heads)
        told.append(kept)
    stack.keep(told)
    norm, head = weights.head
    tolerance = TOLERANCES[dtype]
    assert_close(stack.run(x, None, 0, 2)[1], head(norm(true)), rtol=tolerance, atol=10 * tolerance)


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [1, 19])
def test_it_stops_where_a_mixer_must_be_asked_and_goes_on_from_there(batch: int, dtype: torch.dtype) -> None:
    weights, tolerance = Weights(2, 24, 50, 9, dtype), TOLERANCES[dtype]
    stack, x = kernels.Stack(weights.blocks, weights.head, heads=2), torch.randn(batch, 1, 24, dtype=dtype)
    mixed, stream, before = None, x, x
    for layer, (norm, qkv, gates, *_) in enumerate(weights.blocks):
        stream, projected = stack.run(stream, mixed, layer, layer)
        true = before if mixed is None else weights.finish(layer - 1, before, mixed)
        assert_close(stream, true, rtol=tolerance, atol=tolerance)
        assert_close(projected, torch.cat([qkv(norm(true)), gates(norm(true))], dim=2), rtol=tolerance, atol=tolerance)
        mixed, before = torch.randn_like(x), true
    norm, head = weights.head
    assert mixed is not None
    logits = stack.run(stream, mixed, 2, 2)[1]
    assert_close(logits, head(norm(weights.finish(1, before, mixed))), rtol=tolerance, atol=10 * tolerance)


@needs_compiler
@torch.no_grad()
def test_an_activation_beyond_any_exponent_is_no_nan() -> None:
    weights = Weights(1, 2, 3, 4, torch.float32)
    weights.blocks[0][4].gain.fill_(3e38)
    stack = kernels.Stack(weights.blocks, weights.head, heads=1)
    stream = stack.run(torch.ones(1, 1, 2), torch.ones(1, 1, 2), 1, 1)[1]
    up = weights.blocks[0][5](F.rms_norm(torch.ones(1, 2), (2,)) * 3e38)
    assert up.isinf().any() or up.abs().max() > 1e37
    assert not stream.isnan().any()


@torch.no_grad()
def stepped(model: Any, batch: int, change: Callable[[int], object] = lambda slot: None) -> Tensor:
    """The logits of every slot, `change` being called before each."""
    state, pixel, rows = model.start(batch), None, []
    for slot in range(model.scan.grid.size):
        change(slot)
        logits, state = model.step(pixel, state)
        rows.append(logits)
        pixel = TOKENS[slot].expand(batch)
    return torch.stack(rows, dim=1)


def small(name: str = "local2d", **settings: Any) -> Any:
    torch.manual_seed(0)
    shape = {"height": 4, "width": 5, "vocab": 4, "dim": 24, "heads": 2, "depth": 3}
    model: Any = build(name, **shape | settings).double()
    nn.init.normal_(model.head.weight)
    return model


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    model, before, results = small(dim=192, height=2, width=2).to(dtype), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([stepped(model, batch) for batch in (5, 37)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernel's functions as they are asked for."""
    asked: list[str] = []
    right = compiler.entry

    def entry(name: str, function: str, dtype: torch.dtype) -> Callable[..., int]:
        asked.append(function)
        return right(name, function, dtype)

    monkeypatch.setattr(kernels.decode, "entry", entry)
    return asked


@needs_compiler
@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        ("local2d", {}, 1),
        ("axial", {}, 1),
        ("dense1d", {}, 1),
        ("linear", {}, 4),
        ("gla", {}, 4),
        ("hybrid-linear", {"depth": 4}, 4),
        ("dense-relbias2d", {}, 1),
        ("dense-mixed2d", {}, 1),
    ],
)
def test_a_step_is_one_call_and_one_more_for_each_mixer_that_is_asked(
    name: str, settings: dict[str, Any], count: int, calls: list[str]
) -> None:
    model = small(name, **settings)
    with torch.no_grad():
        model.step(None, model.start(3))
    assert len(calls) == count


@needs_compiler
def test_decoding_takes_the_kernel_only_where_it_serves(calls: list[str]) -> None:
    model = small()
    model.step(None, model.start(3))  # with gradients
    with torch.no_grad():
        model.bfloat16().step(None, model.start(3))
        model.float().blocks[0].attention.out.bias = nn.Parameter(torch.ones(24, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="dtype"):
            model.step(None, model.start(3))
        assert not calls
        model.float().step(None, model.start(3))
    assert len(calls) == 1


@needs_compiler
@pytest.mark.parametrize("name", ["local2d", "linear"])
def test_weights_that_change_between_steps_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place, moved, or another's; as the trunk's own steps notice them."""

    def changed() -> Tensor:
        model = small(name)

        @torch.no_grad()
        def change(slot: int) -> None:
            up = model.blocks[1].mlp.up
            if slot == 3:
                up.weight.mul_(2.0)
            elif slot == 6:
                up.weight.data = up.weight.data + 0.1
            elif slot == 9:
                up.weight = nn.Parameter(up.weight * 0.7)
            elif slot == 12:
                up.bias = nn.Parameter(torch.ones(96, dtype=torch.float64))

        return stepped(model, 2, change)

    fast = changed()
    monkeypatch.setattr(kernels, "decodes", lambda x: False)
    assert_close(fast, changed(), rtol=1e-12, atol=1e-12)


@needs_compiler
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_pruned_and_parametrized_weights_are_the_trunk_s_own_to_read(
    part: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    up, gain = model.blocks[1].mlp.up, model.blocks[0].attention_norm
    up.bias = nn.Parameter(torch.randn(96, dtype=torch.float64))
    if part == "weight":
        parametrize.register_parametrization(gain, "gain", nn.Softplus())
    prune.random_unstructured(up, part, 0.5)
    made = stepped(model, 2)
    assert not calls
    monkeypatch.setattr(kernels, "decodes", lambda x: False)
    assert torch.equal(made, stepped(model, 2))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_keys_whose_biases_are_far_below_are_attended_to(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fills up the last vector of keys must not be the greatest score, or all others vanish."""
    model = small("dense-relbias2d").to(dtype)
    for table in (model.position.table, model.position.start):
        nn.init.normal_(table, -2000.0)
    fast = stepped(model, 2)
    monkeypatch.setattr(kernels, "decodes", lambda x: False)
    assert_close(fast, stepped(model, 2), rtol=0, atol=1e3 * TOLERANCES[dtype])


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("name", ["local2d", "linear"])
def test_what_a_mixer_makes_in_another_dtype_is_refused(name: str) -> None:
    model = small(name)
    for mixer in model.mixers:
        step = mixer.step
        mixer.keep = lambda state: None
        mixer.step = lambda *given, step=step, **extras: (step(*given, **extras)[0].float(), None)
    with pytest.raises(ValueError, match=r"made \(3, 1, 24\) in torch.float32 where \(3, 1, 24\) in torch.float64"):
        model.step(None, model.start(3))


@needs_compiler
@pytest.mark.parametrize("name", ["local2d", "linear"])
def test_no_images_have_no_logits(name: str) -> None:
    assert stepped(small(name), 0).shape == (0, 20, 4)


@needs_compiler
@torch.no_grad()
def test_a_state_is_of_one_dtype_and_one_batch() -> None:
    model = small()
    state = model.start(3)
    model.step(None, state)
    with pytest.raises(ValueError, match="2 pixels for the 3 images"):
        model.step(TOKENS[:2], state)
    with pytest.raises(ValueError, match=r"float64 cannot go on in torch\.float32"):
        model.float().step(TOKENS[:3], state)
