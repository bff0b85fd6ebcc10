"""Images to a real bit stream and back, by range coding (Martin, 1979; constriction, Bamler, 2022).

A likelihood is a claim about a code length. Here the claim is called in: the coder asks for one distribution a pixel,
given the pixels before it, and the decoder asks again with nothing but what it has decoded so far. Both take the same
step-by-step path, so their floats agree to the last bit; a full pass differs in rounding, and a decoder has none.
Encoder and decoder must therefore run on the same machine with the same threads and the same number of images.

Shapes: symbols int (count, length), each image's pixels in the order of the predictor; probabilities (count, colours).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from attnbench.errors import Refusal
from attnbench.residual import Residual
from attnbench.source import Source

Symbols = NDArray[np.int64]
Probabilities = NDArray[np.float64]

Predictor = Callable[[int], Generator[Probabilities, Symbols, None]]
"""Called with a count of images: yields the distribution of each image's next pixel, (count, colours), and is sent
that pixel, (count,)."""


@dataclass(frozen=True, eq=False)
class Coded:
    """A bit stream: 32-bit words, and the bits that the distributions claimed: -log2 p over all pixels."""

    words: NDArray[np.uint32]
    claimed_bits: float

    @property
    def bits(self) -> int:
        """The stream's real length."""
        return 32 * len(self.words)


def of_source(source: Source) -> Predictor:
    """The truth, in raster order."""

    def predict(count: int) -> Generator[Probabilities, Symbols, None]:
        images = np.zeros((count, source.height, source.width), dtype=np.int64)
        for row, col in np.ndindex(source.height, source.width):
            images[:, row, col] = yield source.conditional(images, row, col)

    return predict


def of_model(model: nn.Module) -> Predictor:
    """A trunk with objective "ar", in the order of its scan, by incremental decoding."""

    @torch.no_grad()
    def predict(count: int) -> Generator[Probabilities, Symbols, None]:
        model.eval()
        state, pixel = model.start(count), None  # type: ignore[operator]
        for _ in range(model.scan.grid.size):  # type: ignore[union-attr, arg-type]
            logits, state = model.step(pixel, state)  # type: ignore[operator]
            pixel = torch.from_numpy((yield logits.double().softmax(-1).cpu().numpy())).to(logits.device)

    return predict


def of_residual(residual: Residual, tokens: Symbols) -> Predictor:
    """The true channel values, (count, height · width · channels) in the order of an image's memory, of images whose
    palette tokens (count, height, width) the decoder has already."""

    def predict(count: int) -> Generator[Probabilities, Symbols, None]:
        for told in tokens.reshape(count, -1).T:
            for chances in residual.chances:
                yield chances[told]

    return predict


def encode(predictor: Predictor, symbols: Symbols) -> Coded:
    """All images (count, length) in one bit stream: pixel by pixel, and of each pixel image by image.

    Raises Refusal where constriction is not installed.
    """
    stream = _stream()
    coder, family = stream.queue.RangeEncoder(), stream.model.Categorical(perfect=False)
    predictions, claimed = predictor(len(symbols)), 0.0
    for t, chances in _told(predictions, symbols):
        coder.encode(symbols[:, t].astype(np.int32), family, chances)
        claimed -= float(np.log2(np.take_along_axis(chances, symbols[:, t, None], axis=1)).sum())
    return Coded(coder.get_compressed(), claimed)


def decode(predictor: Predictor, words: NDArray[np.uint32], count: int, length: int) -> Symbols:
    """The images (count, length) of a bit stream, from the stream and the predictor alone.

    Raises Refusal where constriction is not installed.
    """
    stream = _stream()
    coder, family = stream.queue.RangeDecoder(words), stream.model.Categorical(perfect=False)
    symbols = np.zeros((count, length), dtype=np.int64)
    for t, chances in _told(predictor(count), symbols):
        symbols[:, t] = coder.decode(family, chances)
    return symbols


def _told(
    predictions: Generator[Probabilities, Symbols, None], symbols: Symbols
) -> Generator[tuple[int, Probabilities], None, None]:
    """Each place with its distributions; the predictor is told a place's symbols once the caller is done with it."""
    for t in range(symbols.shape[1]):
        yield t, next(predictions) if t == 0 else predictions.send(symbols[:, t - 1])


def _stream() -> Any:
    """constriction's stream coders."""
    try:
        return import_module("constriction").stream
    except ImportError as error:
        raise Refusal("entropy coding needs constriction; pip install constriction") from error
