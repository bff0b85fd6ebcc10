"""One run on many processes: `torchrun --nproc-per-node N -m attnbench.run …`, each with its share of every batch.

All processes walk through the whole run; the first alone writes and prints. With "ddp" each holds the whole model, with
"fsdp" (FSDP2) a share of every weight, gradient and moment, gathered a block at a time. Checkpoints and weights are the
same files as those of a single process, so a run resumes on any number of them.

Without a process group every function here is that of a world of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from attnbench.config import RunConfig
from attnbench.errors import Refusal

PATIENCE = timedelta(minutes=5)
"""How long a process waits for the others to come."""

TOLD = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells a process of its world."""

Plain = TypeVar("Plain")


def rank() -> int:
    """This process's number, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


# --- the world, told and found ----------------------------------------------------------------------------------------


def resolve(parallel: str) -> str:
    """What "auto" means, decided by what the environment says: ddp among several processes, none alone."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return parallel if parallel != "auto" else "none" if alone else "ddp"


@contextmanager
def world(config: RunConfig) -> Iterator[None]:
    """The process group of a resolved run, for as long as it lasts; nothing where a process is alone.

    Raises Refusal where the world that the environment tells of is not the one that is there.
    """
    told = _told(config)
    if told is None:
        yield
        return
    if config.device == "cuda":
        torch.cuda.set_device(told["LOCAL_RANK"])
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if config.device == "cuda" else "gloo", timeout=PATIENCE)
    except (dist.DistError, RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0][:120]
        raise Refusal(f"the {told['WORLD_SIZE']} processes told of did not all meet at {place}: {why}") from error
    try:
        _agree(config, told)
        yield
    finally:
        dist.destroy_process_group()


def _told(config: RunConfig) -> dict[str, int] | None:
    """What torchrun told, None where it was not torchrun that started this.  Raises Refusal on what cannot be true."""
    given = {name: os.environ[name] for name in TOLD if os.environ.get(name)}
    if "WORLD_SIZE" not in given:
        step = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("OMPI_COMM_WORLD_SIZE") or "1"
        if step != "1":
            raise Refusal(f"{step} processes were started that know nothing of each other; let torchrun start them")
        if config.parallel != "none":
            raise Refusal(f"parallel {config.parallel} needs torchrun --nproc-per-node N -m attnbench.run …")
        return None
    if missing := [name for name in TOLD if name not in given]:
        raise Refusal(
            f"WORLD_SIZE is set but not {', '.join(missing)}; unset it, or start with torchrun, which sets all"
        )
    try:
        told = {name: int(text) for name, text in given.items() if name != "MASTER_ADDR"}
    except ValueError as error:
        raise Refusal(f"of the world only whole numbers can be told: {error}; start with torchrun") from error
    _possible(config, told)
    return told


def _possible(config: RunConfig, told: dict[str, int]) -> None:
    processes, local, parts = told["WORLD_SIZE"], told["LOCAL_WORLD_SIZE"], config.train.accumulate
    if not 0 <= told["RANK"] < processes:
        raise Refusal(
            f"RANK {told['RANK']} is not one of WORLD_SIZE {processes}; start with torchrun, which numbers them"
        )
    if not 0 <= told["LOCAL_RANK"] < local <= processes:
        raise Refusal(f"LOCAL_RANK {told['LOCAL_RANK']} of LOCAL_WORLD_SIZE {local} cannot be; start with torchrun")
    if processes > 1 and config.parallel == "none":
        raise Refusal(f"parallel none, but there are {processes} processes, which would all do the same; drop torchrun")
    if config.device == "cuda" and local > torch.cuda.device_count():
        raise Refusal(
            f"{local} processes but {torch.cuda.device_count()} GPUs on this machine; lower --nproc-per-node to that"
        )
    if config.train.batch % (processes * parts):
        raise Refusal(
            f"batch {config.train.batch} cannot be shared by {processes} processes in {parts} equal parts each; "
            f"choose a multiple of {processes * parts}"
        )


def _agree(config: RunConfig, told: dict[str, int]) -> None:
    """Every process counts, and all mean the same run with the same torch.  Raises Refusal."""
    meant = json.dumps([config.identity(), config.code, config.parallel, torch.__version__], sort_keys=True)
    mark = int.from_bytes(hashlib.sha256(meant.encode()).digest()[:7], "little")
    marks = torch.zeros(size(), dtype=torch.int64)
    marks[rank()] = mark
    marks, present = total(marks), int(total(torch.ones(())))
    if present != told["WORLD_SIZE"] or size() != told["WORLD_SIZE"]:
        raise Refusal(f"WORLD_SIZE is {told['WORLD_SIZE']}, but {present} processes are there; start with torchrun")
    if strangers := [other for other in range(size()) if marks[other] != marks[0]]:
        raise Refusal(f"process {strangers[0]} has other settings or another torch than process 0; start all alike")


# --- shares and sums --------------------------------------------------------------------------------------------------


def share(count: int) -> slice:
    """Which of `count` things, a multiple of the number of processes, are this one's."""
    each = count // size()
    return slice(rank() * each, (rank() + 1) * each)


def total(value: Tensor) -> Tensor:
    """The sum over all processes, where the value was."""
    if size() == 1:
        return value
    summed = value.detach().clone()
    dist.all_reduce(summed)
    return summed


def anywhere(happened: bool) -> bool:
    """Whether it happened in any of the processes."""
    return happened if size() == 1 else bool(total(torch.tensor(float(happened))))


def tell(plain: Plain) -> Plain:
    """What the first process has, which JSON must be able to hold."""
    if size() == 1:
        return plain
    data = torch.tensor(list(json.dumps(plain).encode()) if first() else [], dtype=torch.uint8)
    length = int(total(torch.tensor(len(data))))
    if not first():
        data = torch.empty(length, dtype=torch.uint8)
    dist.broadcast(data, 0)
    return json.loads(bytes(data.tolist()))  # type: ignore[no-any-return]


def shared_out(parts: Sequence[slice], work: Callable[[slice], Tensor], out: Tensor) -> Tensor:
    """`out` of zeros with out[part] = work(part) for every part, the work shared out among the processes.

    All work equally often, the last part again where there is none left: a sharded model needs them all at every pass.
    """
    for turn in range(-(-len(parts) // size())):
        index = turn * size() + rank()
        done = work(parts[min(index, len(parts) - 1)])
        if index < len(parts):
            out[parts[index]] = done
    return total(out)


# --- models in shares -------------------------------------------------------------------------------------------------


def spread(model: nn.Module, parallel: str) -> nn.Module:
    """What trains `model`: itself, DDP around it, or itself with its weights in shares.

    Called before the optimiser is made.  Raises Refusal for a model that mixes the images of a batch.
    """
    if size() > 1 and any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        raise Refusal("this model normalises over the whole batch, which only one process sees; drop torchrun")
    if parallel == "ddp":
        # Buffers never change, so only gradients travel; torch 2.13 renamed what says so.
        known = signature(DistributedDataParallel).parameters
        still = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return DistributedDataParallel(model, gradient_as_bucket_view=True, **{still: False})  # type: ignore[arg-type]
    if parallel == "fsdp":
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(.*\) returned a view")  # nothing is changed in place
        mesh = init_device_mesh(next(model.parameters()).device.type, (size(),))
        parts = [*getattr(model, "blocks", ()), model]
        for part in parts:
            # The trunk's own weights stay whole until the backward pass: one of its methods may call another.
            fully_shard(part, mesh=mesh, reshard_after_forward=part is not model)
            for method in ("features", "start", "step"):
                if hasattr(part, method):
                    register_fsdp_forward_method(part, method)
    elif size() > 1:
        raise ValueError(f"parallel {parallel!r} in a world of {size()}: each process would train alone")
    return model


def synchronising(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Gradients meet only after the last of a step's parts; before, each process sums up its own."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU in the first process, one after the other; nothing in the others."""
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if first():
            whole[name] = full.detach().cpu()
    return whole


def scattered(tensors: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first process's whole tensors as all processes keep them: in shares where that name's in `like` is."""
    if size() == 1 and not any(isinstance(tensor, DTensor) for tensor in like.values()):
        return tensors
    kept = {}
    for name, known in like.items():
        whole = (tensors[name] if first() else torch.empty(known.shape)).to(known.device, known.dtype)
        dist.broadcast(whole, 0)
        if isinstance(known, DTensor):
            whole = distribute_tensor(whole, known.device_mesh, known.placements, src_data_rank=None)
        kept[name] = whole
    return kept


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


class Interrupt:
    """Ctrl-C, noted and not acted upon, so that a step is never left half done and all processes stop at the same one.

    A second Ctrl-C ends a lone process at once; of several, torchrun ends those that take too long.
    """

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> Interrupt:
        self.before: Any = None
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def _note(self, number: int, frame: object) -> None:
        if self.came and size() == 1:
            raise SystemExit(130)
        self.came = True

    def check(self) -> None:
        """Between two steps.  Raises KeyboardInterrupt in all processes if Ctrl-C came to one."""
        if anywhere(self.came):
            raise KeyboardInterrupt
