"""What each process of tests/test_distributed.py does: `torchrun --nproc-per-node N -m tests.ranks JOB.json`.

A job is a list of [kind, folder, RunConfig]; "gradients" trains a step, "fit" the whole run. The first process leaves
the results in the folder. `main` is also called without torchrun, for what one process gets.
"""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from attnbench import distributed, evaluate, train
from attnbench.config import RunConfig, TrainConfig
from attnbench.optimiser import make_optimiser

HEIGHT, WIDTH, VOCAB, COUNT = 3, 5, 5, 40


def images() -> Tensor:
    """int64 (COUNT, HEIGHT, WIDTH)"""
    return torch.randint(VOCAB, (COUNT, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(0))


def model_of(config: RunConfig) -> nn.Module:
    """The model with a head that is not zero, so that every weight has a gradient at once."""
    model = train.make_model(config, HEIGHT, WIDTH, VOCAB)
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr, arg-type]
    return model


def gradients(config: RunConfig, folder: Path) -> None:
    """Leaves the gradients of a batch, with its loss, as gradients.safetensors.

    In float64: in float32 ssd's and deltanet's are known to 1e-4, whatever the number of processes.
    """
    model = model_of(config).double()
    trained = distributed.spread(model, config.parallel)
    optimiser = make_optimiser(model, config)
    mine = images()[: config.train.batch][distributed.share(config.train.batch)]
    loss = train.train_step(trained, optimiser, mine, 3, config)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = distributed.gathered(found | {"loss": distributed.total(loss)})
    if distributed.first():
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in whole.items()}, folder / "gradients.safetensors")


def fit(config: RunConfig, folder: Path, stop: int | None = None) -> None:
    """Leaves progress.json and the best weights as weights.safetensors; with `stop`, Ctrl-C comes to the last process
    in that step, and nothing is left but a checkpoint."""
    model = model_of(config)
    held_out = images()[:17]  # on two processes five chunks of 4: no even share

    def validate(trained: nn.Module) -> float:
        return evaluate.likelihood(trained, held_out, config).nats_per_token

    if stop is not None and distributed.rank() == distributed.size() - 1:
        _interrupt_at(stop)
    try:
        progress = train.fit(model, images(), validate, config, folder / "checkpoints")
    except KeyboardInterrupt:
        return
    weights = distributed.gathered(model.state_dict())
    if distributed.first():
        (folder / "progress.json").write_text(json.dumps(asdict(progress)))
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "weights.safetensors")


def _interrupt_at(last: int) -> None:
    """Ctrl-C in the middle of that step, once."""
    real = train.learning_rate

    def learning_rate(step: int, config: TrainConfig) -> float:
        if step == last:
            train.learning_rate = real
            signal.raise_signal(signal.SIGINT)
        return real(step, config)

    train.learning_rate = learning_rate


JOBS = {"gradients": gradients, "fit": fit}


def main(jobs: list[Any]) -> None:
    torch.set_num_threads(1)
    for kind, folder, told, *more in jobs:
        JOBS[kind](RunConfig.model_validate(told), Path(folder), *more)


if __name__ == "__main__":
    listed = json.loads(Path(sys.argv[1]).read_text())
    with distributed.world(RunConfig.model_validate(listed[0][2])):
        main(listed)
