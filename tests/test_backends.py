"""Other libraries' attention against ours, as far as they run on a CPU; elsewhere, that they say why they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import models
from models import backends, geometry, reference
from models.geometry import Grid, Scan, matrix
from models.orders import ORDERS
from models.position import POSITIONS, Shape
from models.reference import softmax_attention

EXACT = [name for name, v in models.VARIANTS.items() if "flex" in getattr(v.cls, "backends", ())]
SHAPES = [(1, 1), (1, 6), (6, 1), (3, 5), (7, 6)]


def build(name: str, **settings: Any) -> Any:
    """Built as if there were a CUDA device, then asked for a forward pass only, which these have on a CPU too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        return models.build(name, height=3, width=5, vocab=2, dim=32, heads=2, depth=4, **settings).double()


def qkv(size: int, head_dim: int = 16, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(2, 2, size, head_dim, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_flex_equals_the_oracle(name: str, objective: str) -> None:
    model = build(name, objective=objective, backend="flex")
    q, k, v = qkv(15)
    with torch.no_grad():
        for mixer in model.mixers[-2:]:
            assert mixer.backend == "flex"
            bias = model.position.bias(mixer.layer.index)
            assert_close(mixer(q, k, v, bias=bias), mixer.oracle(q, k, v, bias=bias), rtol=1e-12, atol=1e-12)
            assert not torch.allclose(mixer(q, k, v, bias=bias), mixer.oracle(q, k.roll(1, 2), v, bias=bias))


@pytest.mark.parametrize("order", ORDERS)
def test_flex_follows_every_scan(order: str) -> None:
    visible = geometry.window2d(Scan(Grid(4, 5), order=order), 1)
    q, k, v = qkv(20)
    out = backends.flex(q, k, v, backends.flex_plan(visible, 20, q.device))
    assert_close(out, softmax_attention(q, k, v, matrix(visible, 20)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("biased", [False, True])
def test_flex_stands_slots_in_any_order(biased: bool) -> None:
    visible, order = geometry.window2d(Scan(Grid(4, 5)), 1), torch.randperm(20)
    table = torch.randn(2, 20, 20, dtype=torch.float64)

    def bias(query: Tensor, key: Tensor, head: Tensor) -> Tensor:
        return table[head, query, key]

    q, k, v = qkv(20)
    plan = backends.flex_plan(visible, 20, q.device, order)
    out = backends.flex(q, k, v, plan, bias if biased else None)
    want = softmax_attention(q, k, v, matrix(visible, 20), table if biased else None)
    assert_close(out, want, rtol=1e-12, atol=1e-12)


def test_columns_stand_together_for_flex() -> None:
    """Of axial's columns at 64 × 64, two fill a block; along the raster every block would hold a bit of each."""
    model: Any = models.build("axial", height=64, width=64, vocab=2, dim=32, heads=2, depth=2, backend="blocked")
    rows, columns = model.mixers
    order = columns.block_order()
    assert rows.block_order() is None
    assert order is not None and order.sort().values.equal(torch.arange(4096))
    plans = [backends.flex_plan(columns.visible(), 4096, torch.device("cpu"), o) for o in (order, None)]
    together, apart = (int(plan.block_mask.kv_num_blocks.sum()) for plan in plans)
    assert together < apart / 2


@pytest.mark.parametrize("name", [name for name, cls in POSITIONS.items() if cls.needs == "bias"])
def test_a_bias_for_one_head_is_that_head_of_all(name: str) -> None:
    made = POSITIONS[name](Shape(Scan(Grid(3, 5)), dim=8, depth=2, heads=2))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    bias, slot = made.bias(1), torch.arange(15)
    assert bias is not None
    both = bias(slot[:, None], slot[None, :])
    assert not torch.equal(both[0], both[1])
    for head in (0, 1):
        assert torch.equal(bias(slot[:, None], slot[None, :], torch.tensor(head)), both[head])


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_natten_by_shift_and_merge_equals_local2d(height: int, width: int, objective: str) -> None:
    pytest.importorskip("natten")
    scan, n = Scan(Grid(height, width), objective), height * width
    for radius in (2, 3):
        q, k, v = qkv(n, 8, torch.float32)
        with torch.no_grad():
            out = backends.natten(q, k, v, scan, radius)
        assert_close(out, softmax_attention(q, k, v, matrix(geometry.window2d(scan, radius), n)), rtol=1e-4, atol=1e-4)
        if (height, width) == (7, 6):
            other = softmax_attention(q, k, v, matrix(geometry.window2d(scan, radius - 1), n))
            assert not torch.allclose(out, other, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("window", [None, 4])
def test_a_bias_class_of_xformers_is_our_mask(objective: str, window: int | None) -> None:
    pytest.importorskip("xformers")
    scan = Scan(Grid(3, 5), objective)
    ours = matrix(geometry.everything(scan) if window is None else geometry.window1d(scan, window), 15)
    if window is not None and scan.causal:
        assert "its bias classes know no start token beside a window" in backends.xformers_reasons(scan, window, False)
        return
    bias = backends.xformers_bias(scan, window)
    theirs = torch.zeros(15, 15) if bias is None else bias.materialize((15, 15), dtype=torch.float32)
    assert torch.equal(theirs == 0, ours)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, so none is missed")
def test_on_a_cpu_each_says_why_not() -> None:
    shape: dict[str, Any] = {"height": 3, "width": 5, "vocab": 2, "dim": 16, "heads": 2}
    for name, backend, words in [
        ("local2d", "flex", "no backward pass, and no CUDA device is here; takes heads of at least 16 channels, not 8"),
        ("dense1d", "xformers", "its kernels are for CUDA, and no CUDA device is here"),
        ("dense-alibi2d", "xformers", "would lay out the n² bias"),
        ("local2d", "natten", "on a CPU it has no backward pass, and no CUDA device is here"),
        ("axial", "natten", "has no such implementation"),
        ("local1d", "natten", r"has no such implementation \(it has blocked, flex, xformers, math\)"),
    ]:
        with pytest.raises(ValueError, match=words):
            models.build(name, backend=backend, **shape)


def test_natten_names_every_reason() -> None:
    reasons = "; ".join(backends.natten_reasons(Scan(Grid(3, 5), order="hilbert"), 1, biased=True))
    for words in ("adds no bias", "along the raster only, not 'hilbert'", "a radius of 1"):
        assert words in reasons


@pytest.mark.parametrize("name", EXACT)
def test_auto_takes_none_of_them(name: str) -> None:
    assert not {"flex", "xformers", "natten"} & set(build(name).backend.split("+"))


def test_a_library_is_not_imported_unasked() -> None:
    import subprocess
    import sys

    code = (
        "import models, sys; models.build('dense1d', height=2, width=2, vocab=2); "
        "print({'xformers', 'natten'} & set(sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert told.stdout.strip() == "set()"


def test_a_layer_with_flex_makes_its_mask_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = backends.flex_plan
    monkeypatch.setattr(backends, "flex_plan", lambda *given: made.append(1) or make(*given))  # type: ignore[func-returns-value]
    mixer = build("local1d", backend="flex").mixers[0]
    with torch.no_grad():
        mixer(*qkv(15))
        mixer(*qkv(15))
    assert len(made) == 1


# --- flash-linear-attention -------------------------------------------------------------------------------------------

FLA = [name for name, v in models.VARIANTS.items() if "fla" in getattr(v.cls, "backends", ())]


def stand_in(name: str, q: Tensor) -> Any:
    """What fla.ops.NAME.chunk_NAME computes, by our references: (batch, seq, heads, …), 1/√width unless told."""

    def kernel(*, q: Tensor, k: Tensor, v: Tensor, g: Any = None, beta: Any = None, scale: Any = None) -> Any:
        later = [None if x is None else x.transpose(1, 2) for x in (q, k, v, g, beta)]
        q, k, v, g, beta = later  # type: ignore[assignment]
        q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
        if name == "gated_delta_rule":
            out = reference.delta_rule(q, k, v, g, beta)
        else:
            g = q.new_zeros(q.shape[:3]) if g is None else g
            assert g.ndim == (4 if name == "gla" else 3)
            out = reference.decayed_attention(q, k, v, g if name == "gla" else g[..., None])
        return out.transpose(1, 2), None

    return kernel


def theirs(name: str, q: Tensor) -> Any:
    """The library's own naive references, which run on a CPU but import Triton."""
    import importlib

    naive = getattr(importlib.import_module(f"fla.ops.{name}.naive"), f"naive_recurrent_{name}")

    def kernel(*, scale: float, q: Tensor, v: Tensor, **given: Tensor) -> Any:
        if name == "gla":  # knows no scale but its own
            return naive(q=q * q.shape[-1] ** 0.5 * scale, v=v, k=given["k"], gk=given["g"])
        if name == "simple_gla":
            given.setdefault("g", v.new_zeros(v.shape[:3]))
        return naive(q=q, v=v, **given, scale=scale)

    return kernel


def as_with_fla(name: str, kernel: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(backends, "find_spec", lambda module: object())
    monkeypatch.setattr(backends, "fla_kernel", kernel)
    return build(name, objective="ar", backend="fla").mixers[0]


def fla_inputs(mixer: Any, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    widths = [16, 16, 16] + [mixer.gates] * bool(mixer.gates)
    return [torch.randn(2, 2, 15, width, dtype=dtype, requires_grad=True) for width in widths]


def pair(mixer: Any, given: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients, of the mixer and of its oracle."""
    both = []
    for function in (mixer, mixer.oracle):
        out = function(*given[:3], **({"gates": given[3]} if len(given) > 3 else {}))
        torch.manual_seed(1)
        both.append([out, *torch.autograd.grad((out * torch.randn_like(out)).sum(), given)])
    return both[0], both[1]


@pytest.mark.parametrize("name", FLA)
def test_what_fla_is_given_makes_the_oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = as_with_fla(name, stand_in, monkeypatch)
    assert mixer.backend == "fla"
    ours, oracle = pair(mixer, fla_inputs(mixer, torch.float64))
    for mine, true in zip(ours, oracle, strict=True):
        assert_close(mine, true, rtol=1e-9, atol=1e-10)


def test_the_delta_rule_is_given_in_bfloat16_and_its_gates_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the library's kernel asks for it: it refuses q, k and v in float32, and Recurrent widens them to that."""
    given: dict[str, torch.dtype] = {}

    def kernel(name: str, q: Tensor) -> Any:
        right = stand_in(name, q)

        def narrow(*, scale: float, **tensors: Tensor) -> Any:
            given.update({key: x.dtype for key, x in tensors.items()})
            out, state = right(**{key: x.float() for key, x in tensors.items()}, scale=scale)
            return out.to(tensors["q"].dtype), state

        return narrow

    mixer = as_with_fla("deltanet", kernel, monkeypatch).float()
    ours, oracle = pair(mixer, fla_inputs(mixer, torch.float32))
    assert given == dict.fromkeys("qkv", torch.bfloat16) | dict.fromkeys(("g", "beta"), torch.float32)
    assert ours[0].dtype == torch.float32
    for mine, true in zip(ours, oracle, strict=True):
        assert_close(mine, true, rtol=0, atol=0.03 * float(true.detach().abs().max()))


@pytest.mark.parametrize("name", FLA)
def test_what_fla_computes_is_the_oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("fla", "triton"):
        pytest.importorskip(module)
    mixer = as_with_fla(name, theirs, monkeypatch).float()
    ours, oracle = pair(mixer, fla_inputs(mixer, torch.float32))
    for mine, true in zip(ours, oracle, strict=True):
        coarse = (
            0.03 * float(true.detach().abs().max()) if name == "deltanet" else 1e-4
        )  # in bfloat16, the others float32
        assert_close(mine, true, rtol=1e-3, atol=coarse)


def test_fla_names_every_reason_and_auto_does_not_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda module: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = "; ".join(backends.fla_reasons(Scan(Grid(3, 5), "bert"), 512, 256))
    told += "; " + "; ".join(backends.xformers_reasons(Scan(Grid(3, 5)), None, biased=False))
    for words in (
        "fla is not installed: pip install 'attnbench[gpu]'", "triton is not installed: pip install 'attnbench[gpu]'",
        "xformers is not installed: pip install 'xformers'", "no CUDA device", "'ar' only", "at most 256",
    ):  # fmt: skip
        assert words in told
    for name in FLA:
        assert build(name, objective="ar").mixers[0].backend != "fla"
        with pytest.raises(ValueError, match="fla is not installed"):
            build(name, objective="ar", backend="fla")


def test_fla_refuses_tensors_that_it_cannot_serve() -> None:
    for dtype, words in ((torch.float64, "float32"), (torch.float32, "for CUDA, and these tensors are on cpu")):
        with pytest.raises(ValueError, match=words):
            backends.fla_decayed(*qkv(15, dtype=dtype))
