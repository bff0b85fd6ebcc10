"""Likelihood of images the model has not seen."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnbench import distributed
from attnbench.config import RunConfig
from attnbench.train import autocast, hidden_pixels, token_nats

CHUNK = 128  # images a forward pass


@dataclass(frozen=True)
class Likelihood:
    """Nats per token; with "bert", of hidden pixels only, averaged over the votes.

    per_image: (count,), the mean over an image's tokens.  by_pixel: (height, width), the mean over images.
    """

    nats_per_token: float
    per_image: Tensor
    by_pixel: Tensor


@torch.no_grad()
def likelihood(model: nn.Module, tokens: Tensor, config: RunConfig) -> Likelihood:
    """Evaluates tokens int64 (count, height, width)."""
    model.eval()
    votes = config.evaluate.votes if config.model.objective == "bert" else 1
    total = torch.zeros(tokens.shape, dtype=torch.float64)
    seen = torch.zeros(tokens.shape, dtype=torch.float64)
    for vote in range(votes):
        # The same holes for every model and at every evaluation: step -1 - vote is never trained on.
        hidden = None
        if config.model.objective == "bert":
            hidden = hidden_pixels(tuple(tokens.shape), seed=0, step=-1 - vote)
        nats = _nats(model, tokens, hidden, config)
        holes = torch.ones_like(total) if hidden is None else hidden.double()
        total += nats * holes
        seen += holes
    # A pixel that no vote has hidden counts nowhere.
    per_image = total.flatten(1).sum(1) / seen.flatten(1).sum(1)
    by_pixel = total.sum(0) / seen.sum(0)
    return Likelihood(float(per_image.mean()), per_image, by_pixel)


def _nats(model: nn.Module, tokens: Tensor, hidden: Tensor | None, config: RunConfig) -> Tensor:
    """-log p of every token, float64 on the CPU; the work is shared out among the processes."""

    def work(part: slice) -> Tensor:
        with autocast(config):
            holes = None if hidden is None else hidden[part].to(config.device)
            return token_nats(model, tokens[part].to(config.device), holes).double().cpu()

    parts = [slice(start, start + CHUNK) for start in range(0, len(tokens), CHUNK)]
    return distributed.shared_out(parts, work, torch.zeros(tokens.shape, dtype=torch.float64))


def bits(nats: float) -> float:
    return nats / math.log(2)
