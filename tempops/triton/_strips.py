"""What the kernels share that look at a pixel's neighbours: how frames are cut into strips, how strips are read.

A strip is `V` adjacent pixels of a row. A program holds the columns of its strips as one block each, so that what is
found out about a column serves all the windows that it is in, and so that planar rows are read with wide loads.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl

from ._common import Clips, cdiv, fitting, frame_cut, power_of_two, wide


class Strips(NamedTuple):
    """Strips of `width` pixels; the last ones of a row may reach beyond it.

    Planar, a strip is 16 bytes if rows can be cut so, and a program has `block` strips in the order of memory, or equal
    parts of `channels`. In channels_last, a strip is four pixels, which share most of their neighbours, and a program
    has `channels` of strips `across` by `down`: about a square, as what is read by two programs comes from a cache that
    is further away, of 64 bytes of channels, two a thread.
    """

    width: int
    block: int
    channels: int
    across: int
    down: int
    programs: int  # of a clip, as are
    places: int  # those of the same channels
    warps: int

    def constants(self, *tensors: Clips) -> dict:
        cut = {"V": self.width, "CHANNELS": self.channels, "ACROSS": self.across, "DOWN": self.down}
        return {"W": int(tensors[0].W), **cut, **frame_cut(*tensors, block=self.block), "num_warps": self.warps}


def laid(x: Clips) -> tuple:
    """What kernels get of a tensor: pointer and strides. The pixels', like W, is a constant of theirs.

    That makes neighbours' addresses those of one element plus a constant, for the price of one kernel a width.
    """
    return *x.strides[:-1], int(x.sp)


def strips(x: Clips, by_channel: bool = False) -> Strips:
    """Strips for programs of eight warps, of which a thread has one, or two channels of one."""
    size, warps = x.tensor.element_size(), 8
    if x.channels_last:
        width, block, channels = power_of_two(x.W, 4), 2 * 32 * warps, power_of_two(x.C, 64 // size)
        columns = cdiv(x.W, width)
        while channels < x.C and block // channels >= 2 * columns * x.H:
            channels *= 2
        across = min(2, columns)
        down = cdiv(x.H, cdiv(x.H, block // channels // across))
        places = cdiv(columns, across) * cdiv(x.H, down)
        programs = cdiv(x.C, channels) * places
        return Strips(width, block, channels, across, down, programs, places, warps)
    width = math.gcd(x.W, 16 // size)
    if x.W % 2 and x.W < 8 and size < 8:
        width, warps = power_of_two(x.W, 8), 4  # all of a row; its pixels change threads, for which these wait
    columns = cdiv(x.W, width)
    block = 32 * warps * max(1, 2 // width)
    if not by_channel:
        programs = cdiv(x.C * x.H * columns, block)
        return Strips(width, block, 0, 1, 1, programs, programs, warps)
    of_plane = x.H * columns
    part = fitting(of_plane, block)
    channels, places = block // part, cdiv(of_plane, part)
    return Strips(width, block, channels, 1, 1, cdiv(x.C, channels) * places, places, warps)


@triton.jit
def strip(
    C, H, W: tl.constexpr, V: tl.constexpr, CHANNELS: tl.constexpr, ACROSS: tl.constexpr, DOWN: tl.constexpr,
    BLOCK: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """What a program has: row of programs, its place among those of its channels; channels, rows and first columns of
    its strips, and which of these exist.
    """
    e = tl.arange(0, BLOCK)
    columns: tl.constexpr = (W + V - 1) // V
    if CHANNELS_LAST:
        blocks, bands, bars = tl.cdiv(C, CHANNELS), tl.cdiv(columns, ACROSS), tl.cdiv(H, DOWN)
        c, spot = tl.program_id(0) % blocks * CHANNELS + e % CHANNELS, e // CHANNELS
        rest = tl.program_id(0) // blocks
        at = rest % (bands * bars)
        n = rest // (bands * bars)
        v, h = at % bands * ACROSS + spot % ACROSS, at // bands * DOWN + spot // ACROSS
        inside = (c < C) & (v < columns) & (h < H) & (spot < ACROSS * DOWN)
    elif CHANNELS > 0:
        blocks, places = tl.cdiv(C, CHANNELS), tl.cdiv(H * columns, BLOCK // CHANNELS)
        at = tl.program_id(0) % places
        rest = tl.program_id(0) // places
        n = rest // blocks
        c, i = rest % blocks * CHANNELS + e // (BLOCK // CHANNELS), at * (BLOCK // CHANNELS) + e % (BLOCK // CHANNELS)
        h, v = i // columns, i % columns
        inside = (c < C) & (h < H)
    else:
        blocks = tl.cdiv(C * H * columns, BLOCK)
        n, at = tl.program_id(0) // blocks, tl.program_id(0) % blocks
        i = at * BLOCK + e
        row, v = i // columns, i % columns
        c, h = row // H, row % H
        inside = i < C * H * columns
    return n.to(tl.int64), at, c, h, v * V, inside


@triton.jit
def sum_of_channels(sums, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """The sums [CHANNELS] of what all strips [BLOCK] have of a channel."""
    BLOCK: tl.constexpr = sums.shape[0]
    if CHANNELS_LAST:
        return tl.sum(tl.reshape(sums, [BLOCK // CHANNELS, CHANNELS]), 0)
    else:
        return tl.sum(tl.reshape(sums, [CHANNELS, BLOCK // CHANNELS]), 1)


@triton.jit
def start(
    n, c, h, w, x_n, x_c, x_p: tl.constexpr, H, W: tl.constexpr, DENSE: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """Where strips begin."""
    if CHANNELS_LAST:
        return n * x_n + (h * W + w).to(tl.int64) * x_p + c
    elif DENSE:
        return n * x_n + ((c * H + h) * W + w)
    else:
        return n * x_n + c.to(tl.int64) * x_c + h * W + w


@triton.jit
def columns_of(block, V: tl.constexpr):
    """The columns of a block [M, V], V blocks [M]: no data moves."""
    M: tl.constexpr = block.shape[0]
    parts = (block,)
    for level in tl.static_range(V.bit_length() - 1):
        evens, odds = (), ()
        for k in tl.static_range(1 << level):
            even, odd = tl.split(tl.reshape(parts[k], [M, V >> (level + 1), 2]))
            evens, odds = evens + (even,), odds + (odd,)
        parts = evens + odds
    columns = ()
    for k in tl.static_range(V):
        columns = columns + (tl.reshape(parts[k], [M]),)
    return columns


@triton.jit
def block_of(columns, V: tl.constexpr):
    """The block [M, V] of V columns [M]."""
    M: tl.constexpr = columns[0].shape[0]
    parts = columns
    for level in tl.static_range(V.bit_length() - 2, -1, -1):
        pairs = ()
        for k in tl.static_range(1 << level):
            pairs = pairs + (tl.reshape(tl.join(parts[k], parts[k + (1 << level)]), [M, V >> level]),)
        parts = pairs
    return parts[0]


@triton.jit
def read_strip(
    x, at, x_p: tl.constexpr, present, w,
    OTHER: tl.constexpr, REACH: tl.constexpr, W: tl.constexpr, V: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Columns -REACH .. V + REACH - 1 of the strips `at` elements from x, in the type computed with; OTHER where there
    are none. REACH <= 2.

    That offset is one number, so that addresses are made of few that threads keep.
    """
    left, middle, right = (), (), ()
    if CHANNELS_LAST or V == 1:
        for k in tl.static_range(V):
            mask = present & (w + k < W) if k > 0 and W % V > 0 else present
            middle = middle + (wide(tl.load(x + (at + k * x_p), mask=mask, other=OTHER)),)
        for k in tl.static_range(REACH):
            before, after = present & (w >= REACH - k), present & (w + V + k < W)
            left = left + (wide(tl.load(x + (at + (k - REACH) * x_p), mask=before, other=OTHER)),)
            right = right + (wide(tl.load(x + (at + (V + k) * x_p), mask=after, other=OTHER)),)
    elif W % V > 0:
        column = tl.arange(0, V)[None, :]
        block = wide(tl.load(x[:, None] + (at + column), mask=present[:, None] & (column < W), other=OTHER))
        middle = columns_of(block, V)
        for _ in tl.static_range(REACH):
            left = left + (tl.full([block.shape[0]], OTHER, block.dtype),)
        right = left
    else:
        block = wide(tl.load(x[:, None] + (at + tl.arange(0, V)[None, :]), mask=present[:, None], other=OTHER))
        middle = columns_of(block, V)
        before, after = present & (w > 0), present & (w + V < W)
        if REACH == 1:
            left = (wide(tl.load(x + (at - 1), mask=before, other=OTHER)),)
            right = (wide(tl.load(x + (at + V), mask=after, other=OTHER)),)
        if REACH == 2:
            pair = tl.arange(0, 2)[None, :]
            left = columns_of(wide(tl.load(x[:, None] + (at - 2 + pair), mask=before[:, None], other=OTHER)), 2)
            right = columns_of(wide(tl.load(x[:, None] + (at + V + pair), mask=after[:, None], other=OTHER)), 2)
    return left + middle + right


@triton.jit
def write_strip(
    y, at, y_p: tl.constexpr, columns, inside, w, W: tl.constexpr, V: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    if CHANNELS_LAST or V == 1:
        for k in tl.static_range(V):
            mask = inside & (w + k < W) if k > 0 and W % V > 0 else inside
            tl.store(y + (at + k * y_p), columns[k], mask=mask)
    else:
        column = tl.arange(0, V)[None, :]
        mask = inside[:, None] & (column < W) if W % V > 0 else inside[:, None]
        tl.store(y[:, None] + (at + column), block_of(columns, V), mask=mask)
