"""Others' weights: logits as the original's, and a folder that is broken or of another kind refused in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch.testing import assert_close

import models
from attnbench import probe
from attnbench.config import RunConfig

Weights = dict[str, NDArray[np.float32]]
CONFIG: dict[str, Any] = {
    "model_type": "imagegpt", "vocab_size": 8, "n_positions": 16, "n_embd": 12, "n_layer": 3, "n_head": 3,
}  # fmt: skip
SETTINGS: list[dict[str, Any]] = [
    {},
    {"n_inner": 20},
    {"n_inner": 70},
    {"scale_attn_by_inverse_layer_idx": True},
    {"reorder_and_upcast_attn": True},
    {"scale_attn_weights": False},
    {"scale_attn_weights": False, "reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    {"layer_norm_epsilon": 0.05},
    {"n_head": 1, "vocab_size": 513, "n_positions": 9},
]


def random_weights(config: dict[str, Any], biases: bool, seed: int = 0) -> Weights:
    """Every tensor of such a folder, large enough that every setting matters."""
    random = np.random.default_rng(seed)
    dim, inner = config["n_embd"], config.get("n_inner") or 4 * config["n_embd"]
    shapes = {
        "wte.weight": (config["vocab_size"], dim),
        "wpe.weight": (config["n_positions"], dim),
        "ln_f.weight": (dim,),
    }
    for layer in range(config["n_layer"]):
        for name, shape in (
            ("ln_1", (dim,)), ("ln_2", (dim,)), ("attn.c_attn", (dim, 3 * dim)), ("attn.c_proj", (dim, dim)),
            ("mlp.c_fc", (dim, inner)), ("mlp.c_proj", (inner, dim)),
        ):  # fmt: skip
            shapes[f"h.{layer}.{name}.weight"] = shape
            if ".c_" in name:
                shapes[f"h.{layer}.{name}.bias"] = shape[-1:]
    shapes = {f"transformer.{name}": shape for name, shape in shapes.items()}
    shapes["lm_head.weight"] = (config["vocab_size"] - 1, dim)
    return {
        name: (0.5 * random.standard_normal(shape) * (biases or not name.endswith("bias"))).astype(np.float32)
        for name, shape in shapes.items()
    }


def write(folder: Path, config: dict[str, Any], weights: Weights) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def write_sharded(folder: Path, config: dict[str, Any], weights: Weights) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    places = {name: f"model-{index % 2 + 1:05d}-of-00002.safetensors" for index, name in enumerate(names)}
    for place in set(places.values()):
        save_file({name: weights[name] for name in names if places[name] == place}, folder / place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def forward(config: dict[str, Any], weights: Weights, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """ImageGPT written down once more, one picture (seq,) at a time, in float64: logits (seq, vocab - 1)."""
    w = {name.removeprefix("transformer."): value.astype(np.float64) for name, value in weights.items()}
    heads, eps = config["n_head"], config.get("layer_norm_epsilon", 1e-5)

    def norm(x: Any, name: str) -> Any:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"]

    def conv1d(x: Any, name: str) -> Any:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    inputs = np.concatenate([[config["vocab_size"] - 1], tokens[:-1]])
    x = w["wte.weight"][inputs] + w["wpe.weight"][: len(inputs)]
    for layer in range(config["n_layer"]):
        name = f"h.{layer}"
        q, k, v = np.split(conv1d(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn"), 3, axis=-1)
        mixed = []
        for q1, k1, v1 in zip(*(np.split(part, heads, axis=-1) for part in (q, k, v)), strict=True):
            scores = q1 @ k1.T
            if config.get("scale_attn_weights", True):
                scores /= math.sqrt(q1.shape[-1])
            if config.get("scale_attn_by_inverse_layer_idx", False):
                scores /= layer + 1
            scores = np.where(np.tri(len(scores), dtype=bool), scores, -np.inf)
            chances = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(chances / chances.sum(-1, keepdims=True) @ v1)
        x = x + conv1d(np.concatenate(mixed, -1), f"{name}.attn.c_proj")
        up = conv1d(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        x = x + conv1d(up / (1 + np.exp(-1.702 * up)), f"{name}.mlp.c_proj")
    return np.asarray(norm(x, "ln_f") @ w["lm_head.weight"].T)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("more", SETTINGS, ids=str)
def test_logits_are_those_of_the_definition(more: dict[str, Any], biases: bool, tmp_path: Path) -> None:
    config = CONFIG | more
    weights = random_weights(config, biases)
    model = models.load_imagegpt(write(tmp_path / "f", config, weights))
    side = math.isqrt(config["n_positions"])
    tokens = torch.randint(config["vocab_size"] - 1, (2, side, side), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens).flatten(1, 2)
    expected = np.stack([forward(config, weights, picture.flatten().numpy()) for picture in tokens])
    assert_close(logits.double(), torch.from_numpy(expected), rtol=0, atol=1e-4)
    shifted = forward(config, weights, tokens[0].flatten().roll(1).numpy())
    assert np.abs(shifted - expected[0]).max() > 0.1


@pytest.mark.parametrize("more", SETTINGS, ids=str)
def test_logits_are_those_of_transformers(more: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ImageGPTConfig(**{k: v for k, v in (CONFIG | more).items() if k != "model_type"})
    original = transformers.ImageGPTForCausalImageModeling(config).eval()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    shards: dict[str, Any] = {"max_shard_size": "5KB"} if "n_inner" in more else {}
    original.save_pretrained(tmp_path, **shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(shards)
    side = math.isqrt(config.n_positions)
    tokens = torch.randint(config.vocab_size - 1, (2, side, side))
    start = torch.full((2, 1), config.vocab_size - 1)
    with torch.no_grad():
        expected = original(input_ids=torch.cat([start, tokens.flatten(1)[:, :-1]], dim=1)).logits
        logits = models.load_imagegpt(tmp_path)(tokens).flatten(1, 2)
    assert_close(logits, expected, rtol=0, atol=1e-4)


def test_it_is_a_model_like_any(tmp_path: Path) -> None:
    """Decoding with biases equals the full pass; zero biases leave none; shards are one model."""
    weights = random_weights(CONFIG, biases=True)
    model = models.load_imagegpt(write(tmp_path / "one", CONFIG, weights)).double()
    tokens = torch.randint(7, (2, 4, 4))
    state, pixel, rows = model.start(2), None, []
    with torch.no_grad():
        for place in model.order:
            logits, state = model.step(pixel, state)
            rows.append(logits)
            pixel = tokens.flatten(1)[:, place]
        assert_close(torch.stack(rows, 1), model(tokens).flatten(1, 2), rtol=1e-10, atol=1e-10)
    sharded = models.load_imagegpt(write_sharded(tmp_path / "two", CONFIG, weights)).double()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), sharded.parameters(), strict=True))
    plain = models.load_imagegpt(write(tmp_path / "three", CONFIG, random_weights(CONFIG, biases=False)))
    assert not any(name.endswith("bias") for name, _ in plain.named_parameters())
    assert [x.shape for x in probe.pooled(plain, tokens, RunConfig(device="cpu"))] == [(2, 12)] * 4


def test_every_exact_mask_can_be_put_over_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "f", CONFIG, random_weights(CONFIG, biases=True))
    tokens = torch.randint(7, (2, 4, 4))
    with torch.no_grad():
        dense = models.load_imagegpt(folder)(tokens)
        wide = models.load_imagegpt(folder, variant="local2d", radius=4)(tokens)
        narrow = models.load_imagegpt(folder, variant="local2d", radius=1)(tokens)
        part = models.load_imagegpt(folder, height=2, width=3)(tokens[:, :2, :3])
    assert_close(wide, dense, rtol=0, atol=1e-5)
    assert (narrow - dense).abs().max() > 0.01
    assert part.shape == (2, 2, 3, 7)


def broken(name: str, folder: Path) -> None:
    """Breaks a sound folder in one way."""
    config, weights = dict(CONFIG), random_weights(CONFIG, biases=True)
    file = folder / "model.safetensors"
    match name:
        case "truncated":
            file.write_bytes(file.read_bytes()[:-100])
        case "empty":
            file.write_bytes(b"")
        case "pickled":
            file.rename(folder / "pytorch_model.bin")
        case "no config":
            (folder / "config.json").unlink()
        case "no json":
            (folder / "config.json").write_text("{")
        case "another shape":
            weights["transformer.h.1.mlp.c_fc.weight"] = np.zeros((12, 47), np.float32)
            save_file(weights, file)
        case "missing tensor":
            del weights["transformer.h.2.ln_2.weight"]
            save_file(weights, file)
        case "unknown tensor":
            save_file(weights | {"transformer.h.0.crossattention.c_attn.weight": np.zeros(3, np.float32)}, file)
        case "no head":
            del weights["lm_head.weight"]
            save_file(weights, file)
        case "shard missing":
            write_sharded(folder, config, weights)
            file.unlink()
            (folder / "model-00002-of-00002.safetensors").unlink()
        case "index leads outside":
            file.unlink()
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
        case _:
            key, value = name.split("=")
            write(folder, config | {key: json.loads(value)}, weights)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("truncated", "cut short"), ("empty", "cut short"), ("pickled", "never read"), ("no config", "cannot be read"),
        ("no json", "not JSON"), ("another shape", r"\(12, 47\).*\(12, 48\)"), ("missing tensor", "lacks"),
        ("unknown tensor", "no place"), ("no head", "lm_head"), ("shard missing", "00002-of-00002"),
        ("index leads outside", "weight_map"), ('activation_function="gelu"', "quick_gelu"),
        ("add_cross_attention=true", "add_cross_attention"), ("tie_word_embeddings=true", "start token"),
        ('model_type="gpt2"', "gpt2"), ("n_embd=15", "asks for"), ("n_head=5", "n_head"), ("n_layer=4", "lacks"),
        ("n_positions=15", "15"), ('n_embd="12"', "n_embd"), ("layer_norm_epsilon=-1", "layer_norm_epsilon"),
        ("n_layer=99999999", "n_layer"),
    ],
)  # fmt: skip
def test_a_broken_folder_is_refused_in_one_line(name: str, words: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "f", CONFIG, random_weights(CONFIG, biases=True))
    models.load_imagegpt(folder)
    broken(name, folder)
    with pytest.raises(ValueError, match=words) as refused:
        models.load_imagegpt(folder)
    assert "\n" not in str(refused.value)


def test_what_cannot_be_asked_of_it_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "f", CONFIG, random_weights(CONFIG, biases=False))
    for asked, words in (
        ({"variant": "linear"}, "softmax"), ({"variant": "local3d"}, "local2d"), ({"height": 5, "width": 4}, "16"),
        ({"height": 4}, "both"), ({"variant": "local2d", "window": 3}, "option"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            models.load_imagegpt(folder, **asked)  # type: ignore[arg-type]


def test_buffers_of_older_folders_are_passed_over(tmp_path: Path) -> None:
    weights = random_weights(CONFIG, biases=False)
    old = {f"transformer.h.{layer}.attn.bias": np.ones((1, 1, 16, 16), np.float32) for layer in range(3)}
    new = models.load_imagegpt(write(tmp_path / "new", CONFIG, weights))
    model = models.load_imagegpt(write(tmp_path / "old", CONFIG, weights | old))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), new.parameters(), strict=True))
