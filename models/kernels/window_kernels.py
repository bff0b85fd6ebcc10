# mypy: disable-error-code="no-untyped-def"
"""Local 2D attention for CUDA, in Triton: forward, the queries' gradients, the keys' and values'.

A program serves a patch of TALL × WIDE pixels of a head and goes through the rows of pixels around it, WIDE and a halo
of RADIUS on both sides at a time: products for the matrix units, of which about a tenth is visible; the rest costs less
than gathering would.  Nothing is laid out: keys and values are read where the projection wrote them, a slot after the
pixel's own.  Sums and weights are float32.

A launch's arguments: tensors (batch, heads, seq, dim), then of each the steps from image to image, head to head, slot
to slot; mass and agreement float32 (batch, heads, seq); start_dk, start_dv float32 (batch · heads, patches, dim);
scale: that of the scores, times log₂ e, because the machine knows 2^x alone.
DIM: dim, filled up; REACH: the columns read at a time, filled up; EXACT: the precision of products.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(-(1 << 30))
"""A place that is in no window."""


@triton.jit
def _patch(HEADS: tl.constexpr, height, width, TALL: tl.constexpr, WIDE: tl.constexpr):
    """Image, head, the first row and column of this program's patch, and the row and column of each of its pixels."""
    across = tl.cdiv(width, WIDE)
    patches = tl.cdiv(height, TALL) * across
    patch, head = tl.program_id(0) % patches, tl.program_id(0) // patches
    top, left, index = patch // across * TALL, patch % across * WIDE, tl.arange(0, TALL * WIDE)
    return (head // HEADS).to(tl.int64), head % HEADS, top, left, top + index // WIDE, left + index % WIDE


@triton.jit
def _rows(x, image, head, slot, seen, s_image, s_head, s_slot, dim: tl.constexpr, DIM: tl.constexpr):
    """(slots, DIM): what stands at these slots, zeros where not `seen` and beyond the head's channels."""
    channel = tl.arange(0, DIM)
    at = x + image * s_image + head * s_head + slot[:, None] * s_slot + channel[None, :]
    return tl.load(at, mask=seen[:, None] & (channel < dim)[None, :], other=0.0)


@triton.jit
def _put(x, value, image, head, slot, seen, s_image, s_head, s_slot, dim: tl.constexpr, DIM: tl.constexpr):
    channel = tl.arange(0, DIM)
    at = x + image * s_image + head * s_head + slot[:, None] * s_slot + channel[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=seen[:, None] & (channel < dim)[None, :])


@triton.jit
def _start(x, image, head, s_image, s_head, dim: tl.constexpr, DIM: tl.constexpr):
    """(DIM,) float32: what stands at the start token's slot."""
    channel = tl.arange(0, DIM)
    return tl.load(x + image * s_image + head * s_head + channel, mask=channel < dim, other=0.0).to(tl.float32)


@triton.jit
def _place(down, right, there, RADIUS: tl.constexpr):
    """Where a pixel lies in a query's window of 2 · RADIUS + 1 columns, row by row upwards: from 0 on what is earlier
    than the query, FAR where the column is outside the window or not `there`; a row further up is 2 · RADIUS + 1 more.

    down, right: how far the query is below the pixel, and right of it.
    """
    inside = (right >= -RADIUS) & (right <= RADIUS) & there
    return tl.where(inside, down * (2 * RADIUS + 1) + right - 1, FAR)


@triton.jit
def _visible(place, rows, RADIUS: tl.constexpr):
    """Whether a place is in the window and earlier, of whose rows above no more than `rows` exist: one comparison."""
    places = tl.maximum(tl.minimum(rows, RADIUS) * (2 * RADIUS + 1) + RADIUS, 0)
    return place.to(tl.uint32) < places.to(tl.uint32)


@triton.jit
def attend(
    q, k, v, out, mass, qi, qh, qs, ki, kh, ks, vi, vh, vs, oi, oh, os,
    height, width, scale, HEADS: tl.constexpr, RADIUS: tl.constexpr, dim: tl.constexpr, DIM: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr, REACH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Of a patch: its queries' outputs, and the logarithm of each one's mass."""
    image, head, top, left, row, col = _patch(HEADS, height, width, TALL, WIDE)
    slot, inside = row * width + col, (row < height) & (col < width)
    query = _rows(q, image, head, slot, inside, qi, qh, qs, dim, DIM)
    start_k, start_v = _start(k, image, head, ki, kh, dim, DIM), _start(v, image, head, vi, vh, dim, DIM)
    best = tl.sum(query.to(tl.float32) * start_k[None, :], 1) * scale
    total = tl.full((TALL * WIDE,), 1.0, tl.float32)
    sums = tl.zeros((TALL * WIDE, DIM), tl.float32) + start_v[None, :]
    key_col = left - RADIUS + tl.arange(0, REACH)
    in_row = (key_col >= 0) & (key_col < width)
    place = _place((row - top + RADIUS)[:, None], col[:, None] - key_col[None, :], in_row[None, :], RADIUS)
    for step in range(TALL + RADIUS):
        key_row = top - RADIUS + step
        pixel = key_row * width + key_col
        held = in_row & (pixel >= 0) & (pixel + 1 < height * width)
        key = _rows(k, image, head, pixel + 1, held, ki, kh, ks, dim, DIM)
        value = _rows(v, image, head, pixel + 1, held, vi, vh, vs, dim, DIM)
        scores = tl.dot(query, tl.trans(key), input_precision=EXACT)
        seen = _visible(place - step * (2 * RADIUS + 1), row[:, None], RADIUS)
        scores = tl.where(seen, scores, float("-inf"))
        more = tl.maximum(best, tl.max(scores, 1) * scale)
        weights, fade = tl.exp2(scores * scale - more[:, None]), tl.exp2(best - more)
        total = total * fade + tl.sum(weights, 1)
        sums = sums * fade[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=EXACT)
        best = more
    _put(out, sums / total[:, None], image, head, slot, inside, oi, oh, os, dim, DIM)
    tl.store(mass + (image * HEADS + head) * height * width + slot, best + tl.log2(total), mask=inside)


@triton.jit
def queries(
    q, k, v, out, grad, mass, dq, agreement, start_dk, start_dv,
    qi, qh, qs, ki, kh, ks, vi, vh, vs, oi, oh, os, gi, gh, gs, di, dh, ds,
    height, width, scale, HEADS: tl.constexpr, RADIUS: tl.constexpr, dim: tl.constexpr, DIM: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr, REACH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Of a patch: its queries' gradients, grad·out of each, and its part of the start token's gradients."""
    image, head, top, left, row, col = _patch(HEADS, height, width, TALL, WIDE)
    slot, inside = row * width + col, (row < height) & (col < width)
    query = _rows(q, image, head, slot, inside, qi, qh, qs, dim, DIM)
    given = _rows(grad, image, head, slot, inside, gi, gh, gs, dim, DIM)
    made = _rows(out, image, head, slot, inside, oi, oh, os, dim, DIM)
    number = (image * HEADS + head) * height * width + slot
    known = tl.load(mass + number, mask=inside, other=0.0)
    wide_given = given.to(tl.float32)
    agree = tl.sum(wide_given * made.to(tl.float32), 1)
    tl.store(agreement + number, agree, mask=inside)
    start_k, start_v = _start(k, image, head, ki, kh, dim, DIM), _start(v, image, head, vi, vh, dim, DIM)
    wide_query = query.to(tl.float32)
    weight = tl.exp2(tl.sum(wide_query * start_k[None, :], 1) * scale - known)
    weight = tl.where(inside, weight, 0.0)
    slope = weight * (tl.sum(wide_given * start_v[None, :], 1) - agree)
    channel = tl.arange(0, DIM)
    part = tl.program_id(0).to(tl.int64) * dim + channel
    tl.store(start_dk + part, tl.sum(slope[:, None] * wide_query, 0) * (LN2 * scale), mask=channel < dim)
    tl.store(start_dv + part, tl.sum(weight[:, None] * wide_given, 0), mask=channel < dim)
    sums = slope[:, None] * start_k[None, :]
    key_col = left - RADIUS + tl.arange(0, REACH)
    in_row = (key_col >= 0) & (key_col < width)
    place = _place((row - top + RADIUS)[:, None], col[:, None] - key_col[None, :], in_row[None, :], RADIUS)
    for step in range(TALL + RADIUS):
        key_row = top - RADIUS + step
        pixel = key_row * width + key_col
        held = in_row & (pixel >= 0) & (pixel + 1 < height * width)
        key = _rows(k, image, head, pixel + 1, held, ki, kh, ks, dim, DIM)
        value = _rows(v, image, head, pixel + 1, held, vi, vh, vs, dim, DIM)
        scores = tl.dot(query, tl.trans(key), input_precision=EXACT)
        seen = _visible(place - step * (2 * RADIUS + 1), row[:, None], RADIUS)
        weights = tl.exp2(tl.where(seen, scores * scale - known[:, None], float("-inf")))
        slopes = weights * (tl.dot(given, tl.trans(value), input_precision=EXACT) - agree[:, None])
        sums += tl.dot(slopes.to(key.dtype), key, input_precision=EXACT)
    _put(dq, sums * (LN2 * scale), image, head, slot, inside, di, dh, ds, dim, DIM)


@triton.jit
def _sum(parts, out, patches, dim: tl.constexpr, DIM: tl.constexpr, ROUNDS: tl.constexpr):
    """Of a head whose first program this is: the sum of all patches' parts, 64 at a time."""
    channel, first = tl.arange(0, DIM), parts + tl.program_id(0).to(tl.int64) * dim
    sums = tl.zeros((64, DIM), tl.float32)
    for step in range(ROUNDS):
        patch = step * 64 + tl.arange(0, 64)
        seen = (patch < patches)[:, None] & (channel < dim)[None, :]
        sums += tl.load(first + patch[:, None] * dim + channel[None, :], mask=seen, other=0.0)
    tl.store(out + channel, tl.sum(sums, 0).to(out.dtype.element_ty), mask=channel < dim)


@triton.jit
def keys(
    q, k, v, grad, mass, agreement, start_dk, start_dv, dk, dv,
    qi, qh, qs, ki, kh, ks, vi, vh, vs, gi, gh, gs, ei, eh, es, fi, fh, fs,
    height, width, scale, HEADS: tl.constexpr, RADIUS: tl.constexpr, dim: tl.constexpr, DIM: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr, REACH: tl.constexpr, EXACT: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """The gradients of the keys and values that hold a patch's pixels; a head's first program the start token's."""
    image, head, top, left, key_row, key_col = _patch(HEADS, height, width, TALL, WIDE)
    holder = key_row * width + key_col + 1
    held = (key_row < height) & (key_col < width) & (holder < height * width)
    key = _rows(k, image, head, holder, held, ki, kh, ks, dim, DIM)
    value = _rows(v, image, head, holder, held, vi, vh, vs, dim, DIM)
    sums_k, sums_v = tl.zeros((TALL * WIDE, DIM), tl.float32), tl.zeros((TALL * WIDE, DIM), tl.float32)
    col = left - RADIUS + tl.arange(0, REACH)
    in_row = (col >= 0) & (col < width)
    place = _place((top - key_row)[:, None], col[None, :] - key_col[:, None], in_row[None, :], RADIUS)
    for step in range(TALL + RADIUS):
        row = top + step
        slot = row * width + col
        inside = in_row & (slot < height * width)
        query = _rows(q, image, head, slot, inside, qi, qh, qs, dim, DIM)
        given = _rows(grad, image, head, slot, inside, gi, gh, gs, dim, DIM)
        number = (image * HEADS + head) * height * width + slot
        known = tl.load(mass + number, mask=inside, other=0.0)
        agree = tl.load(agreement + number, mask=inside, other=0.0)
        scores = tl.dot(key, tl.trans(query), input_precision=EXACT)  # (keys, queries)
        seen = _visible(place + step * (2 * RADIUS + 1), (height - 1 - key_row)[:, None], RADIUS)
        weights = tl.exp2(tl.where(seen, scores * scale - known[None, :], float("-inf")))
        sums_v += tl.dot(weights.to(given.dtype), given, input_precision=EXACT)
        slopes = weights * (tl.dot(value, tl.trans(given), input_precision=EXACT) - agree[None, :])
        sums_k += tl.dot(slopes.to(query.dtype), query, input_precision=EXACT)
    _put(dk, sums_k * (LN2 * scale), image, head, holder, held, ei, eh, es, dim, DIM)
    _put(dv, sums_v, image, head, holder, held, fi, fh, fs, dim, DIM)
    patches = tl.cdiv(height, TALL) * tl.cdiv(width, WIDE)
    if tl.program_id(0) % patches == 0:
        _sum(start_dk, dk + image * ei + head * eh, patches, dim, DIM, ROUNDS)
        _sum(start_dv, dv + image * fi + head * fh, patches, dim, DIM, ROUNDS)
