"""Feature maps: what each approximates or weighs, and that mistakes in them are caught."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import models
from models.full import Dense
from models.geometry import Grid, Scan
from models.linear import (
    Based,
    CosFormer,
    HybridLinear,
    Linear,
    Performer,
    _taylor,
    _taylor_backward,
    orthogonal_directions,
)
from models.mixer import Layer


def layer(height: int = 5, width: int = 7, objective: str = "ar", **other: Any) -> Layer:
    given: dict[str, Any] = {"heads": 2, "head_dim": 6, "backend": "blocked"} | other
    return Layer(Scan(Grid(height, width), objective), **given)


def draw(where: Layer) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, where.heads, where.size, where.head_dim, dtype=torch.float64) for _ in range(3)]


def agrees(mixer: Any) -> bool:
    given = draw(mixer.layer)
    return torch.allclose(mixer.double()(*given), mixer.oracle(*given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "performer", "cosformer", "based"])
def test_weights_are_positive_and_sum_to_one(name: str) -> None:
    """Constant values come back as they are; a normaliser without the current slot would not have it so."""
    for objective in ("ar", "bert"):
        mixer = models.VARIANTS[name].cls(layer(objective=objective)).double()
        q, k, v = draw(mixer.layer)
        assert_close(mixer(q.abs(), k.abs(), torch.ones_like(v)), torch.ones_like(v))
        positive = mixer(q, k, v.abs())
        assert (positive >= 0).all() and (positive <= v.abs().amax(2, keepdim=True) * (1 + 1e-12)).all()


def test_a_normaliser_without_the_current_slot_is_caught() -> None:
    class WithoutNow(Linear):
        def normalised(self, out: Tensor) -> Tensor:
            return out[..., :-1] / torch.roll(out[..., -1:], 1, dims=2)

    assert agrees(Linear(layer())) and not agrees(WithoutNow(layer()))


def test_positions_one_slot_off_are_caught_between_chunks() -> None:
    class Late(CosFormer):
        def oracle(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
            return super().oracle(q, torch.roll(k, 1, dims=2), v, **extras)

    assert agrees(CosFormer(layer(), chunk=8)) and not agrees(Late(layer(), chunk=8))


def test_linear_keeps_digits_where_elu_loses_them() -> None:
    """All channels at -20: in float32 elu + 1 is 0 there, and 0/0 would follow."""
    mixer = Linear(layer())
    low = torch.full((1, 2, 35, 6), -20.0)
    assert (torch.nn.functional.elu(low) + 1 == 0).all()
    assert (mixer.feature(low) > 0).all()
    assert mixer(low, low, torch.ones_like(low)).isfinite().all()


def test_performer_is_softmax_in_the_mean() -> None:
    """With many features it nears softmax attention, and more features come nearer."""
    where = layer(head_dim=4)
    q, k, v = (0.7 * x for x in draw(where))
    true = Dense(Layer(where.scan, 2, 4)).oracle(q, k, v)
    errors = []
    for features in (16, 256, 4096):
        found = [Performer(where, features=features, seed=seed).double()(q, k, v) for seed in range(4)]
        errors.append(float(torch.stack(found).sub(true).abs().mean()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.02


def test_performers_directions() -> None:
    """Orthogonal in groups, as long as Gaussian vectors; a function of the seed, the layer and the head."""
    drawn = orthogonal_directions(heads=2, count=12, head_dim=6, seed=3, layer=1)
    for group in drawn.unflatten(1, (2, 6)).flatten(0, 1):
        gram = group @ group.mT
        assert_close(gram, gram.diagonal().diag())
    many = orthogonal_directions(heads=1, count=3000, head_dim=6, seed=0, layer=0)
    assert_close(many.var(dim=(0, 1)), torch.ones(6, dtype=torch.float64), rtol=0.1, atol=0.0)
    assert torch.equal(drawn, orthogonal_directions(2, 12, 6, 3, 1))
    others = [drawn[1], orthogonal_directions(2, 12, 6, 3, 2)[0], orthogonal_directions(2, 12, 6, 4, 1)[0]]
    assert all(not torch.equal(drawn[0], other) for other in others)


def test_performers_directions_do_not_hang_on_the_global_seed_and_are_saved() -> None:
    def saved(seed: int) -> Tensor:
        torch.manual_seed(seed)
        model = models.build("performer", height=2, width=2, vocab=3, dim=8, depth=2, heads=2)
        (name,) = [key for key in model.state_dict() if "directions" in key and "blocks.0" in key]
        return model.state_dict()[name]

    assert torch.equal(saved(1), saved(2))


def test_performer_survives_a_rising_and_a_falling_scale_of_keys() -> None:
    """Keys a thousand times too long, early or late: a stabiliser fixed by the first, or by all, would make 0/0."""
    mixer = Performer(layer())
    q, k, v = (x.float() for x in draw(mixer.layer))
    for slots in (slice(0, 3), slice(20, 23), slice(34, 35)):
        long = k.clone()
        long[:, :, slots] *= 1000
        before = slots.start
        out = mixer(q, long, v)
        assert out.isfinite().all()
        assert_close(out[:, :, :before], mixer(q, k, v)[:, :, :before])


def test_cosformer_weighs_by_the_distance_along_the_scan() -> None:
    """All queries and keys alike: the weights are cos(π/2 · distance/n) over their sum."""
    where = layer(1, 9, heads=1, head_dim=9)
    v = torch.eye(9, dtype=torch.float64)[None, None]
    same = torch.ones_like(v)
    weights = CosFormer(where).double()(same, same, v)[0, 0]
    raw = torch.tensor([math.cos(math.pi / 2 * (8 - key) / 9) for key in range(9)], dtype=torch.float64)
    assert_close(weights[8], raw / raw.sum())


def test_cosformer_without_a_common_channel_reads_nothing() -> None:
    mixer = CosFormer(layer())
    q = torch.ones(1, 2, 35, 6, requires_grad=True)
    k = -torch.ones(1, 2, 35, 6, requires_grad=True)
    out = mixer(q, k, torch.ones_like(q))
    assert (out == 0).all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), [q, k]))


def test_based_is_the_second_order_taylor_series() -> None:
    """φ(q)·φ(k) = 1 + s + s²/2 with the width 1 + d + d(d + 1)/2."""
    mixer = Based(layer()).double()
    q, k, _ = draw(mixer.layer)
    assert mixer.feature(q).shape[-1] == mixer.width == 1 + 6 + 21
    score = q @ k.mT / 6**0.5
    assert_close(mixer.feature(q) @ mixer.feature(k).mT, 1 + score + score**2 / 2)


@pytest.mark.parametrize("dim", [1, 2, 5, 8])
def test_based_map_and_its_gradient_are_sound_operators(dim: int) -> None:
    """Shapes, strides and aliasing as declared; the gradient against finite differences. A circle of channels has one
    distance, or half of one, more if its number is even."""
    x = torch.randn(2, 7, 3, dim, dtype=torch.float64).transpose(1, 2).requires_grad_()
    torch.library.opcheck(_taylor, (x,))
    torch.library.opcheck(_taylor_backward, (torch.randn_like(_taylor(x)), x.detach()))
    assert torch.autograd.gradcheck(_taylor, (x,))


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_based_in_groups_equals_based_in_one(objective: str) -> None:
    where = layer(7, 9, objective)
    whole, grouped = Based(where).double(), Based(where, chunk=8).double()
    grouped.unit = 16
    given = [x.requires_grad_() for x in draw(where)]
    outs = [mixer(*given) for mixer in (whole, grouped)]
    assert_close(*outs)
    assert_close(*(torch.autograd.grad((out**2).sum(), given) for out in outs))


def test_hybrid_ends_every_group_with_a_dense_layer() -> None:
    def kinds(depth: int, every: int) -> str:
        layers = [HybridLinear(layer(index=index, depth=depth, backend="auto"), every=every) for index in range(depth)]
        return "".join("D" if isinstance(one, Dense) else "L" for one in layers)

    assert kinds(8, 3) == "LLLDLLLD"
    assert kinds(5, 1) == "LDLDL"
    assert kinds(2, 3) == "LD"
    assert kinds(1, 3) == "D"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("linear", {"chunk": -1}, "chunk must be"),
        ("performer", {"features": -2}, "features must be"),
        ("hybrid-linear", {"every": 0}, "every must be"),
        ("gla", {"chunk": 24}, "power of two"),
        ("decay2d", {"band": 0}, "band must be"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        models.build(name, height=2, width=2, vocab=3, dim=8, heads=2, **options)


def test_compiles_for_any_number_of_images() -> None:
    """A float of the class, such as the least normaliser, is nothing that dynamo can lift out of two layers."""
    model: Any = models.build("linear", height=4, width=4, vocab=4, dim=16, depth=2, heads=2)
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    for images in (2, 3):
        tokens = torch.randint(4, (images, 4, 4))
        compiled(tokens).sum().backward()
        assert_close(compiled(tokens), model(tokens))
