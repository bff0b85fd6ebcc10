"""What only a CUDA device can show: replayed graphs, kernels at sizes from which others serve, compiled steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from attnbench import cost, duel, measure, train
from attnbench.measure import Request
from attnbench.optimiser import make_optimiser
from models import kernels

pytestmark = pytest.mark.gpu


def request_of(variant: str, side: int, scope: str = "attention", **told: Any) -> Request:
    """That of a cell in bfloat16."""
    block = cost.CellsConfig.model_validate({"variants": [variant], "scope": scope, "sides": [side], **told})
    suite = cost.CostSuite(
        needs="cuda", seconds=1, budget=1, limit=1, memory="8GB", precision="bfloat16", cells=(block,)
    )
    (cell,) = cost._declared(block, suite)
    return Request(cell.config, side, side, 17)


def test_a_replayed_pass_computes_anew_what_it_was_captured_with() -> None:
    """With what has been written into its inputs since."""
    x = torch.ones(4096, device="cuda", requires_grad=True)
    forward, backward = duel._replays(lambda: x.sin() * x, [x])
    _, (out, grad, grads) = forward.args  # type: ignore[attr-defined]
    with torch.no_grad():
        x.fill_(2.0)
    forward()
    backward()
    torch.cuda.synchronize()
    assert_close(out, x.sin() * x)
    assert_close(grads[0], grad * (x.cos() * x + x.sin()))


@pytest.mark.parametrize(
    ("variant", "backend"),
    [("dense1d", "auto"), ("local2d", "auto"), ("local2d", "flex"), ("axial", "flex"), ("strided", "auto"),
     ("linear", "auto"), ("gla", "auto"), ("decay2d", "auto")],
)  # fmt: skip
def test_what_is_timed_has_passed_its_oracle_there(variant: str, backend: str) -> None:
    """On more than 128 slots, from which FlexAttention takes the kernel that is timed; decoding is asked for too."""
    duel.check_oracle(request_of(variant, 16, backend=backend))


def test_the_window_under_compile_is_the_window() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return kernels.window.attend(q, k, v, 12, 20, 3) * 2

    given = [torch.randn(2, 3, 240, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    results = []
    for call in (attend, torch.compile(attend, fullgraph=True)):
        out = call(*given)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), given)])
    for eager, compiled in zip(*results, strict=True):
        assert_close(compiled, eager, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("variant", ["dense1d", "local2d", "linear"])
def test_a_compiled_step_learns_what_the_eager_one_learns(variant: str) -> None:
    """Losses of four steps in bfloat16; and the backend is the one that was settled before compiling."""
    losses = []
    for compiled in (False, True):
        request = request_of(variant, 12, "step", compile=compiled)
        model: Any = train.make_model(request.config, *request.shape)
        settled = model.backend
        optimiser = make_optimiser(model, request.config)
        batch = measure._batches(request)[0]
        losses.append(
            [float(train.train_step(model, optimiser, batch.inputs, step, request.config)) for step in range(4)]
        )
        assert not compiled or model.backend == settled
    assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=2e-2, atol=0.0)


def test_a_batch_is_there_when_it_is_used() -> None:
    """Copied from pinned memory without waiting, and the memory given up at once."""
    for seed in range(20):
        tokens = torch.full((64, 64, 64), seed)
        assert int(train._there(tokens.clone(), "cuda").sum()) == seed * tokens.numel()
