"""Drawing 16 images of 28×28, dim 128, 6 layers: with and without what decoding keeps, and Hugging Face's generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from attnbench.config import threads
from attnbench.measure import state_bytes
from models import build
from tests.timing import describe, passed, peak_bytes, ratio

SIDE, VOCAB, DIM, DEPTH, HEADS, IMAGES = 28, 256, 128, 6, 4, 16
PIXELS = SIDE * SIDE


def model_of(name: str, side: int = SIDE) -> Any:
    """Built anew, after a small one gave slot by slot what it gives at once."""
    torch.set_num_threads(threads())
    passed(name, "auto")
    shape: dict[str, Any] = {"vocab": VOCAB, "dim": DIM, "depth": DEPTH, "heads": HEADS}
    torch.manual_seed(0)
    check_steps(build(name, height=7, width=9, **shape).eval())
    return build(name, height=side, width=side, **shape).eval()


@torch.no_grad()
def check_steps(model: Any) -> None:
    """Raises AssertionError where decoding gives other logits than the whole image."""
    model.head.weight.normal_(0.0, 0.1)
    tokens = torch.randint(VOCAB, (2, 7, 9))
    state, pixels, found = model.start(2), tokens.flatten(1).unbind(1), []
    for before in (None, *pixels[:-1]):
        logits, state = model.step(before, state)
        found.append(logits)
    assert_close(torch.stack(found, dim=1), model(tokens).flatten(1, 2), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def decode(model: Any, pixels: int = PIXELS) -> Any:
    """Draws with what decoding keeps; the state after it."""
    state, pixel = model.start(IMAGES), None
    for _ in range(pixels):
        logits, state = model.step(pixel, state)
        pixel = torch.multinomial(logits.softmax(-1), 1).squeeze(1)
    return state


@torch.no_grad()
def uncached_pixel(model: Any, tokens: Tensor) -> None:
    """A pixel of a sampler that keeps nothing: the whole image again."""
    torch.multinomial(model(tokens)[:, -1, -1].softmax(-1), 1)


@pytest.mark.parametrize("name", ["dense1d", "local2d", "linear"])
def test_decoding(benchmark: Any, name: str) -> None:
    model = model_of(name)
    describe(
        benchmark, name, model.backend, "decoding", PIXELS, IMAGES * model.flops(), peak_bytes(lambda: decode(model, 8))
    )
    benchmark.extra_info["state_bytes_per_image"] = state_bytes(decode(model, 64), model) // IMAGES
    benchmark.pedantic(lambda: decode(model), rounds=1)


def test_decoding_without_what_it_keeps(benchmark: Any) -> None:
    """One pixel is timed, a 784th of an image: every pixel costs the same.  By turns with a whole image's decoding."""
    model, tokens = model_of("dense1d"), torch.zeros(IMAGES, SIDE, SIDE, dtype=torch.long)

    def pixel() -> None:
        uncached_pixel(model, tokens)

    describe(benchmark, "dense1d", "uncached", "decoding one pixel", PIXELS, IMAGES * model.flops(), peak_bytes(pixel))
    facts = ratio(pixel, lambda: decode(model), rounds=5, repeats=1)
    benchmark.extra_info["times_slower_than_cached"] = facts | {
        name: PIXELS * facts[name] for name in ("median", "low", "high")
    }
    benchmark.pedantic(pixel, rounds=5, warmup_rounds=1)


def test_hugging_face_generate(benchmark: Any) -> None:
    """With its cache; 98 of the 784 pixels, by turns with as many of ours."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra peers)")
    config = transformers.ImageGPTConfig(
        vocab_size=VOCAB + 1, n_positions=PIXELS, n_embd=DIM, n_layer=DEPTH, n_head=HEADS
    )
    peer, pixels = transformers.ImageGPTForCausalImageModeling(config).eval(), 98
    start = torch.full((IMAGES, 1), VOCAB)

    @torch.no_grad()
    def generate(pixels: int = pixels) -> None:
        peer.generate(input_ids=start, max_new_tokens=pixels, min_new_tokens=pixels, do_sample=True, use_cache=True)

    model, peak = model_of("dense1d"), peak_bytes(lambda: generate(8))
    describe(benchmark, "ImageGPT", "transformers", f"decoding {pixels} pixels", PIXELS, None, peak)
    facts = ratio(generate, lambda: decode(model, pixels), rounds=5)
    benchmark.extra_info["times_slower_than_ours"] = facts
    benchmark.pedantic(generate, rounds=1)


@pytest.mark.parametrize("name", ["local2d", "linear"])
def test_the_state_does_not_grow_with_the_image(benchmark: Any, name: str) -> None:
    """local2d keeps radius rows, so √n; linear the same at any size."""
    sizes = {side: state_bytes(model_of(name, side).start(1)) for side in (16, 64)}
    assert sizes[64] <= sizes[16] * (4.5 if name == "local2d" else 1), sizes
    describe(benchmark, name, "auto", "start of decoding", 64 * 64, None, sizes[64])
    model = model_of(name, 16)
    benchmark.pedantic(lambda: model.start(1), rounds=5, warmup_rounds=1)
