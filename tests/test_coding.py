"""The likelihood is real: a bit stream as long as claimed, from which the model alone brings the images back."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import models
from attnbench import coding, evaluate
from attnbench.config import RunConfig
from attnbench.errors import Refusal
from attnbench.source import Source
from attnbench.sources import SOURCES, build_source

needs_coder = pytest.mark.skipif(
    importlib.util.find_spec("constriction") is None, reason="needs constriction (extra test)"
)


def drawn(name: str, count: int, **options: Any) -> tuple[Source, np.ndarray[Any, np.dtype[np.int64]]]:
    source = build_source(name, height=7, width=9, colours=6, **options)
    return source, source.sample(count, seed=3)


def lively(name: str, **options: Any) -> nn.Module:
    """A tiny untrained model whose predictions are far from uniform."""
    torch.manual_seed(1)
    model = models.build(name, height=7, width=9, vocab=6, dim=16, depth=2, heads=2, **options)
    nn.init.normal_(model.head.weight, std=0.3)  # type: ignore[union-attr, arg-type]
    return model


@needs_coder
@pytest.mark.parametrize("name", SOURCES)
def test_a_source_codes_to_its_likelihood_and_back(name: str) -> None:
    source, images = drawn(name, 1000)
    symbols = images.reshape(1000, -1)
    coded = coding.encode(coding.of_source(source), symbols)
    assert coded.claimed_bits == pytest.approx(-source.log_prob(images).sum() / np.log(2), rel=1e-12)
    assert coded.bits == pytest.approx(coded.claimed_bits, rel=1e-3)
    np.testing.assert_array_equal(coding.decode(coding.of_source(source), coded.words, 1000, source.size), symbols)


@needs_coder
@pytest.mark.parametrize("name, options", [("dense1d", {}), ("local2d", {"radius": 2}), ("linear", {})])
def test_a_model_codes_to_its_likelihood_and_back(name: str, options: dict[str, Any]) -> None:
    """The bits are those that evaluation claims from its full pass; decoding knows the model and the stream only."""
    model = lively(name, **options)
    _, images = drawn("mesh", 300)
    symbols = images.reshape(300, -1)[:, np.asarray(model.order)]
    coded = coding.encode(coding.of_model(model), symbols)
    config = RunConfig(variant=name, device="cpu", train={"precision": "float32"})  # type: ignore[arg-type]
    nats = evaluate.likelihood(model, torch.from_numpy(images), config).nats_per_token
    assert abs(nats - np.log(6)) > 0.1
    assert coded.claimed_bits == pytest.approx(nats * images.size / np.log(2), rel=1e-4)
    assert coded.bits == pytest.approx(nats * images.size / np.log(2), rel=1e-3)
    np.testing.assert_array_equal(coding.decode(coding.of_model(model), coded.words, 300, 63), symbols)


@needs_coder
def test_another_model_does_not_decode() -> None:
    model, (_, images) = lively("dense1d"), drawn("mesh", 20)
    symbols = images.reshape(20, -1)
    words = coding.encode(coding.of_model(model), symbols).words
    nn.init.normal_(model.head.weight, std=0.3)  # type: ignore[union-attr, arg-type]
    assert (coding.decode(coding.of_model(model), words, 20, 63) != symbols).mean() > 0.5


@needs_coder
def test_a_claim_below_the_truth_would_be_noticed() -> None:
    """Somebody who claims a bit a pixel less than the distributions give is found out by the stream's length."""
    source, images = drawn("mirror", 200)
    coded = coding.encode(coding.of_source(source), images.reshape(200, -1))
    assert coded.bits != pytest.approx(coded.claimed_bits - images.size * 0.01, rel=1e-3)


def test_without_the_coder_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    source, images = drawn("above", 1)
    with pytest.raises(Refusal, match="pip install constriction"):
        coding.encode(coding.of_source(source), images.reshape(1, -1))
