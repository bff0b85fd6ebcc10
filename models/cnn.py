"""The CNNs of C1: a Gated PixelCNN, autoregressive, and a supervised ResNet, sized by the trunk's parameters.

Shapes: tokens (batch, height, width); activations (batch, width, rows, cols), `width` being a number of channels here;
features (batch, seq, width), seq = rows · cols.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .decoding import check_step
from .registry import positive, variant
from .whole import Whole, WholeModel, nearest

GATE_WIDTHS, HEAD_WIDTHS = (0.7, 1.0, 1.5), (0.5, 2.0, 4.0)
"""Width inside the horizontal stack's gate, and of the layer before the logits, in widths of the stream: least, wanted
and most. They are what is adjusted until the parameter count fits."""


class GatedLayer(nn.Module):
    """One layer of both stacks; neither reads a pixel that the raster has later.

    The vertical stack sees rows above only, the horizontal one the row so far and, through it, the rows above: no
    blind spot.  reach: how many rows up, columns left, and (in the rows above) columns right a layer looks.
    """

    def __init__(self, width: int, inner: int, kernel: int) -> None:
        super().__init__()
        self.reach = kernel // 2
        self.vertical = nn.Conv2d(width, 2 * width, (self.reach + 1, kernel))
        self.horizontal = nn.Conv2d(width, 2 * inner, (1, self.reach + 1))
        self.down = nn.Conv2d(2 * width, 2 * inner, 1)
        self.out = nn.Conv2d(inner, width, 1)

    def look_up(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (…, reach + rows, cols) -> the vertical stack's next rows, and what the horizontal stack is told."""
        seen = self.vertical(F.pad(rows, (self.reach, self.reach)))
        return rows[:, :, self.reach :] + gate(seen), self.down(seen)

    def look_left(self, cols: Tensor, told: Tensor) -> Tensor:
        """Columns (…, rows, reach + cols) -> the horizontal stack's next columns."""
        return cols[..., self.reach :] + self.out(gate(self.horizontal(cols) + told))

    def look_left_once(self, cols: Tensor, told: Tensor) -> Tensor:
        """The same for one pixel, (batch, width, reach + 1) and (batch, 2 · inner) -> (batch, width): a product of
        matrices, which is several times as fast as so small a convolution."""
        seen = F.linear(cols.flatten(1), self.horizontal.weight.flatten(1), self.horizontal.bias) + told
        return cols[..., -1] + F.linear(gate(seen), self.out.weight.flatten(1), self.out.bias)


def gate(x: Tensor) -> Tensor:
    """tanh of one half of the channels, weighed by σ of the other."""
    values, weights = x.chunk(2, dim=1)
    return values.tanh() * weights.sigmoid()


@dataclass
class State:
    """What decoding keeps: of each layer the rows and columns that it may still look at."""

    batch: int
    slot: int
    col: int
    row: Tensor  # (batch, width, 1, cols): the embedded pixels of this row, so far
    above: list[Tensor]  # a layer: (batch, width, reach, cols) of the vertical stack
    told: list[Tensor]  # a layer: (batch, 2 · inner, 1, cols), what this row is told of the rows above
    left: list[Tensor]  # a layer: (batch, width, reach) of the horizontal stack


@variant(
    "pixelcnn",
    family="cnn",
    time="O(n)",
    memory="O(n)",
    summary="Gated PixelCNN, blind-spot free, at a share of the trunk's parameters",
    reference="van den Oord et al., Conditional Image Generation with PixelCNN Decoders, NeurIPS 2016",
    position="none",
    objectives=("ar",),
)
class PixelCNN(WholeModel):
    """tokens int64 (batch, height, width) -> logits (batch, height, width, vocab), autoregressive in the raster.

    share: its parameters, as a part of the trunk's (within 2 %); table: whether the trunk's table of positions counts,
    with which it widens as images grow; kernel: side of the (halved) convolution, odd.  A pixel sees depth ·
    (kernel // 2) columns to either side in so many rows above and one more, and as many pixels of its own row and one
    more.  Against the paper: the vertical stack is residual too, and tokens are embedded.
    """

    def __init__(self, whole: Whole, *, share: float | str = 1.0, table: bool = True, kernel: int = 3) -> None:
        super().__init__(whole)
        if positive("kernel", kernel) < 3 or kernel % 2 == 0:
            raise ValueError(f"kernel must be an odd number of pixels, at least 3, not {kernel!r}")
        width, inner, hidden = _pixelcnn_widths(whole.budget(share, table), whole, kernel)
        self.depth, self.reach = whole.depth, kernel // 2
        self.tokens = nn.Parameter(torch.randn(whole.vocab, width))
        self.layers = nn.ModuleList(GatedLayer(width, inner, kernel) for _ in range(whole.depth))
        self.up = nn.Linear(width, hidden)
        self.head = nn.Linear(hidden, whole.vocab)
        nn.init.zeros_(self.head.weight)  # as the trunk's: the first loss is log vocab
        nn.init.zeros_(self.head.bias)

    def field(self) -> Tensor:
        """bool (seq, seq), target × pixel: which pixels each target's logits depend on."""
        row, col = self.scan.coordinates(torch.arange(self.scan.grid.size))
        rows, cols = row[:, None] - row, col[:, None] - col
        reach = self.depth * self.reach
        above = (rows >= 1) & (rows <= 1 + reach) & (cols.abs() <= reach)
        return above | ((rows == 0) & (cols >= 1) & (cols <= 1 + reach))

    def features(self, tokens: Tensor) -> list[Tensor]:
        """The horizontal stack's residual stream, depth + 1 tensors (batch, seq, width), the embedding first."""
        x = rearrange(self.tokens[tokens], "b h w d -> b d h w")
        above, across = F.pad(x, (0, 0, 1, 0))[:, :, :-1], F.pad(x, (1, 0))[..., :-1]  # one row down, one column right
        stream = [across]
        for layer in map(_gated, self.layers):
            above, told = layer.look_up(F.pad(above, (0, 0, self.reach, 0)))
            stream.append(layer.look_left(F.pad(stream[-1], (self.reach, 0)), told))
        return [rearrange(h, "b d h w -> b (h w) d") for h in stream]

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits of all pixels at once."""
        return self.read(self.features(tokens)[-1]).unflatten(1, tokens.shape[1:])

    def read(self, h: Tensor) -> Tensor:
        """(…, width) -> logits (…, vocab)."""
        return self.head(F.relu(self.up(F.relu(h))))

    def start(self, batch: int) -> State:
        """The state before the first pixel of `batch` images."""
        empty = self.tokens.new_zeros(batch, self.tokens.shape[1], 1, self.scan.grid.width)
        above = [empty.expand(-1, -1, self.reach, -1).contiguous() for _ in self.layers]
        return State(batch, 0, 0, empty, above, [empty for _ in self.layers], [empty for _ in self.layers])

    def step(self, pixel: Tensor | None, state: State) -> tuple[Tensor, State]:
        """The previous pixel along the raster, int64 (batch,), None at the first -> logits (batch, vocab) of the next.

        The vertical stack runs once a row, as soon as the row above is whole.  Raises ValueError for other pixels, and
        after the last.
        """
        check_step(pixel, state.slot, state.batch, self.scan.grid.size)
        across = state.row.new_zeros(state.batch, state.row.shape[1])
        if pixel is not None:
            embedded = self.tokens[pixel]
            # A whole row later this is the row above.
            state.row = torch.cat([state.row[..., 1:], embedded[:, :, None, None]], dim=-1)
            across = embedded if state.col else across
        if state.col == 0:
            self._begin_row(state)
        for index, layer in enumerate(map(_gated, self.layers)):
            cols = torch.cat([state.left[index], across[..., None]], dim=-1)
            state.left[index] = cols[..., 1:].contiguous()
            across = layer.look_left_once(cols, state.told[index][:, :, 0, state.col])
        state.slot, state.col = state.slot + 1, (state.col + 1) % state.row.shape[-1]
        return self.read(across), state

    def _begin_row(self, state: State) -> None:
        above = state.row
        for index, layer in enumerate(map(_gated, self.layers)):
            rows = torch.cat([state.above[index], above], dim=2)
            state.above[index] = rows[:, :, 1:].contiguous()
            above, state.told[index] = layer.look_up(rows)
            state.left[index] = above.new_zeros(state.batch, above.shape[1], self.reach)

    def flops(self) -> int:
        """Forward FLOPs of one image, borders counted as if they were inside."""
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Conv2d | nn.Linear))
        return 2 * weights * self.scan.grid.size


def _gated(layer: nn.Module) -> GatedLayer:
    return cast(GatedLayer, layer)


def _pixelcnn_widths(budget: float, whole: Whole, kernel: int) -> tuple[int, ...]:
    """Widths of the stream, inside the gate, and before the logits: of those that fit, the most usual."""
    sizes: dict[tuple[int, ...], int] = {}
    for width in range(1, int(budget**0.5) + 2):
        if sizes and _pixelcnn_parameters((width, 0, 0), whole, kernel) > 2 * budget:
            break  # none of that width or a greater one comes as near as one without parameters would
        at_gates = [_pixelcnn_parameters((width, inner, 2 * width), whole, kernel) for inner in (0, 1)]
        fitting = int((budget - at_gates[0]) / (at_gates[1] - at_gates[0]))
        for inner in {_within(fitting + more, width, GATE_WIDTHS) for more in (0, 1)} | {width}:
            at_heads = [_pixelcnn_parameters((width, inner, hidden), whole, kernel) for hidden in (0, 1)]
            hidden = _within(round((budget - at_heads[0]) / (at_heads[1] - at_heads[0])), width, HEAD_WIDTHS)
            sizes[width, inner, hidden] = _pixelcnn_parameters((width, inner, hidden), whole, kernel)
    return nearest(budget, sizes, unusual=lambda w: abs(w[1] / w[0] - 1) + 0.1 * abs(w[2] / w[0] - HEAD_WIDTHS[1]))


def _within(value: int, width: int, widths: tuple[float, float, float]) -> int:
    return min(max(value, round(widths[0] * width), 1), max(round(widths[2] * width), 1))


def _pixelcnn_parameters(widths: tuple[int, ...], whole: Whole, kernel: int) -> int:
    width, inner, hidden = widths
    rows = kernel // 2 + 1
    vertical = 2 * width * (rows * kernel * width + 1)
    horizontal = 2 * inner * (rows * width + 1) + 2 * inner * (2 * width + 1) + width * (inner + 1)
    head = hidden * (width + 1) + (hidden + 1) * whole.vocab
    return whole.vocab * width + whole.depth * (vertical + horizontal) + head


class Residual(nn.Module):
    """Two 3×3 convolutions, each normalised over the batch, around a shortcut (He et al., 2016)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)
        same = before == width and stride == 1
        self.shortcut = None if same else nn.Conv2d(before, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, before, rows, cols) -> (batch, width, rows / stride, cols / stride), rounded up."""
        straight = x if self.shortcut is None else self.shortcut(x)
        x = F.relu(self.first_norm(self.first(x)))
        return F.relu(straight + self.second_norm(self.second(x)))


@variant(
    "resnet",
    family="cnn",
    time="O(n)",
    memory="O(n)",
    summary="supervised ResNet on the pictures themselves: accuracy only",
    reference="He et al., Deep Residual Learning for Image Recognition, CVPR 2016",
    position="none",
    objectives=("supervised",),
)
class ResNet(WholeModel):
    """images float (batch, channels, height, width), -1 to 1, of any side -> logits (batch, classes).

    share: its parameters, as a part of the trunk's (within 2 %); table: whether the trunk's table of positions counts,
    with which it widens as images grow.  `depth` blocks over three stages, each stage half as high and wide as the one
    before and about twice as many channels; at least one block a stage.
    """

    STAGES = 3

    def __init__(self, whole: Whole, *, share: float | str = 1.0, table: bool = True) -> None:
        super().__init__(whole)
        self.channels, self.classes = whole.channels, whole.classes
        blocks = max(whole.depth, self.STAGES)
        counts = [blocks // self.STAGES + (stage < blocks % self.STAGES) for stage in range(self.STAGES)]
        widths = _resnet_widths(whole.budget(share, table), whole, counts)
        self.stem = nn.Conv2d(whole.channels, widths[0], 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(widths[0])
        self.stages = nn.ModuleList()
        before = widths[0]
        for stage, (width, count) in enumerate(zip(widths, counts, strict=True)):
            strides = [2 if stage else 1] + [1] * (count - 1)
            inputs = [before] + [width] * (count - 1)
            self.stages.append(nn.Sequential(*(Residual(i, width, s) for i, s in zip(inputs, strides, strict=True))))
            before = width
        self.head = nn.Linear(before, whole.classes)

    def forward(self, images: Tensor) -> Tensor:
        """The logits of the classes.  Raises ValueError for another number of dimensions or of channels."""
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(
                f"images of shape (batch, {self.channels}, height, width) wanted, not {tuple(images.shape)}"
            )
        x = F.relu(self.stem_norm(self.stem(images)))
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean(dim=(2, 3)))

    def flops(self) -> int:
        height, width = self.scan.grid.height, self.scan.grid.width
        total = 2 * self.stem.weight.numel() * height * width + 2 * self.head.weight.numel()
        for stage in self.stages:
            if stage is not self.stages[0]:
                height, width = -(-height // 2), -(-width // 2)
            weights = sum(m.weight.numel() for m in stage.modules() if isinstance(m, nn.Conv2d))
            total += 2 * weights * height * width
        return total


def _resnet_widths(budget: float, whole: Whole, counts: list[int]) -> tuple[int, ...]:
    """Channels of each stage: of those that fit, the nearest to 1 : 2 : 4."""
    sizes: dict[tuple[int, ...], int] = {}
    for width in range(1, int(budget**0.5) + 2):
        near = product(
            [width], range(max(1, 2 * width - 2), 2 * width + 3), range(max(1, 4 * width - 4), 4 * width + 5)
        )
        found: dict[tuple[int, ...], int] = {w: _resnet_parameters(w, counts, whole) for w in near}
        if sizes and min(found.values()) > 1.1 * budget:
            break
        sizes |= found
    return nearest(budget, sizes, unusual=lambda w: abs(w[1] / (2 * w[0]) - 1) + abs(w[2] / (4 * w[0]) - 1))


def _resnet_parameters(widths: tuple[int, ...], counts: list[int], whole: Whole) -> int:
    total, before = 9 * whole.channels * widths[0] + 2 * widths[0], widths[0]
    for stage, (width, count) in enumerate(zip(widths, counts, strict=True)):
        shortcut = before * width if stage or before != width else 0
        total += 9 * before * width + 9 * width**2 * (2 * count - 1) + 4 * width * count + shortcut
        before = width
    return total + before * whole.classes + whole.classes
