"""Every linear-time variant: three forms that agree, no future, steady at 65,536 slots, memory that grows with n."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import models
from models import kernels, recurrence
from models.geometry import Grid, Scan
from models.mixer import Layer
from models.recurrence import Recurrent

Arguments = dict[str, Tensor]

LINEAR_TIME = [name for name, variant in models.VARIANTS.items() if issubclass(variant.cls, Recurrent)]
FORMS = [
    pytest.param(name, backend, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
    for name in LINEAR_TIME
    for backend, reason in (("blocked", None), ("compiled", kernels.missing("decay") or kernels.missing("linear")))
    if backend in models.VARIANTS[name].cls.backends
]
GRIDS = [(1, 1), (7, 1), (1, 15), (5, 13), (13, 10)]
"""n = 1, 7, 15, 65 and 130: the last two cross the borders of chunks and tiles."""
LENGTH = 65_536


def make(
    name: str, height: int, width: int, objective: str = "ar", *, heads: int = 2, head_dim: int = 5,
    backend: str = "blocked",
) -> Any:  # fmt: skip
    """A mixer in float64, by matrix products unless told otherwise."""
    layer = Layer(Scan(Grid(height, width), objective), heads, head_dim, backend=backend)
    return models.VARIANTS[name].cls(layer).double()


def objectives(name: str, backend: str) -> list[str]:
    """Those that this form serves, "ar" among them."""
    served = [one for one in models.VARIANTS[name].objectives if not make(name, 1, 1, one).refusals(backend)]
    assert "ar" in served
    return served


def draw(mixer: Any, batch: int = 2, dtype: torch.dtype = torch.float64) -> Arguments:
    """q, k, v and, where asked for, gates: standard normal, with gradients."""
    torch.manual_seed(0)
    layer = mixer.layer
    widths = {"q": layer.head_dim, "k": layer.head_dim, "v": layer.head_dim, "gates": mixer.gates}
    return {
        name: torch.randn(batch, layer.heads, layer.size, width, dtype=dtype).requires_grad_()
        for name, width in widths.items()
        if width
    }


def results(attend: Callable[..., Tensor], mixer: Any, given: Arguments) -> list[Tensor]:
    """The output and every gradient for one fixed upstream gradient."""
    out = attend(**given)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out, *torch.autograd.grad(out, [*given.values(), *mixer.parameters()], upstream)]


def decode(mixer: Any, given: Arguments) -> Tensor:
    with torch.no_grad():
        state, rows = mixer.start(len(given["q"]), given["q"]), []
        for t in range(mixer.layer.size):
            out, state = mixer.step(**{name: x[:, :, t : t + 1] for name, x in given.items()}, state=state)
            rows.append(out)
    return torch.cat(rows, dim=2)


@pytest.mark.parametrize(("name", "backend"), FORMS)
@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_the_forms_agree(name: str, backend: str, height: int, width: int) -> None:
    for objective in objectives(name, backend):
        mixer = make(name, height, width, objective, backend=backend)
        given = draw(mixer)
        fast, slow = results(mixer, mixer, given), results(mixer.oracle, mixer, given)
        assert_close(fast[0], slow[0], rtol=1e-12, atol=1e-12)
        assert_close(fast[1:], slow[1:], rtol=1e-10, atol=1e-10)
        if objective == "ar":
            assert_close(decode(mixer, given), slow[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "backend"), FORMS)
def test_nothing_of_a_later_slot_is_used(name: str, backend: str) -> None:
    """The gradient of the outputs up to slot t is exactly zero at every later slot, and of the value at t it is not."""
    mixer = make(name, 7, 11, backend=backend)
    for t in (0, 6, 31, 32, 50):
        given = draw(mixer)
        out = mixer(**given)[:, :, : t + 1]
        gradients = torch.autograd.grad((out * torch.randn_like(out)).sum(), list(given.values()))
        assert all((gradient[:, :, t + 1 :] == 0).all() for gradient in gradients)
        assert (gradients[2][:, :, t] != 0).any()


def scaled(given: Arguments, **factors: float) -> Arguments:
    return {name: (x * factors.get(name, 1.0)).detach().requires_grad_() for name, x in given.items()}


@pytest.mark.parametrize(("name", "backend"), FORMS)
def test_float32_holds_at_65536_slots(name: str, backend: str) -> None:
    """Within 1e-3 of float64 in the mean and finite in every gradient, with the decays that are usual."""
    mixer = make(name, 256, 256, heads=1, head_dim=4, backend=backend)
    given = draw(mixer, batch=1)
    with torch.no_grad():
        true = mixer(**given)
    mixer.float()
    given = {key: x.detach().float().requires_grad_() for key, x in given.items()}
    out, *gradients = results(mixer, mixer, given)
    assert (out - true).abs().mean() < 1e-3
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(("name", "backend"), [form for form in FORMS if make(str(form.values[0]), 1, 1).gates])
def test_a_decay_of_50_a_slot_is_only_forgetting(name: str, backend: str) -> None:
    """Nothing overflows in float32: the output is that of the slot alone, as the oracle says; gradients are finite."""
    strong = 1.0 if name == "gla" else -1.0  # logsigmoid(-800)/16 = -50; -A·softplus(+200) ≤ -50
    mixer = make(name, 16, 16, heads=1, head_dim=4, backend=backend).float()
    given = draw(mixer, batch=1, dtype=torch.float32)
    gates = given["gates"].detach().clone()
    gates[..., : 1 if mixer.gates == 2 else None] = -800.0 * strong
    given["gates"] = gates.requires_grad_()
    out, *gradients = results(mixer, mixer, given)
    assert_close(out, mixer.oracle(**given))
    assert all(gradient.isfinite().all() for gradient in gradients)
    alone = {key: x[:, :, 100:101] for key, x in given.items()}
    assert_close(out[:, :, 100:101], mixer.step(**alone, state=mixer.start(1, alone["q"]))[0])


@pytest.mark.parametrize(("name", "backend"), FORMS)
def test_large_inputs_give_no_nan(name: str, backend: str) -> None:
    mixer = make(name, 9, 9, head_dim=8, backend=backend).float()
    given = scaled(draw(mixer, dtype=torch.float32), q=30.0, k=30.0, gates=30.0)
    assert all(x.isfinite().all() for x in results(mixer, mixer, given))


def kept_bytes(mixer: Any) -> int:
    """What is kept between forward and backward, each storage once: by autograd, and by what is to be made anew."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    given = draw(mixer, batch=1, dtype=torch.float32)
    before = alive()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = mixer(**given)  # held: a freed storage's address would be given out again
    assert out.requires_grad
    return sum((storages | {at: size for at, size in alive().items() if at not in before}).values())


def alive() -> dict[int, int]:
    """Bytes of the storages that Python holds, by the storage: what a compiler traces has no address of data."""
    gc.collect()
    held = [x.untyped_storage() for x in gc.get_objects() if type(x) is Tensor and x.layout == torch.strided]
    return {storage._cdata: storage.nbytes() for storage in held}


@pytest.mark.parametrize(("name", "backend"), FORMS)
def test_the_backward_pass_keeps_o_of_n_d(name: str, backend: str) -> None:
    """Twice as much for twice the slots, and far from a d × d state a slot."""
    head_dim = 32
    single, double = (
        kept_bytes(make(name, height, 64, heads=1, head_dim=head_dim, backend=backend).float()) for height in (128, 256)
    )
    assert 1.8 < double / single < 2.1
    if name != "performer":  # O(n·d·log d)
        assert double < 256 * 64 * head_dim * 4 * 70


def test_what_a_compiler_left_behind_is_not_counted() -> None:
    mixer = make("linear", 8, 8, heads=1, head_dim=8).float()
    alone = kept_bytes(mixer)
    left = torch._to_functional_tensor(torch.ones(3))
    with pytest.raises(RuntimeError, match="invalid python storage"):
        left.untyped_storage().data_ptr()
    assert kept_bytes(mixer) == alone > 0


def test_the_bound_on_memory_catches_a_state_a_slot() -> None:
    class StateASlot(models.VARIANTS["linear"].cls):  # type: ignore[misc, name-defined]
        def parallel(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
            return (q[..., None, :] @ (k[..., :, None] * v[..., None, :]).cumsum(2)).squeeze(-2)

    mixer = StateASlot(Layer(Scan(Grid(128, 64)), 1, 32, backend="blocked"))
    assert kept_bytes(mixer) > 128 * 64 * 32 * 4 * 32


def test_spans_are_exact_beside_a_huge_decay() -> None:
    """The sum of the two last decays, after one of -1e8: a difference of running sums would be 0 or 8."""
    log_decay = torch.tensor([-1e8, -1e-3, -1e-3])
    assert_close(recurrence.spans(log_decay)[2], torch.tensor([-2e-3, -1e-3, 0.0]))
    running = log_decay.cumsum(0)
    assert (running[2] - running[0] - -2e-3).abs() > 1e-3


def test_a_state_that_forgets_the_chunks_between_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = recurrence.carried
    monkeypatch.setattr(recurrence, "carried", lambda added, kept: right(added, kept * 0))
    for name in ("retention", "gla", "ssd"):
        mixer = make(name, 13, 10)
        given = draw(mixer)
        assert not torch.allclose(mixer(**given), mixer.oracle(**given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["retention", "ssd", "performer"])
def test_a_decay_applied_twice_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = recurrence.spans
    monkeypatch.setattr(recurrence, "spans", lambda log_decay: right(2 * log_decay))
    mixer = make(name, 3, 5)
    given = draw(mixer)
    assert not torch.allclose(mixer(**given), mixer.oracle(**given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "backend"), FORMS)
def test_flops_are_those_that_torch_counts(name: str, backend: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def solve(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
        *batch, rows, columns = b
        return int(torch.Size(batch).numel()) * rows * rows * columns

    mapping = {torch.ops.aten.linalg_solve_triangular: solve}
    for objective in objectives(name, backend):
        for height, width in GRIDS:
            mixer = make(name, height, width, objective, backend=backend)
            given = {key: x.detach() for key, x in draw(mixer, batch=1).items()}
            with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
                mixer(**given)
            assert counter.get_total_flops() == mixer.flops()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("added", "kept", "dim", "matrices"),
    [
        ((2, 3, 4, 5, 2), (2, 3, 4, 1, 1), 2, False),
        ((2, 3, 4, 5, 2), (3, 1, 1, 1), -3, False),
        ((2, 1, 1, 5, 2), (2, 1, 1, 5, 2), 2, False),
        ((2, 3, 2, 4), (3, 2, 1), 1, False),
        ((2, 3, 4, 5, 2), (2, 3, 4, 5, 5), 2, True),
    ],
)
def test_what_is_carried_is_the_recurrence(
    added: tuple[int, ...], kept: tuple[int, ...], dim: int, matrices: bool, backward: bool
) -> None:
    """Against a loop, and its gradients against differences; from either end, one factor for all or one for each."""
    torch.manual_seed(0)
    x, y = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in (added, kept))
    dim = dim % len(added)
    y5 = y[(None,) * (len(added) - len(kept))]
    places = range(added[dim])
    want: list[Tensor] = []
    for place in reversed(places) if backward else places:
        factor = y5.select(dim, place if y5.shape[dim] > 1 else 0)
        before = want[-1] if want else torch.zeros_like(x.select(dim, 0))
        want.append((factor @ before if matrices else factor * before) + x.select(dim, place))

    def walk(x: Tensor, y: Tensor) -> Tensor:
        return recurrence.carried(x, y, dim, backward, matrices)

    assert_close(walk(x, y), torch.stack(want[::-1] if backward else want, dim=dim))
    assert torch.autograd.gradcheck(walk, (x, y))
