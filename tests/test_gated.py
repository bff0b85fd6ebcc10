"""Gated recurrences: what their gates mean, what they start as, and that mistakes in the delta rule are caught."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import models
from models import recurrence, reference
from models.gated import DeltaNet, GatedLinear, Retention, StateSpaceDual
from models.geometry import Grid, Scan
from models.mixer import Layer


def layer(heads: int = 4, head_dim: int = 8, height: int = 5, width: int = 13, backend: str = "auto") -> Layer:
    return Layer(Scan(Grid(height, width)), heads, head_dim, backend=backend)


def draw(*shape: int, count: int = 3) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("name", ["retention", "gla", "ssd", "deltanet"])
def test_gated_variants_are_autoregressive_only(name: str) -> None:
    with pytest.raises(ValueError, match="ar only"):
        models.build(name, height=2, width=2, vocab=3, dim=8, heads=2, objective="bert")


def test_retention_fades_by_the_papers_rates() -> None:
    """1 - 1/32, 1 - 1/64, …: what a query reads of a key ten slots back, against that of its own."""
    mixer = Retention(layer()).double()
    assert_close(mixer.log_decay(None, torch.zeros((), dtype=torch.float64)).flatten().exp().tolist(),
                 [31 / 32, 63 / 64, 127 / 128, 255 / 256])  # fmt: skip


@pytest.mark.parametrize(
    ("cls", "memories"), [(StateSpaceDual, None), (DeltaNet, None), (GatedLinear, [23, 23, 23, 23])]
)
def test_the_memory_at_a_gate_of_zero(cls: type[Any], memories: list[int] | None) -> None:
    """Slots until a state has faded to 1/e: spread over the heads for Mamba-2's gate, 16/ln 2 for gla's."""
    mixer = cls(layer())
    zeros = torch.zeros(1, 4, 1, mixer.gates)
    found = (-1 / mixer.log_decay(zeros, zeros).mean(-1).flatten()).tolist()
    if memories is not None:
        assert [int(slots) for slots in found] == memories
    else:
        assert found == sorted(found, reverse=True)
        assert found[0] == pytest.approx(1000, rel=0.01) and found[-1] == pytest.approx(1 / 1.6, rel=0.01)


def test_gla_halves_a_channel_at_a_time() -> None:
    """Only the channel whose gate is shut forgets."""
    mixer = GatedLinear(layer(heads=1, head_dim=2, height=1, width=2)).double()
    k = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]], dtype=torch.float64)
    v = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]], dtype=torch.float64)
    gates = torch.tensor([[[[0.0, 0.0], [-1e4, 1e4]]]], dtype=torch.float64)
    first, second = (mixer(torch.tensor([[[q, q]]], dtype=torch.float64), k, v, gates=gates)[0, 0, 1]
                     for q in ([1.0, 0.0], [0.0, 1.0]))  # fmt: skip
    assert (first.abs() < 1e-200).all() and second[0] > 1


def test_the_delta_rule_overwrites_what_a_key_held() -> None:
    """The same key twice: with β = 1 and no decay the second value replaces the first; a plain sum keeps both."""
    k = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    k[..., 0] = 1
    v = torch.tensor([[[[1.0, 2.0], [5.0, -3.0]]]], dtype=torch.float64)
    beta, none = torch.ones(1, 1, 2, dtype=torch.float64), torch.zeros(1, 1, 2, dtype=torch.float64)
    assert_close(recurrence.delta(k, k, v, none, beta, chunk=2), v)
    assert_close(reference.delta_rule(k, k, v, none, beta), v)
    assert_close(recurrence.decayed(k, k, v, none, chunk=2)[0, 0, 1], v[0, 0].sum(0))


def test_the_delta_rule_stays_bounded_with_one_key_for_65536_slots() -> None:
    """The worst case for a triangular system: all keys the same, β = 1, no decay; each slot reads its own value."""
    size = 65_536
    torch.manual_seed(0)
    k = torch.nn.functional.normalize(torch.ones(1, 1, size, 4), dim=-1)
    v = torch.randn(1, 1, size, 4)
    out = recurrence.delta(k, k, v, torch.zeros(1, 1, size), torch.ones(1, 1, size), chunk=64)
    assert_close(out, v, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mistake", ["erases nothing", "decays the write", "reads before it fades"])
def test_mistakes_in_the_delta_rule_are_caught(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = recurrence.delta

    def wrong(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, chunk: int) -> Tensor:
        if mistake == "erases nothing":
            return recurrence.decayed(q, k, beta[..., None] * v, log_decay, chunk)
        if mistake == "decays the write":
            return right(q, k, v * log_decay.exp()[..., None], log_decay, beta, chunk)
        return right(q, k, v, torch.nn.functional.pad(log_decay[..., :-1], (1, 0)), beta, chunk)

    mixer = DeltaNet(layer(backend="blocked")).double()
    q, k, v = draw(2, 4, 65, 8)
    (gates,) = draw(2, 4, 65, 2, count=1)
    true = mixer.oracle(q, k, v, gates=gates)
    assert_close(mixer(q, k, v, gates=gates), true, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr("models.gated.delta", wrong)
    assert not torch.allclose(mixer(q, k, v, gates=gates), true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [2, 4, 16, 64])
def test_every_chunk_gives_the_same(chunk: int) -> None:
    q, k, v = draw(2, 4, 65, 8)
    (gates,) = draw(2, 4, 65, 8, count=1)
    for cls in (Retention, GatedLinear, StateSpaceDual, DeltaNet):
        small, usual = cls(layer(backend="blocked"), chunk=chunk).double(), cls(layer()).double()
        given = {"gates": gates[..., : usual.gates]} if usual.gates else {}
        assert_close(small(q, k, v, **given), usual(q, k, v, **given), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["retention", "gla", "ssd", "deltanet"])
def test_outputs_have_a_root_mean_square_of_one(name: str) -> None:
    mixer = models.VARIANTS[name].cls(layer()).double()
    q, k, v = draw(2, 4, 65, 8)
    given = {"gates": draw(2, 4, 65, mixer.gates, count=1)[0]} if mixer.gates else {}
    power = mixer(q, k, 100 * v, **given).square().mean(-1)
    assert (power <= 1).all() and power.median() > 0.99
