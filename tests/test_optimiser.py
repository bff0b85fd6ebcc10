"""Muon with Adam as one optimiser: which weights each of them moves, how far, and that it resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attnbench import checkpoint, train
from attnbench.errors import Refusal
from attnbench.optimiser import BETAS, MuonAdam, make_optimiser
from tests.test_train import config, fit, tokens

MUON = {"optimiser": "muon"}


def trained(**changes: object) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A model's weights before and after a step at the full rate 0.01; the head is not zero, so that all may move."""
    settings = config("local2d", lr=0.01, **changes)
    model = train.make_model(settings, 3, 5, 5)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr, arg-type]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train.train_step(model, make_optimiser(model, settings), tokens()[:8], settings.train.warmup, settings)
    return before, dict(model.named_parameters())


def test_matrices_in_blocks_move_by_orthogonal_steps_and_all_else_as_with_adam() -> None:
    before, muon = trained(**MUON)
    _, adam = trained()
    matrices = [name for name in before if name.startswith("blocks.") and before[name].dim() == 2]
    assert len(matrices) == 8
    for name in before:
        moved = muon[name] - before[name]
        if name not in matrices:
            assert torch.equal(muon[name], adam[name]), name
            continue
        # Along the gradient U S V', an update U V' goes as far as the sum of S; Muon's five iterations come near it.
        slope = muon[name].grad
        assert slope is not None
        ideal = 0.01 * 0.2 * max(moved.shape) ** 0.5 * float(torch.linalg.svdvals(slope).sum())
        assert -float((moved.detach() * slope).sum()) == pytest.approx(ideal, rel=0.3), name


def test_groups_follow_the_schedule_and_come_back_from_a_checkpoint() -> None:
    settings = config("local2d", **MUON)
    one, other = (make_optimiser(train.make_model(settings, 3, 5, 5), settings) for _ in range(2))
    other.load_state_dict(one.state_dict())
    for optimiser in (one, other):
        assert isinstance(optimiser, MuonAdam)
        for group in optimiser.param_groups:
            group["lr"] = 0.5
        assert [part.param_groups[0]["lr"] for part in (optimiser._adam, optimiser._muon)] == [0.5, 0.5]
        assert optimiser._adam.state is optimiser._muon.state is optimiser.state
        assert optimiser._adam.param_groups[0]["betas"] == BETAS


@pytest.mark.promise("resume")
@pytest.mark.parametrize("variant", ["local2d", "gla"])
def test_resuming_is_bit_exact(variant: str, tmp_path: Path) -> None:
    whole, _ = fit(config(variant, **MUON), tmp_path / "whole")
    _, stopped = fit(config(variant, **MUON), tmp_path / "parts", stop=10)
    found = checkpoint.latest(tmp_path / "parts")
    assert stopped is None and found is not None
    assert any(name.endswith("momentum_buffer") for name in found.tensors)
    resumed, progress = fit(config(variant, **MUON), tmp_path / "parts")
    assert progress is not None and progress.step == 12
    for (name, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_what_has_no_matrices_or_only_shares_is_refused() -> None:
    settings = config("pixelcnn", **MUON)
    with pytest.raises(Refusal, match="no blocks with matrices"):
        make_optimiser(train.make_model(settings, 3, 5, 5), settings)
    shared = config("local2d", **MUON).model_copy(update={"parallel": "fsdp"})
    with pytest.raises(Refusal, match="whole matrix"):
        make_optimiser(train.make_model(shared, 3, 5, 5), shared)
