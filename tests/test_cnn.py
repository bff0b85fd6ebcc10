"""The CNNs: no blind spot and no future, decoding equal to the full pass, parameters as promised."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import models
from models.cnn import PixelCNN

GRIDS = ((1, 1), (1, 7), (5, 1), (3, 5), (7, 11))


def pixelcnn(height: int, width: int, **shape: Any) -> PixelCNN:
    """In float64, all parameters away from zero, a token for every pixel."""
    torch.manual_seed(0)
    given = {"vocab": height * width, "dim": 16, "depth": 2, "heads": 2} | shape
    model = models.build("pixelcnn", height=height, width=width, **given).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert isinstance(model, PixelCNN)
    return model


def seen(model: PixelCNN) -> Tensor:
    """bool (seq, seq), target × pixel: where the gradient of a target's logits is not exactly zero."""
    grid = model.scan.grid
    tokens = torch.randperm(grid.size).view(1, grid.height, grid.width)
    logits = model(tokens).flatten(1, 2)[0]
    rows = []
    for target in logits:
        (gradient,) = torch.autograd.grad((target * torch.randn_like(target)).sum(), model.tokens, retain_graph=True)
        rows.append((gradient != 0).any(1)[tokens.flatten()])
    return torch.stack(rows)


@pytest.mark.parametrize(("height", "width"), GRIDS)
@pytest.mark.parametrize("kernel", [3, 5])
def test_every_earlier_pixel_in_the_field_is_seen_and_no_other(height: int, width: int, kernel: int) -> None:
    model = pixelcnn(height, width, kernel=kernel, depth=2)
    found = seen(model)
    assert torch.equal(found, model.field())
    assert not found.triu().any()


def test_a_deep_one_sees_every_earlier_pixel() -> None:
    found = seen(pixelcnn(5, 6, depth=6))
    assert torch.equal(found, torch.ones_like(found).tril(-1))


def test_the_field_test_fails_where_a_stack_is_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pixelcnn(5, 7)
    assert torch.equal(seen(model), model.field())
    pad = torch.nn.functional.pad

    def unshifted(x: Tensor, sides: tuple[int, ...]) -> Tensor:
        return pad(x, (0, 0, 0, 1) if sides == (0, 0, 1, 0) else sides)  # the vertical stack sees its own row

    def blind(x: Tensor, sides: tuple[int, ...]) -> Tensor:
        return pad(x, (2, 0) if sides == (1, 1) else sides)  # it looks up to the left only

    for mistake in (unshifted, blind):
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "pad", mistake)
            assert not torch.equal(seen(model), model.field()), mistake.__name__


def steps(model: PixelCNN, tokens: Tensor) -> Iterator[Tensor]:
    state, pixel = model.start(len(tokens)), None
    for place in model.order:
        logits, state = model.step(pixel, state)
        pixel = tokens.flatten(1)[:, place]
        yield logits


@pytest.mark.parametrize(("height", "width"), GRIDS)
@pytest.mark.parametrize("kernel", [3, 5])
def test_decoding_equals_the_full_pass(height: int, width: int, kernel: int) -> None:
    model = pixelcnn(height, width, kernel=kernel, depth=3)
    tokens = torch.randint(height * width, (2, height, width))
    with torch.no_grad():
        assert_close(torch.stack(list(steps(model, tokens)), 1), model(tokens).flatten(1, 2), rtol=1e-12, atol=1e-12)


def test_decoding_computes_a_pixel_and_keeps_a_few_rows() -> None:
    with FlopCounterMode(display=False) as whole, torch.no_grad():
        model = pixelcnn(6, 6)
        model(torch.zeros(1, 6, 6, dtype=torch.long))
    with FlopCounterMode(display=False) as stepwise, torch.no_grad():
        list(steps(model, torch.zeros(1, 6, 6, dtype=torch.long)))
    assert stepwise.get_total_flops() == whole.get_total_flops() == model.flops()
    state = model.start(1)
    assert {tuple(rows.shape[2:]) for rows in state.above} == {(1, 6)}


def test_features_are_the_stream() -> None:
    model = pixelcnn(3, 5, depth=4)
    tokens = torch.randint(15, (2, 3, 5))
    stream = model.features(tokens)
    width = model.tokens.shape[1]
    assert [tuple(x.shape) for x in stream] == [(2, 15, width)] * 5
    assert_close(stream[0].unflatten(1, (3, 5))[:, :, 1:], model.tokens[tokens][:, :, :-1])
    assert_close(model.read(stream[-1]).unflatten(1, (3, 5)), model(tokens))


@pytest.mark.parametrize("share", [1, 0.5, "1/3"])
@pytest.mark.parametrize(
    ("dim", "depth", "vocab", "side"), [(64, 4, 17, 8), (16, 8, 16, 28), (64, 4, 512, 32), (128, 6, 256, 16)]
)
@pytest.mark.parametrize("name", ["pixelcnn", "resnet"])
def test_parameters_are_the_share_of_the_trunk(
    name: str, dim: int, depth: int, vocab: int, side: int, share: float | str
) -> None:
    shape: dict[str, Any] = {"height": side, "width": side, "vocab": vocab, "dim": dim, "depth": depth, "heads": 4}
    parameters = [
        sum(p.numel() for p in model.parameters())
        for model in (models.build(name, **shape, share=share), models.build("dense1d", **shape))
    ]
    assert parameters[0] / parameters[1] == pytest.approx(float(Fraction(share)), rel=0.02)


@pytest.mark.parametrize("name", ["pixelcnn", "resnet"])
def test_without_the_trunks_table_it_is_the_same_model_at_every_side(name: str) -> None:
    """With it, it has an eighth more parameters at 64×64 than at 8×8, and each layer does more for a pixel."""
    shape: dict[str, Any] = {"vocab": 64, "dim": 64, "depth": 6, "heads": 4}
    shapes = [
        [
            [tuple(p.shape) for p in models.build(name, height=side, width=side, **shape, table=table).parameters()]
            for side in (8, 64)
        ]
        for table in (False, True)
    ]
    assert shapes[0][0] == shapes[0][1] and shapes[1][0] != shapes[1][1]


def test_the_same_seed_gives_the_same_weights() -> None:
    for name in ("pixelcnn", "resnet"):
        torch.manual_seed(3)
        one = models.build(name, height=4, width=4, vocab=5, dim=32, depth=3).state_dict()
        torch.manual_seed(3)
        two = models.build(name, height=4, width=4, vocab=5, dim=32, depth=3).state_dict()
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (8, 8), (13, 32)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resnet_reads_any_side(height: int, width: int, channels: int) -> None:
    model = models.build("resnet", height=height, width=width, vocab=17, dim=32, depth=5, channels=channels, classes=7)
    images = torch.randn(4, channels, height, width)
    with FlopCounterMode(display=False) as counter:
        logits = model(images)
    assert logits.shape == (4, 7)
    assert counter.get_total_flops() == 4 * model.flops()  # type: ignore[operator]
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules()) == 11


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("pixelcnn", {"objective": "bert"}, "objective"),
        ("pixelcnn", {"kernel": 4}, "odd"),
        ("pixelcnn", {"kernel": True}, "kernel must be"),
        ("pixelcnn", {"share": 0}, "share"),
        ("pixelcnn", {"share": "half"}, "share"),
        ("resnet", {"table": "yes"}, "table must be true or false"),
        ("pixelcnn", {"position": "learned1d"}, "position"),
        ("pixelcnn", {"backend": "sdpa"}, "backend"),
        ("pixelcnn", {"scan": "snake"}, "raster"),
        ("pixelcnn", {"dim": 2, "share": 0.01}, "no width"),
        ("resnet", {"objective": "ar"}, "supervised"),
        ("resnet", {"dim": 2, "share": 0.01}, "no width"),
        ("resnet", {"kernel": 3}, "option"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        models.build(name, **({"height": 4, "width": 4, "vocab": 5} | settings))
    assert "\n" not in str(refused.value)


def test_decoding_in_the_wrong_order_is_refused() -> None:
    model = pixelcnn(2, 2)
    with pytest.raises(ValueError, match="first step"):
        model.step(torch.zeros(1, dtype=torch.long), model.start(1))
    _, state = model.step(None, model.start(3))
    with pytest.raises(ValueError, match="1 pixels for the 3 images"):
        model.step(torch.zeros(1, dtype=torch.long), state)
