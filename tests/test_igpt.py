"""The trunk is Image GPT: its size, its norm, its activation, its initial weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.utils import prune
from torch.testing import assert_close

import models
from models.igpt import MLP, Norm

build: Any = models.build

SIZES = {  # depth, dim, heads, millions of parameters (released code, 512 colours, 1024 positions)
    "S": (24, 512, 8, 76.57),
    "M": (36, 1024, 8, 455.16),
    "L": (48, 1536, 16, 1362.25),
    "XL": (60, 3072, 16, 6801.4),
}
SMALL: dict[str, Any] = {"height": 3, "width": 5, "vocab": 7, "dim": 16, "depth": 2, "heads": 2}


@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_the_published_sizes(size: str) -> None:
    depth, dim, heads, millions = SIZES[size]
    with torch.device("meta"):
        model = build("dense1d", height=32, width=32, vocab=512, dim=dim, depth=depth, heads=heads)
    count = sum(p.numel() for p in model.parameters())
    assert count == depth * (12 * dim**2 + 2 * dim) + 2 * 512 * dim + 1024 * dim + 2 * dim
    assert abs(count / 1e6 - millions) < 0.05


def test_nothing_has_a_bias() -> None:
    assert not [name for name, _ in build("dense1d", **SMALL).named_parameters() if "bias" in name]


def test_norm_scales_and_does_not_centre() -> None:
    norm = Norm(4).double()
    torch.nn.init.constant_(norm.gain, 2.0)
    x = torch.tensor([1.0, 2.0, 3.0, 10.0], dtype=torch.float64)
    assert_close(norm(x), 2 * x / (x.square().mean() + 1e-5).sqrt())


def test_activation_is_the_sigmoid_form() -> None:
    mlp = MLP(2).double()
    torch.nn.init.ones_(mlp.up.weight)
    torch.nn.init.ones_(mlp.down.weight)
    x = torch.tensor([0.3, 0.4], dtype=torch.float64)
    want = 8 * 0.7 / (1 + torch.exp(torch.tensor(-1.702 * 0.7, dtype=torch.float64)))
    assert_close(mlp(x), want.expand(2))


@pytest.mark.parametrize("change", ["pruned", "adapter", "hook"])
def test_a_matrix_that_does_more_than_its_product_is_called(change: str) -> None:
    """Kernels and the fused activation read weights; a hook that makes one, or an adapter, must be run all the same."""
    model: Any = build("dense1d", **SMALL | {"dim": 8}).double()
    tokens = torch.randint(7, (64, 3, 5))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    mlp, before = model.blocks[0].mlp, model(tokens)
    if change == "pruned":
        prune.l1_unstructured(mlp.up, "weight", 0.5)
        mlp.up.weight_orig.data.zero_()
    elif change == "adapter":
        mlp.up = type("Adapter", (torch.nn.Linear,), {"forward": lambda self, x: 0 * x @ self.weight.T})(
            8, 32, bias=False
        ).double()
    else:
        mlp.up.register_forward_hook(lambda module, given, out: 0 * out)
    without = model(tokens)
    assert not torch.allclose(before, without)
    mlp.up, mlp.down = torch.nn.Linear(8, 32, bias=False).double(), torch.nn.Linear(32, 8, bias=False).double()
    torch.nn.init.zeros_(mlp.up.weight)
    assert_close(without, model(tokens))


@pytest.mark.parametrize("name", ["dense-alibi1d", "dense-relbias2d", "local2d", "strided", "hybrid-local2d"])
def test_what_inference_mode_leaves_behind_can_be_trained(name: str) -> None:
    """Tables are made once: in inference mode too they must be such as autograd may save."""
    model: Any = build(name, **SMALL)
    tokens = torch.randint(7, (2, 3, 5))
    with torch.inference_mode():
        model(tokens)
        state = model.start(2)
        for pixel in (None, *tokens.flatten(1).T[:-1]):
            _, state = model.step(pixel, state)
    model(tokens).sum().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = build("dense1d", height=16, width=16, vocab=64, dim=128, depth=4, heads=4)
    weights = dict(model.named_parameters())
    sigma = {
        "blocks.1.attention.qkv.weight": 128**-0.5,
        "blocks.1.attention.out.weight": (128 * 4) ** -0.5,
        "blocks.1.mlp.up.weight": 0.02,
        "blocks.1.mlp.down.weight": 0.02,
        "tokens": 0.02,
        "start_token": 0.02,
        "position.table": 0.01,
    }
    for name, expected in sigma.items():
        assert abs(float(weights[name].detach().std()) / expected - 1) < (
            0.2 if weights[name].numel() < 1000 else 0.05
        ), name
    assert not weights["head.weight"].any()
    assert all((gain == 1).all() for name, gain in weights.items() if name.endswith("gain"))


def test_a_fresh_model_knows_nothing() -> None:
    logits = build("local2d", **SMALL)(torch.zeros(2, 3, 5, dtype=torch.long))
    assert logits.shape == (2, 3, 5, 7)
    assert not logits.any()


def test_same_seed_same_weights_and_another_seed_others() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return build("local2d", **SMALL).get_parameter("blocks.0.mlp.up.weight").detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_features_are_the_residual_stream() -> None:
    model = build("linear", **SMALL)
    features = model.features(torch.zeros(2, 3, 5, dtype=torch.long))
    assert [tuple(x.shape) for x in features] == [(2, 15, 16)] * 3


def test_hidden_pixels_are_seen_by_nobody() -> None:
    torch.manual_seed(0)
    model = build("dense2d", objective="bert", **SMALL).double()
    torch.nn.init.normal_(model.head.weight)
    tokens = torch.randint(7, (1, 3, 5))
    hidden = torch.zeros(1, 3, 5, dtype=torch.bool)
    hidden[0, 1, 2] = True
    other = tokens.clone()
    other[0, 1, 2] = (tokens[0, 1, 2] + 1) % 7
    assert torch.equal(model(tokens, hidden), model(other, hidden))
    assert not torch.equal(model(tokens), model(other))


def test_bert_sees_later_pixels() -> None:
    torch.manual_seed(0)
    model = build("dense1d", objective="bert", **SMALL).double()
    torch.nn.init.normal_(model.head.weight)
    tokens = torch.zeros(1, 3, 5, dtype=torch.long)
    later = tokens.clone()
    later[0, 2, 4] = 1
    assert (model(tokens)[0, 0, 0] != model(later)[0, 0, 0]).any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "local2dd"}, "did you mean 'local2d'"),
        ({"objective": "berth"}, "did you mean 'bert'"),
        ({"radios": 3}, "did you mean 'radius'"),
        ({"radius": 0}, "at least 1"),
        ({"radius": 1.5}, "whole number"),
        ({"radius": True}, "radius must be a whole number"),
        ({"radius": 10**20}, "radius must be at most"),
        ({"name": "linear", "chunk": -1}, "chunk must be a whole number, at least 1, or 0 for a fitting one, not -1"),
        ({"name": "linear", "chunk": False}, "chunk must be a whole number"),
        ({"name": "performer", "features": True}, "features must be a whole number"),
        ({"name": "hybrid-linear", "every": True}, "every must be a whole number"),
        ({"name": "hybrid-local2d", "every": True}, "every must be a whole number"),
        ({"name": "decay2d", "band": True}, "band must be a whole number"),
        ({"name": "decay2d", "strip": 0}, "strip must be a whole number"),
        ({"heads": 3}, "does not divide"),
        ({"heads": 0}, "heads must be a whole number, at least 1, not 0"),
        ({"vocab": 0}, "vocab must be"),
        ({"depth": 0}, "depth must be"),
        ({"dim": 16.0}, "dim must be"),
        ({"name": "pixelcnn", "depth": True}, "depth must be"),
        ({"height": 0}, "height must be a whole number"),
        ({"width": 5.0}, "width must be a whole number"),
        ({"name": "pixelcnn", "height": 2.5}, "height must be a whole number"),
        ({"name": "resnet", "classes": 0}, "classes must be a whole number"),
        ({"name": "pixelcnn", "share": 10**30}, "at most 1000"),
        ({"name": "performer", "seed": 1.5}, "seed must be a whole number"),
        ({"name": "decay2d", "learned": "no"}, "learned must be true or false"),
        ({"backend": "cuda"}, "has no such implementation"),
        ({"position": "learnt2d"}, "did you mean 'learned2d'"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_line(change: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {"name": "local2d", **SMALL} | change
    with pytest.raises(ValueError, match=words) as error:
        build(**arguments)
    assert "\n" not in str(error.value)


def test_decoding_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="bert"):
        build("dense1d", objective="bert", **SMALL).start(1)
    model = build("dense1d", **SMALL)
    with pytest.raises(ValueError, match="None"):
        model.step(torch.zeros(1, dtype=torch.long), model.start(1))


@pytest.mark.parametrize("name", ["dense1d", "local2d", "linear", "decay2d", "pixelcnn"])
@pytest.mark.parametrize("gradients", [True, False])
def test_decoding_ends_with_the_last_pixel(name: str, gradients: bool) -> None:
    model, pixel = build(name, **SMALL), None
    with torch.set_grad_enabled(gradients):
        state = model.start(2)
        for _ in range(15):
            _, state = model.step(pixel, state)
            pixel = torch.zeros(2, dtype=torch.long)
        with pytest.raises(ValueError, match="all 15 pixels have been decoded; begin the next images with start"):
            model.step(pixel, state)


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("shape", [(1, 5, 3), (1, 10, 10), (15,), (1, 15)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...], objective: str) -> None:
    model = build("dense1d", objective=objective, **SMALL)
    given, right = torch.zeros(shape, dtype=torch.long), torch.zeros(1, 3, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"tokens \(batch, 3, 5\) wanted, not \("):
        model(given)
    with pytest.raises(ValueError, match=r"hidden \(batch, 3, 5\) wanted, not \("):
        model(right, given.bool())
