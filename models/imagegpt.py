"""Others' weights: a Hugging Face ImageGPT folder (config.json and safetensors) read into the trunk.

What differs there, and is accounted for: Conv1D layers hold (in, out) matrices and biases; the start token is the last
of the vocabulary; scores may be scaled otherwise, which goes into the queries' weights.  Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .igpt import Block, ImageGPT
from .position import Learned1D

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ROOT, HEAD = "transformer.", "lm_head.weight"
DEEPEST = 10_000
"""Layers; a config.json with more is broken, and would be slow to find broken."""
MASKS = (".attn.bias", ".attn.masked_bias")
"""Buffers of older folders: the causal mask, which the trunk has itself."""


@dataclass(frozen=True)
class Settings:
    """What config.json says of the shape and the scores, under its own names and with its own defaults."""

    vocab_size: int = 513
    n_positions: int = 1024
    n_embd: int = 512
    n_layer: int = 24
    n_head: int = 8
    n_inner: int | None = None
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False

    @property
    def inner(self) -> int:
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    def query_scale(self, layer: int) -> float:
        """Their scale of the scores over the trunk's, 1/√head_dim."""
        scale = 1.0 if self.scale_attn_weights else math.sqrt(self.n_embd // self.n_head)
        return scale / (layer + 1 if self.scale_attn_by_inverse_layer_idx else 1)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the folder must have, without biases."""
        dim = self.n_embd
        found: dict[str, tuple[int, ...]] = {
            ROOT + "wte.weight": (self.vocab_size, dim), ROOT + "wpe.weight": (self.n_positions, dim),
            ROOT + "ln_f.weight": (dim,), HEAD: (self.vocab_size - 1, dim),
        }  # fmt: skip
        for layer in range(self.n_layer):
            block = f"{ROOT}h.{layer}."
            found |= {block + "ln_1.weight": (dim,), block + "ln_2.weight": (dim,)}
            found |= {block + "attn.c_attn.weight": (dim, 3 * dim), block + "attn.c_proj.weight": (dim, dim)}
            found |= {block + "mlp.c_fc.weight": (dim, self.inner), block + "mlp.c_proj.weight": (self.inner, dim)}
        return found


@dataclass(frozen=True)
class Folder:
    """A folder whose settings and tensors' names and shapes were found to fit; a tensor is read when asked for."""

    settings: Settings
    files: dict[str, Path]

    def read(self, name: str) -> Tensor:
        """The tensor of that name.  Raises ValueError where its file is damaged."""
        with _open(self.files[name]) as file:
            return cast(Tensor, file.get_tensor(name))

    def linear(self, name: str, scale_queries: float = 1.0) -> nn.Linear:
        """The Conv1D layer of that name as a Linear; without a bias where all of it is zero."""
        weight = self.read(f"{name}.weight").float().T.contiguous()
        bias = self.read(f"{name}.bias").float() if f"{name}.bias" in self.files else torch.zeros(len(weight))
        if scale_queries != 1.0:  # the first third of a packed q, k, v
            weight[: len(weight) // 3] *= scale_queries
            bias[: len(bias) // 3] *= scale_queries
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bool(bias.any()), device="meta")
        layer.weight = nn.Parameter(weight)
        if layer.bias is not None:
            layer.bias = nn.Parameter(bias)
        return layer


def read(folder: Path) -> Folder:
    """The folder's settings and what its files hold.

    Raises ValueError, in a line, for a folder that is no such thing, a setting that the trunk cannot follow, a file
    that is missing or damaged, and tensors that are missing, unknown or of another shape.
    """
    settings = _settings(folder)
    files = _files(folder)
    if HEAD not in files:
        raise ValueError(f"{folder} has no {HEAD}, and so no logits; save the ImageGPTForCausalImageModeling")
    shapes = settings.shapes()
    if missing := sorted(shapes.keys() - files.keys()):
        raise ValueError(f"{folder} lacks {missing[0]} and {len(missing) - 1} more of what its config.json asks for")
    biases = {name.removesuffix("weight") + "bias": shape[-1:] for name, shape in shapes.items() if ".c_" in name}
    wanted = shapes | {name: shape for name, shape in biases.items() if name in files}
    if unknown := sorted(name for name in files.keys() - wanted.keys() if not name.endswith(MASKS)):
        raise ValueError(f"{folder} has {unknown[0]} and {len(unknown) - 1} more that the trunk has no place for")
    for path in sorted(set(files.values())):
        with _open(path) as file:
            for name in (name for name in wanted if files[name] == path):
                if (shape := tuple(file.get_slice(name).get_shape())) != wanted[name]:
                    raise ValueError(f"{path}: {name} is {shape}, but config.json asks for {wanted[name]}")
    return Folder(settings, files)


@torch.no_grad()
def install(folder: Folder, model: ImageGPT) -> None:
    """Puts the weights into a trunk of that shape, with position "learned1d"; the first rows of a longer table."""
    settings = folder.settings
    table = folder.read(ROOT + "wte.weight")
    assert model.start_token is not None and isinstance(model.position, Learned1D)
    model.tokens.copy_(table[:-1])
    model.start_token.copy_(table[-1])
    model.position.table.copy_(folder.read(ROOT + "wpe.weight")[: model.scan.grid.size])
    model.norm.gain.copy_(folder.read(ROOT + "ln_f.weight"))
    model.norm.eps = settings.layer_norm_epsilon
    model.head.weight.copy_(folder.read(HEAD))
    for layer, block in enumerate(cast("list[Block]", list(model.blocks))):
        name = f"{ROOT}h.{layer}."
        for norm, theirs in ((block.attention_norm, "ln_1"), (block.mlp_norm, "ln_2")):
            norm.gain.copy_(folder.read(f"{name}{theirs}.weight"))
            norm.eps = settings.layer_norm_epsilon
        block.attention.qkv = folder.linear(name + "attn.c_attn", settings.query_scale(layer))
        block.attention.out = folder.linear(name + "attn.c_proj")
        block.mlp.up, block.mlp.down = folder.linear(name + "mlp.c_fc"), folder.linear(name + "mlp.c_proj")


def grid(settings: Settings, height: int | None = None, width: int | None = None) -> tuple[int, int]:
    """Height and width of the pictures: a square of all positions unless told.  Raises ValueError."""
    side = math.isqrt(settings.n_positions)
    if height is None and width is None:
        if side * side != settings.n_positions:
            raise ValueError(f"{settings.n_positions} positions are no square; name height and width")
        return side, side
    if height is None or width is None:
        raise ValueError("name both height and width, or neither")
    if height * width > settings.n_positions:
        raise ValueError(f"{height}×{width} pixels are more than the {settings.n_positions} positions there are")
    return height, width


def _settings(folder: Path) -> Settings:
    told = _json(folder / "config.json")
    reasons = list(_refusals(told))
    types: dict[str, tuple[type, ...]] = {"n_inner": (int, type(None)), "layer_norm_epsilon": (int, float)}
    given: dict[str, Any] = {}
    for field in fields(Settings):
        value = given[field.name] = told.get(field.name, field.default)
        kinds = types.get(field.name, (type(field.default),))
        if type(value) not in kinds or (type(value) in (int, float) and not 0 < value < 1e9):
            reasons.append(f"{field.name} is {value!r}")
    if not reasons and (given["n_embd"] % given["n_head"] or given["vocab_size"] < 2 or given["n_layer"] > DEEPEST):
        reasons.append("n_head must divide n_embd, vocab_size be 2 or more, n_layer be sensible")
    if reasons:
        raise ValueError(f"{folder / 'config.json'} cannot be followed: {'; '.join(reasons)}")
    return Settings(**given)


def _refusals(told: dict[str, Any]) -> Iterator[str]:
    """What the trunk cannot do."""
    if (kind := told.get("model_type")) != "imagegpt":
        yield f"model_type is {kind!r}, not 'imagegpt'"
    if (activation := told.get("activation_function", "quick_gelu")) != "quick_gelu":
        yield f"activation_function is {activation!r}, and the trunk has quick_gelu, x·σ(1.702x), only"
    if told.get("add_cross_attention", False):
        yield "add_cross_attention: the trunk attends to the picture only"
    if told.get("tie_word_embeddings", False):
        yield "tie_word_embeddings: the head would predict the start token too"


def _files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor, by its name with the root in front."""
    if (single := folder / SINGLE).is_file():
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)
    if not (folder / INDEX).is_file():
        pickled = " (pickled weights are never read; convert them)" if list(folder.glob("*.bin")) else ""
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}{pickled}")
    places = _json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(p, str) and p == Path(p).name for p in places.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map of files in its folder")
    found = {str(name): folder / place for name, place in places.items()}
    for path in sorted(set(found.values())):
        with _open(path) as file:
            if absent := sorted({name for name, place in found.items() if place == path} - set(file.keys())):
                raise ValueError(f"{path} lacks {absent[0]}, which {INDEX} promises")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); name a folder of save_pretrained's") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON") from error
    if not isinstance(told, dict):
        raise ValueError(f"{path} is no JSON object")
    return told


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path} is missing, cut short or no safetensors file: {reason}") from error
