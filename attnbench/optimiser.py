"""What turns gradients into steps: Adam, or Muon for the blocks' matrices with Adam for all else, as one optimiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attnbench.config import RunConfig
from attnbench.errors import Refusal

BETAS = (0.9, 0.95)  # Image GPT


def make_optimiser(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """The configured optimiser of the model.  Raises Refusal where Muon has no matrix, or only a share of each."""
    if config.train.optimiser == "adam":
        return torch.optim.Adam(model.parameters(), lr=config.train.lr, betas=BETAS, fused=True)
    if config.parallel == "fsdp":
        raise Refusal("optimiser muon: under fsdp no process holds a whole matrix; choose --parallel ddp, or adam")
    return MuonAdam(model, config.train.lr)


class MuonAdam(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for every matrix inside the blocks: momentum, made orthogonal. Adam for all else.

    An orthogonal update is scaled to the size of one of Adam's, 0.2 by root mean square (Liu et al., Muon is Scalable
    for LLM Training, 2025), so that one rate serves both.  Raises Refusal where the model has no such matrix.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        blocks = getattr(model, "blocks", None)
        inside = [] if blocks is None else [p for p in blocks.parameters() if p.dim() == 2]
        if not inside:
            raise Refusal("optimiser muon: this model has no blocks with matrices; leave --train.optimiser at adam")
        known = {id(p) for p in inside}
        outside = [p for p in model.parameters() if id(p) not in known]
        super().__init__([{"params": outside}, {"params": inside}], {"lr": lr})
        self._adam = torch.optim.Adam(outside, lr=lr, betas=BETAS, fused=True)
        self._muon = torch.optim.Muon(inside, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self._share()

    def _share(self) -> None:
        """One state and one list of groups, here and in the two."""
        for group, part in zip(self.param_groups, (self._adam, self._muon), strict=True):
            part.param_groups = [{**part.param_groups[0], **group}]
            part.state = self.state
        self.param_groups = [*self._adam.param_groups, *self._muon.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both, on the gradients that are there; there must be no closure."""
        assert closure is None
        self._adam.step()
        self._muon.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A saved state, handed on to the two."""
        super().load_state_dict(state_dict)
        self._share()
