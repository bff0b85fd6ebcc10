"""Likelihood of images the model has not seen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnbench import distributed
from attnbench.config import RunConfig
from attnbench.tokens import Pixels, Tokeniser
from attnbench.train import autocast, hidden_pixels, token_nats

CHUNK = 128
"""The most images of a forward pass."""
IN_BITS = ("bits_per_dim", "bits_per_dim_is_bound", "residual_bits_per_dim")
"""What a record's metrics say of whole images, where that makes sense."""


def chunk(config: RunConfig) -> int:
    """Images of a forward pass: as many as training has at a time, so that what fits there fits here."""
    return min(CHUNK, max(1, config.train.batch // (config.train.accumulate * distributed.size())))


@dataclass(frozen=True)
class Likelihood:
    """Nats per token; with "bert", of hidden pixels only, averaged over the votes.

    per_image: (count,), the mean over an image's tokens.  by_pixel: (height, width), the mean over images.
    """

    nats_per_token: float
    per_image: Tensor
    by_pixel: Tensor

    def recorded(self) -> dict[str, Any]:
        """As a record holds it, to a millionth of a nat: what lies below is noise of float32, and half of the bytes."""
        return {
            "per_image_nats": [round(nats, 6) for nats in self.per_image.tolist()],
            "nll_map": [[round(nats, 6) for nats in row] for row in self.by_pixel.tolist()],
        }


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

    size = chunk(config)
    parts = [slice(start, start + size) for start in range(0, len(tokens), size)]
    return distributed.shared_out(parts, work, torch.zeros(tokens.shape, dtype=torch.float64))


def bits(nats_per_token: float, tokeniser: Tokeniser, pixels: Pixels, config: RunConfig) -> dict[str, Any]:
    """A record's metrics in bits, of images uint8 (count, height, width, channels) whose tokens cost these nats.

    bits_per_dim: per channel value; where the tokens do not determine the image, a bound from above that includes
    residual_bits_per_dim, the bits of the true colours given the tokens, and bits_per_dim_is_bound says so. All three
    are None where that is not known, and with "bert", whose nats are of hidden pixels and no image's code length.
    """
    per_token = nats_per_token / math.log(2)
    found: dict[str, Any] = {"bits_per_token": per_token, **dict.fromkeys(IN_BITS)}
    residual = tokeniser.residual_bits(pixels) if config.model.objective != "bert" else None
    if residual is None:
        return found
    whole = per_token * tokeniser.tokens_per_pixel / pixels.shape[-1] + residual
    return found | dict(zip(IN_BITS, (whole, not tokeniser.lossless, residual), strict=True))
