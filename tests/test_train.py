"""Training: its data order, its schedule, resuming bit for bit, and divergence."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from attnbench import checkpoint, distributed, evaluate, probe, train
from attnbench.config import RunConfig
from attnbench.errors import Refusal
from attnbench.optimiser import make_optimiser
from models import kernels

QUICK: dict[str, Any] = {
    "steps": 12, "batch": 8, "validate_every": 4, "checkpoint_every": 4, "precision": "float32", "warmup": 3,
}  # fmt: skip


def config(variant: str, **changes: object) -> RunConfig:
    return RunConfig.model_validate(
        {"variant": variant, "device": "cpu", "train": QUICK | changes, "model": {"dim": 16, "depth": 2, "heads": 2}}
    )


def tokens() -> torch.Tensor:
    return torch.randint(5, (20, 3, 5), generator=torch.Generator().manual_seed(0))


def fit(settings: RunConfig, folder: Path, stop: int | None = None) -> tuple[torch.nn.Module, train.Progress | None]:
    """Trains; with `stop`, Ctrl-C comes when that step is reported."""
    model: Any = train.make_model(settings, 3, 5, 5)

    def validate(trained: torch.nn.Module) -> float:
        return -float(sum(p.detach().abs().sum() for p in trained.parameters()))

    def interrupt(step: int, loss: float) -> None:
        if stop is not None and step >= stop:
            raise KeyboardInterrupt

    try:
        return model, train.fit(model, tokens(), validate, settings, folder, interrupt)
    except KeyboardInterrupt:
        return model, None


def ar_variants() -> list[str]:
    return sorted(name for name, v in models.VARIANTS.items() if "ar" in v.objectives)


@pytest.mark.promise("resume")
@pytest.mark.parametrize("variant", ar_variants())
def test_resuming_is_bit_exact(variant: str, tmp_path: Path) -> None:
    whole, _ = fit(config(variant), tmp_path / "whole")
    _, stopped = fit(config(variant), tmp_path / "parts", stop=10)
    assert stopped is None
    resumed, progress = fit(config(variant), tmp_path / "parts")
    assert progress is not None and progress.step == 12
    for (name, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_resuming_resumes(tmp_path: Path) -> None:
    """It does not start again: the steps before the checkpoint are not trained a second time."""
    fit(config("dense1d"), tmp_path, stop=10)
    seen: list[int] = []
    model: Any = train.make_model(config("dense1d"), 3, 5, 5)
    train.fit(model, tokens(), lambda m: 0.0, config("dense1d"), tmp_path, lambda step, loss: seen.append(step))
    assert min(seen) > 10


def trained(folder: Path, validate: Callable[[Any], float] = lambda m: 0.0, **told: Any) -> list[int]:
    """The steps that `fit` reports."""
    seen: list[int] = []
    model: Any = train.make_model(config("dense1d"), 3, 5, 5)
    train.fit(model, tokens(), validate, config("dense1d"), folder, lambda step, loss: seen.append(step), **told)
    return seen


def test_ctrl_c_in_the_last_validation_is_heard(tmp_path: Path) -> None:
    calls: list[int] = []

    def validate(model: Any) -> float:
        calls.append(1)
        if len(calls) == QUICK["steps"] // QUICK["validate_every"]:
            signal.raise_signal(signal.SIGINT)
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, validate)
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == QUICK["steps"]
    assert trained(tmp_path) == []


def test_the_last_step_is_saved_and_not_trained_again(tmp_path: Path) -> None:
    """What comes after training may be killed too."""
    whole, _ = fit(config("dense1d"), tmp_path)
    again, progress = fit(config("dense1d"), tmp_path)
    assert progress is not None and progress.step == 12 and progress.curves.validation_steps == [4, 8, 12]
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in whole.state_dict().items())
    assert trained(tmp_path) == []


def test_a_checkpoint_of_other_images_is_not_resumed(tmp_path: Path) -> None:
    trained(tmp_path, data="these")
    assert trained(tmp_path, data="these") == trained(tmp_path) == []
    with pytest.warns(UserWarning, match="other images or weights than these: training starts anew"):
        assert trained(tmp_path, data="those") == [10, 12]
    assert trained(tmp_path, data="those") == []


def test_a_checkpoint_of_another_model_is_refused_in_one_line(tmp_path: Path) -> None:
    fit(config("dense1d"), tmp_path / "a")
    found = checkpoint.latest(tmp_path / "a")
    assert found is not None
    some = {name: tensor for name, tensor in found.tensors.items() if name != "model.head.weight"}
    checkpoint.save(tmp_path / "lacking", 12, some, found.meta)
    checkpoint.save(tmp_path / "unknown", 12, found.tensors | {"model.foot": torch.zeros(2)}, found.meta)
    checkpoint.save(tmp_path / "told", 12, found.tensors, found.meta | {"more": 1})
    for folder in ("lacking", "unknown", "told"):
        with pytest.raises(Refusal, match=rf"{folder} has a checkpoint that does not fit .*; delete it") as refused:
            trained(tmp_path / folder)
        assert "\n" not in str(refused.value)


def test_a_run_that_is_no_longer_held_saves_nothing(tmp_path: Path) -> None:
    """Another launcher goes on from what lies there: a paused one that wakes must not delete its later steps."""
    path = checkpoint.save(tmp_path, 99, {}, {})
    model: Any = train.make_model(config("dense1d"), 3, 5, 5)

    def interrupt(step: int, loss: float) -> None:
        if step == 10:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        _from_scratch(model, tmp_path, interrupt)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def _from_scratch(model: Any, folder: Path, report: Callable[[int, float], None]) -> None:
    """As a cell that began before the other one did."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "latest", lambda folder: None)
        train.fit(model, tokens(), lambda m: 0.0, config("dense1d"), folder, report, held=lambda: False)


def test_every_epoch_sees_every_image_once() -> None:
    order = torch.cat([train.batch_indices(0, step, 8, 20) for step in range(5)])
    assert sorted(order[:20].tolist()) == list(range(20))
    assert sorted(order[20:].tolist()) == list(range(20))
    assert order[:20].tolist() != order[20:].tolist()


@pytest.mark.promise("resume")
def test_order_depends_on_nothing_but_seed_and_step() -> None:
    code = "from attnbench import train; print(train.batch_indices(3, 5, 8, 20).tolist())"
    lines = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert lines == {str(train.batch_indices(3, 5, 8, 20).tolist()) + "\n"}
    assert not torch.equal(train.batch_indices(3, 5, 8, 20), train.batch_indices(4, 5, 8, 20))


def test_learning_rate_rises_then_falls_to_zero() -> None:
    settings = config("dense1d").train
    rates = [train.learning_rate(step, settings) for step in range(settings.steps + 1)]
    assert rates[0] == pytest.approx(settings.lr / 3)
    assert max(rates) == pytest.approx(settings.lr)
    assert rates[3] == settings.lr
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[0] < rates[1] < rates[2]
    assert rates[-1] == pytest.approx(0.0)


def test_accumulated_parts_give_the_whole_batch_gradient() -> None:
    losses = []
    for parts in (1, 4):
        settings = config("local2d", accumulate=parts)
        model: Any = train.make_model(settings, 3, 5, 5)
        torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
        optimiser = make_optimiser(model, settings)
        losses.append([float(train.train_step(model, optimiser, tokens()[:8], step, settings)) for step in range(6)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] != losses[0][-1]


def test_hidden_pixels_are_fifteen_percent_and_never_none() -> None:
    hidden = train.hidden_pixels((400, 8, 8), seed=0, step=3)
    assert abs(float(hidden.float().mean()) - train.HIDDEN_SHARE) < 0.01
    assert train.hidden_pixels((50, 1, 1), seed=0, step=0).all()


def test_divergence_is_named(tmp_path: Path) -> None:
    settings = config("dense1d")
    model: Any = train.make_model(settings, 3, 5, 5)
    torch.nn.init.constant_(model.head.weight, float("nan"))
    with pytest.raises(train.Diverged, match="nan at step 10"):
        train.fit(model, tokens(), lambda m: 0.0, settings, tmp_path)


@pytest.mark.parametrize(("batch", "accumulate", "most"), [(6, 2, 3), (4, 4, 1), (512, 1, 128)])
def test_what_is_not_trained_takes_no_more_images_at_a_time(batch: int, accumulate: int, most: int) -> None:
    config = RunConfig(device="cpu", train={"batch": batch, "accumulate": accumulate, "precision": "float32"})  # type: ignore[arg-type]
    model = models.build("dense1d", height=2, width=2, vocab=3, dim=4, depth=1, heads=1)
    seen: list[int] = []
    model.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))  # type: ignore[union-attr, index]
    tokens = torch.zeros(300, 2, 2, dtype=torch.int64)
    evaluate.likelihood(model, tokens, config)
    probe.pooled(model, tokens, config)
    assert max(seen) == most and sum(seen) == 600


def test_nor_does_a_process_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(train={"batch": 12})  # type: ignore[arg-type]
    monkeypatch.setattr(distributed, "size", lambda: 3)
    assert evaluate.chunk(config) == 4


def test_backends_are_settled_before_a_model_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first call a change of backend would compile it a second time, inside a timed turn."""
    log: list[Any] = []
    monkeypatch.setattr(kernels, "serves", lambda mixer, x: log.append((type(mixer).__name__, x.dtype, x.device.type)))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: log.append("compiled"))
    told = config("hybrid-local2d", compile=True, precision="bfloat16")
    train.make_model(told, 4, 4, 5)
    assert log == ["compiled"]
    train.make_model(told.model_copy(update={"device": "meta"}), 4, 4, 5)
    assert log[1:] == [("Local2D", torch.bfloat16, "meta"), ("Dense", torch.bfloat16, "meta"), "compiled"]
