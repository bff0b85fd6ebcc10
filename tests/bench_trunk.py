"""A whole training step, dim 128, 6 layers, batch 4, 28×28: ours against Hugging Face's ImageGPT as it ships."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnbench.config import threads
from models import build
from tests.timing import describe, passed, peak_bytes, ratio

SIDE, VOCAB, DIM, DEPTH, HEADS, BATCH = 28, 256, 128, 6, 4, 4


def images() -> Tensor:
    return torch.randint(VOCAB, (BATCH, SIDE, SIDE), generator=torch.Generator().manual_seed(0))


def step_of(model: nn.Module, logits: Callable[[Tensor], Tensor]) -> Callable[[], object]:
    """Loss, gradients and one step of Adam; logits (batch · seq, vocab)."""
    tokens, optimiser = images(), torch.optim.Adam(model.parameters(), lr=1e-4)

    def step() -> None:
        optimiser.zero_grad()
        F.cross_entropy(logits(tokens), tokens.flatten()).backward()
        optimiser.step()

    return step


def ours(name: str) -> tuple[Any, Callable[[], object]]:
    torch.set_num_threads(threads())
    passed(name, "auto")
    model: Any = build(name, height=SIDE, width=SIDE, vocab=VOCAB, dim=DIM, depth=DEPTH, heads=HEADS)
    return model, step_of(model, lambda tokens: model(tokens).flatten(0, 2))


@pytest.mark.parametrize("name", ["dense1d", "local2d", "linear"])
def test_training_step(benchmark: Any, name: str) -> None:
    model, step = ours(name)
    flops = 3 * BATCH * model.flops()
    describe(benchmark, name, model.backend, "training step", SIDE * SIDE, flops, peak_bytes(step))
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)


def test_training_step_of_hugging_face(benchmark: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra peers)")
    config = transformers.ImageGPTConfig(
        vocab_size=VOCAB + 1, n_positions=SIDE * SIDE, n_embd=DIM, n_layer=DEPTH, n_head=HEADS, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.ImageGPTForCausalImageModeling(config)
    start = torch.full((BATCH, 1), VOCAB)

    def logits(tokens: Tensor) -> Tensor:
        out: Tensor = model(input_ids=torch.cat([start, tokens.flatten(1)[:, :-1]], dim=1)).logits
        return out.flatten(0, 1)[:, :VOCAB]

    _, mine = ours("dense1d")
    step = step_of(model, logits)
    describe(benchmark, "ImageGPT", "transformers", "training step", SIDE * SIDE, None, peak_bytes(step))
    benchmark.extra_info["times_slower_than_ours"] = ratio(step, mine)
    benchmark.pedantic(step, rounds=3)
