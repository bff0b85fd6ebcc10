"""What every attention must hold, as checks on one subject at a time; each raises AssertionError with what is wrong.

A model here has a token of its own for every pixel, so that the gradient of a token's embedding is the gradient of
what that pixel contains, through the whole model, whatever the model is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import models
from attnbench import variants
from attnbench.config import RunConfig
from models import Mixer, Variant
from models.backends import CUDA_ONLY
from models.geometry import matrix

SHAPES = ((1, 1), (1, 7), (5, 1), (3, 5), (7, 11), (10, 9), (13, 13))
"""Rows × columns; the later ones cross the borders of tiles and chunks."""
DRAWN_SHAPES = 200
DRAWS = 3
EXPONENT_SIDES = (32, 64)  # below, borders flatter a window and not a line


class NotApplicable(Exception):
    """The check has nothing to say about this subject; the text says why."""


@dataclass(frozen=True)
class Subject:
    """A variant with its options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def variant(self) -> Variant:
        """Its registration.  Raises Refusal as `variants.find`."""
        return variants.find(self.name)

    def build(self, height: int, width: int, **shape: Any) -> Any:
        """A small model whose parameters are all non-zero, in float64."""
        given = {"vocab": height * width, "dim": 16, "depth": 2, "heads": 2} | shape
        torch.manual_seed(0)
        model = models.build(self.name, height=height, width=width, **given, **self.options).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return model

    def needs(self, objective: str) -> None:
        """Raises NotApplicable where the variant has no such objective."""
        if objective not in self.variant.objectives:
            raise NotApplicable(f"has no objective {objective!r}")

    def needs_mixer(self) -> None:
        """Raises NotApplicable for a whole model."""
        if not variants.attends(self.name):
            raise NotApplicable("is a whole model, not an attention in the trunk")


def distinct_tokens(height: int, width: int, batch: int = 1) -> Tensor:
    """int64 (batch, height, width): every pixel has a token of its own."""
    return torch.stack([torch.randperm(height * width) for _ in range(batch)]).unflatten(1, (height, width))


def layers(model: nn.Module) -> Iterator[tuple[Mixer, dict[str, Any]]]:
    """Every mixer of a model with the extras that the trunk would give it, gates drawn at random."""
    for index, mixer in enumerate(model.mixers):  # type: ignore[arg-type]
        extras: dict[str, Any] = {}
        if (bias := model.position.bias(index)) is not None:  # type: ignore[union-attr, operator]
            extras["bias"] = bias
        if mixer.gates:
            layer = mixer.layer
            extras["gates"] = torch.randn(2, layer.heads, layer.size, mixer.gates, dtype=torch.float64)
        yield mixer, extras


def inputs(mixer: Mixer) -> list[Tensor]:
    """q, k, v float64 (2, heads, seq, head_dim)."""
    layer = mixer.layer
    return [torch.randn(2, layer.heads, layer.size, layer.head_dim, dtype=torch.float64) for _ in range(3)]


def backends(mixer: Mixer) -> list[str]:
    """What runs on a CPU in float64; what trains on CUDA only is checked there, in low precision."""
    return [name for name in mixer.backends if name not in CUDA_ONLY and not mixer.refusals(name)]


# --- the checks -------------------------------------------------------------------------------------------------------


def equals_oracle(subject: Subject) -> str:
    """Forward within 1e-12 and every gradient within 1e-10 of the oracle, in float64, on every backend."""
    subject.needs_mixer()
    seen = set()
    for objective in subject.variant.objectives:
        for height, width in SHAPES:
            model = subject.build(height, width, objective=objective, depth=4)
            for backend in {name for mixer in model.mixers for name in backends(mixer)}:
                try:
                    model = subject.build(height, width, objective=objective, depth=4, backend=backend)
                except ValueError:
                    continue  # a hybrid's other layers have no such backend
                seen.add(backend)
                for mixer, extras in layers(model):
                    _same_as_oracle(mixer, extras, f"{objective} {height}×{width} {backend} layer {mixer.layer.index}")
    return ", ".join(sorted(seen))


def _same_as_oracle(mixer: Mixer, extras: dict[str, Any], where: str) -> None:
    torch.manual_seed(1)
    leaves = inputs(mixer)
    if "gates" in extras:
        leaves.append(extras["gates"])
    leaves = [leaf.requires_grad_() for leaf in leaves]
    rest = dict(extras) | ({"gates": leaves[3]} if "gates" in extras else {})
    upstream = torch.randn_like(leaves[2])
    results = []
    for attend in (mixer, mixer.oracle):
        out = attend(*leaves[:3], **rest)
        found = torch.autograd.grad(out, leaves, upstream, allow_unused=True)
        results.append((out, [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]))
    (out, grads), (true, true_grads) = results
    assert_close(out, true, rtol=1e-12, atol=1e-12, msg=lambda text: f"{where}: forward: {_worst(text)}")
    for name, got, want in zip("qkvg", grads, true_grads, strict=False):
        assert_close(got, want, rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{where}: d{n}: {_worst(text)}")  # type: ignore[misc]


def _worst(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if "Greatest absolute" in line or "nan" in line.lower())


def low_precision(subject: Subject) -> str:
    """float32 within 1e-4 and bfloat16 within 0.1 of the float64 oracle, relative to its largest value; bf16 finite.

    On CUDA every library that can serve the layer too, in bfloat16.
    """
    subject.needs_mixer()
    worst = {
        str(dtype).removeprefix("torch."): _off_by(subject.build(7, 11), dtype, bound)
        for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.1))
    }
    for backend in CUDA_ONLY if torch.cuda.is_available() else ():
        try:
            model = subject.build(7, 11, dim=32, backend=backend)
        except ValueError:
            continue  # with its reasons in `doctor`
        worst[backend] = _off_by(model, torch.bfloat16, 0.1, "cuda")
    _finite_training(subject)
    return ", ".join(f"{name} {error:.0e}" for name, error in worst.items())


@torch.no_grad()
def _off_by(model: Any, dtype: torch.dtype, bound: float, device: str = "cpu") -> float:
    """The largest error over a model's layers, relative to the largest value of the oracle."""

    def drawn() -> Iterator[tuple[Mixer, list[Tensor], dict[str, Any]]]:
        torch.manual_seed(2)
        return ((mixer, inputs(mixer), extras) for mixer, extras in layers(model))

    truth = [mixer.oracle(*qkv, **extras) for mixer, qkv, extras in drawn()]
    model.to(device)  # a bias looks its tables up where the model is
    worst = 0.0
    for (mixer, qkv, extras), true in zip(drawn(), truth, strict=True):
        low = {name: x.to(device, dtype) if isinstance(x, Tensor) else x for name, x in extras.items()}
        out = mixer(*(x.to(device, dtype) for x in qkv), **low)
        where = f"{dtype} {mixer.backend}"
        assert torch.isfinite(out).all(), f"{where}: not finite"
        error = float((out.cpu().double() - true).abs().max() / true.abs().max().clamp(min=1.0))
        assert error < bound, f"{where}: off by {error:.1e}, allowed {bound}"
        worst = max(worst, error)
    return worst


def _finite_training(subject: Subject) -> None:
    model = subject.build(7, 11).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(distinct_tokens(7, 11)).float().logsumexp(-1).mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), (
            f"bfloat16: gradient of {name} not finite"
        )


def no_future(subject: Subject) -> str:
    """No logit depends on its own pixel or a later one: gradients exactly zero through the whole model."""
    subject.needs("ar")
    small, large = st.integers(1, 8), st.integers(1, 40)
    drawn_shapes = st.tuples(small, large) | st.tuples(large, small)
    shapes = drawn_shapes.filter(lambda s: s[0] * s[1] <= 120) | st.sampled_from(SHAPES)
    drawn = []

    @seed(0)
    @settings(max_examples=DRAWN_SHAPES, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(shapes, st.integers(0, 2**31))
    def check(shape: tuple[int, int], number: int) -> None:
        drawn.append(shape)
        _no_future(subject, *shape, number)

    check()
    return f"{len(drawn)} shapes, {len(set(drawn))} different"


def _no_future(subject: Subject, height: int, width: int, number: int) -> None:
    model = subject.build(height, width, dim=8)
    order = model.order
    tokens = distinct_tokens(height, width)
    along = tokens.flatten()[order]  # the token of each pixel along the scan
    last = number % len(order)
    logits = model(tokens).flatten(0, 2)[order]
    weights = torch.rand_like(logits[: last + 1]) + 0.5
    (grad,) = torch.autograd.grad((logits[: last + 1] * weights).sum(), _embedding(model))
    leaks = grad[along[last:]].abs().amax(1).nonzero().flatten() + last
    assert not len(leaks), f"{height}×{width}: a logit at or before pixel {last} depends on pixel {int(leaks[0])}"


def _embedding(model: nn.Module) -> Tensor:
    """The token table (vocab, dim), each row the content of one pixel."""
    table = model.tokens
    return table if isinstance(table, Tensor) else table.weight  # type: ignore[return-value]


def visible_is_declared(subject: Subject) -> str:
    """The output of a slot depends on the value of another exactly where the mask says so (gradients of one layer)."""
    subject.needs_mixer()
    pairs = 0
    for objective in subject.variant.objectives:
        for height, width in SHAPES:
            model = subject.build(height, width, objective=objective, depth=4)
            for mixer, extras in layers(model):
                allowed = _declared(mixer)
                # A feature map can be 0 for one draw of queries and keys; not for every one.
                seen = torch.stack([_seen(mixer, extras, draw) for draw in range(DRAWS)]).any(0)
                wrong = (seen != allowed).nonzero()
                assert not len(wrong), (
                    f"{objective} {height}×{width} layer {mixer.layer.index}: slot {int(wrong[0, 0])} "
                    f"{'sees' if seen[tuple(wrong[0])] else 'does not see'} slot {int(wrong[0, 1])}, against its mask"
                )
                pairs += int(allowed.sum())
    return f"{pairs} pairs"


def _declared(mixer: Mixer) -> Tensor:
    """bool (query, key): the mask of an exact mixer; of any other, all that its objective allows."""
    visible = getattr(mixer, "visible", None)
    if visible is not None:
        return matrix(visible(), mixer.layer.size)
    ones = torch.ones(mixer.layer.size, mixer.layer.size, dtype=torch.bool)
    return ones.tril() if mixer.layer.scan.causal else ones


def _seen(mixer: Mixer, extras: dict[str, Any], draw: int) -> Tensor:
    """bool (query, key): on which values the outputs depend, for one draw of queries and keys."""
    torch.manual_seed(draw)
    q, k, v = (x[:1] for x in inputs(mixer))
    rest = {name: x[:1] if isinstance(x, Tensor) else x for name, x in extras.items()}
    v = v.requires_grad_()
    out = mixer(q, k, v, **rest)
    weights = torch.randn_like(out[0, :, 0])
    rows = [
        torch.autograd.grad((out[0, :, t] * weights).sum(), v, retain_graph=True)[0][0].abs().amax((0, 2))
        for t in range(out.shape[2])
    ]
    return torch.stack(rows) > 0


def decoding_equals_full_pass(subject: Subject) -> str:
    """Pixel after pixel gives the logits of the full pass, within 1e-10 in float64."""
    subject.needs("ar")
    worst = 0.0
    for height, width in SHAPES:
        model = subject.build(height, width, depth=4)
        tokens = distinct_tokens(height, width, batch=2)
        with torch.no_grad():
            full = model(tokens).flatten(1, 2)[:, model.order]
            stepped = _step_through(model, tokens)
        error = float((stepped - full).abs().max())
        assert error < 1e-10, f"{height}×{width}: off by {error:.1e}"
        worst = max(worst, error)
    return f"within {worst:.0e}"


def _step_through(model: Any, tokens: Tensor) -> Tensor:
    """(batch, seq, vocab), along the scan."""
    state, pixel, rows = model.start(len(tokens)), None, []
    for place in model.order:
        logits, state = model.step(pixel, state)
        rows.append(logits)
        pixel = tokens.flatten(1)[:, place]
    return torch.stack(rows, dim=1)


def batch_is_independent(subject: Subject) -> str:
    """An image's logits do not depend on its neighbours in the batch, in the full pass and in decoding."""
    for objective in [o for o in models.OBJECTIVES if o in subject.variant.objectives]:
        model = subject.build(3, 5, objective=objective)
        first, others = distinct_tokens(3, 5), distinct_tokens(3, 5, batch=3)
        for run in [model] + ([partial(_step_through, model)] if objective == "ar" else []):
            with torch.no_grad():
                alone, together = run(first)[0], run(torch.cat([others[:1], first, others[1:]]))[1]
            assert_close(together, alone, rtol=1e-12, atol=1e-12)
    return "full pass and steps"


def same_weights_outside(subject: Subject) -> str:
    """For the same seed, the weights outside attention and position are those of the baseline, bit for bit."""
    subject.needs_mixer()
    shape: dict[str, Any] = {"height": 3, "width": 5, "vocab": 7, "dim": 16, "depth": 2, "heads": 2}
    torch.manual_seed(5)
    own = dict(models.build(subject.name, **shape, **subject.options).named_parameters())
    torch.manual_seed(5)
    base = models.build(RunConfig().variant, **shape)
    common = [name for name, _ in base.named_parameters() if not name.startswith("position.")]
    for name in common:
        assert name in own, f"{name} is missing"
        assert torch.equal(own[name], base.get_parameter(name)), f"{name} differs"
    return f"{len(common)} tensors"


def counts_are_true(subject: Subject) -> str:
    """Analytic FLOPs: the matrices as torch counts them, exact attention as its mask has pairs, linear as counted."""
    if subject.variant.objectives[0] not in models.OBJECTIVES:
        raise NotApplicable("is supervised")
    model = subject.build(7, 11, depth=4)
    if not variants.attends(subject.name):
        counted = _counted(lambda: model(distinct_tokens(7, 11)))
        assert abs(model.flops() / counted - 1) < 0.02, f"says {model.flops():,} FLOPs, torch counts {counted:,}"
        return f"{counted:,} FLOPs"
    inside = 0
    for mixer, extras in layers(model):
        inside += _counted(lambda m=mixer, e=extras: m(*(x[:1] for x in inputs(m)), **_first(e)))  # type: ignore[misc]
        claim = mixer.flops()
        if (visible := getattr(mixer, "visible", None)) is not None:
            true = 4 * mixer.layer.heads * mixer.layer.head_dim * int(matrix(visible(), mixer.layer.size).sum())
            assert claim == true, f"layer {mixer.layer.index} says {claim:,} FLOPs, its mask makes {true:,}"
        else:
            true = _counted(lambda m=mixer, e=extras: m(*(x[:1] for x in inputs(m)), **_first(e)))  # type: ignore[misc]
            # Triangular solves and elementwise work are not in torch's count, a custom kernel not at all.
            assert true == 0 or 0.5 < claim / true < 2.0, f"says {claim:,} FLOPs, torch counts {true:,}"
    outside = _counted(lambda: model(distinct_tokens(7, 11))) - inside
    claim = model.flops() - sum(mixer.flops() for mixer in model.mixers)
    assert claim == outside, f"says {claim:,} FLOPs outside attention, torch counts {outside:,}"
    return f"{model.flops():,} FLOPs"


def _first(extras: dict[str, Any]) -> dict[str, Any]:
    return {name: x[:1] if isinstance(x, Tensor) else x for name, x in extras.items()}


def _counted(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops()


def grows_as_declared(subject: Subject) -> str:
    """Attention FLOPs and what the backward pass keeps grow in n with the exponents that the variant declares."""
    subject.needs_mixer()
    sizes = [side * side for side in EXPONENT_SIDES]
    flops, kept = [], []
    for side in EXPONENT_SIDES:
        model = subject.build(side, side, vocab=2, dim=16, depth=4 if "hybrid" in subject.variant.family else 2).float()
        flops.append(sum(mixer.flops() for mixer in model.mixers))
        kept.append(sum(_saved_bytes(mixer, extras) for mixer, extras in layers(model)))
    found = []
    for what, values, declared in (
        ("time", flops, exponent(subject.variant.time)),
        ("memory", kept, exponent(subject.variant.memory)),
    ):
        slope = math.log(values[-1] / values[0]) / math.log(sizes[-1] / sizes[0])
        assert slope <= declared + 0.1, f"{what} grows as n^{slope:.2f}, declared {declared}"
        found.append(f"{what} n^{slope:.2f}")
    return ", ".join(found)


def exponent(text: str) -> float:
    """The power of n in a declared cost such as O(n²), O(n·√n), O(n·(H + W)); H and W grow as √n."""
    if "n²" in text or text == "mixed":
        return 2.0
    return 1.5 if "√n" in text or "W" in text or "H" in text else 1.0


def _saved_bytes(mixer: Mixer, extras: dict[str, Any]) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    q, k, v = (x[:1].float().requires_grad_() for x in inputs(mixer))
    rest = {name: x[:1].float() if isinstance(x, Tensor) else x for name, x in extras.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = mixer(q, k, v, **rest)
    assert out.shape == v.shape
    return sum(storages.values())


def compiles(subject: Subject) -> str:
    """torch.compile gives the same logits as eager."""
    objective = subject.variant.objectives[0]
    if objective not in models.OBJECTIVES:
        raise NotApplicable("is supervised")
    model = subject.build(3, 5, objective=objective)
    tokens = distinct_tokens(3, 5)
    torch._dynamo.reset()
    with torch.no_grad():
        eager = model(tokens)
        compiled = torch.compile(model, backend="aot_eager")(tokens)
    assert_close(compiled, eager, rtol=1e-10, atol=1e-10)
    return "dynamo and AOT autograd"


CHECKS: dict[str, Callable[[Subject], str]] = {
    check.__name__.replace("_", " "): check
    for check in (
        equals_oracle, low_precision, no_future, visible_is_declared, decoding_equals_full_pass, batch_is_independent,
        same_weights_outside, counts_are_true, grows_as_declared, compiles,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What a check said: "passed", "failed" or "n/a", and in which words."""

    check: str
    status: str
    words: str


def examine(subject: Subject, check: str) -> Verdict:
    """Runs one check; whatever goes wrong inside it is a failure of the subject, in one line."""
    try:
        return Verdict(check, "passed", CHECKS[check](subject))
    except NotApplicable as reason:
        return Verdict(check, "n/a", str(reason))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return Verdict(
            check, "failed", f"{'' if isinstance(error, AssertionError) else type(error).__name__ + ': '}{lines[0]}"
        )
