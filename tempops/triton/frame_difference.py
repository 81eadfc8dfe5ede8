"""frame_difference in Triton. What is pooled are differences, not frames: the difference of two means of frames that
are alike would lose digits.

Planar maps pooled by 2: a program walks the frames of some pairs of rows with the last frame in registers, reads whole
rows and adds up neighbours afterwards, so that all accesses are wide. Any other layout and window: a program has some
results of some lines, and reads all but the first and last frame twice, once from a cache. A line is a row of one
channel, or of all channels where these are adjacent. The threads of a program share large windows.

The backward makes a line of gradients and writes it to all rows of its windows.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    BLOCK,
    Clips,
    cdiv,
    clips,
    empty_like,
    entry,
    fitting,
    frame_cut,
    place,
    power_of_two,
    wide,
    wrap_triton,
)


@triton.jit
def difference_rows_kernel(y, y_n, y_c, x, x_n, x_c, F, C, W, height, columns, pixels, BLOCK: tl.constexpr):
    """Elements are those of rows of an even number of columns; two of each of two rows make one of `pixels` results."""
    n, i = place(C * height * columns, BLOCK)
    inside = i < C * height * columns
    row, column = i // columns, i % columns
    c, h = row // height, row % height
    x += n * x_n + c.to(tl.int64) * x_c + 2 * h * W + column
    before_0 = wide(tl.load(x, mask=inside, other=0))
    before_1 = wide(tl.load(x + W, mask=inside, other=0))
    first = tl.program_id(0) % tl.cdiv(C * height * columns, BLOCK) * (BLOCK // 2)
    o = first + tl.arange(0, BLOCK // 2)
    y += n * y_n + (o // pixels).to(tl.int64) * y_c + o % pixels
    for j in range(1, F):
        later = x + tl.cast(j, tl.int64) * C * x_c
        here_0 = wide(tl.load(later, mask=inside, other=0))
        here_1 = wide(tl.load(later + W, mask=inside, other=0))
        sums = tl.sum(tl.reshape((here_0 - before_0) + (here_1 - before_1), [BLOCK // 2, 2]), 1)
        tl.store(y + tl.cast(j - 1, tl.int64) * C * y_c, sums * 0.25, mask=o < C * pixels)
        before_0 = here_0
        before_1 = here_1


@triton.jit
def line_of(lines, channels, rows, length, CHANNELS_LAST: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """What a program has: map, lines, places in these, their channels, rows and columns; some lie beyond the map."""
    blocks, parts = tl.cdiv(lines, LINES), tl.cdiv(length, BLOCK)
    n, rest = (tl.program_id(0) // (blocks * parts)).to(tl.int64), tl.program_id(0) % (blocks * parts)
    line = (rest // parts * LINES + tl.arange(0, LINES))[:, None]
    e = (rest % parts * BLOCK + tl.arange(0, BLOCK))[None, :]
    if CHANNELS_LAST:
        return n, line, e, e % channels, line, e // channels
    else:
        return n, line, e, line // rows, line % rows, e


@triton.jit
def into(y, y_n, y_c, y_p, n, e, c, h, w, width, length, DENSE: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where results go: to the places of the line, where that is one piece of memory."""
    if CHANNELS_LAST and DENSE:
        return y + n * y_n + (h * length + e)
    else:
        return y + n * y_n + c.to(tl.int64) * y_c + (h * width + w).to(tl.int64) * y_p


@triton.jit
def difference_kernel(
    y, y_n, y_c, y_p, x, x_n, x_c, x_p, C, moving, W, height, width, lines, length,
    POOL: tl.constexpr, DENSE: tl.constexpr, CHANNELS_LAST: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
    SHARE: tl.constexpr,
):  # fmt: skip
    n, line, e, c, h, w = line_of(lines, moving, height, length, CHANNELS_LAST, LINES, BLOCK)
    inside = (line < lines) & (e < length)
    x += n * x_n + c.to(tl.int64) * x_c + (h * POOL * W + w * POOL).to(tl.int64) * x_p
    later = tl.cast(C, tl.int64) * x_c
    if SHARE == 1:
        total = tl.zeros([LINES, BLOCK], tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32)
        for a in range(POOL):
            for b in range(POOL):
                at = x + (a * W + b).to(tl.int64) * x_p
                total += wide(tl.load(at + later, mask=inside, other=0)) - wide(tl.load(at, mask=inside, other=0))
    else:
        sums = tl.zeros([LINES, BLOCK, SHARE], tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32)
        for first in range(0, POOL * POOL, SHARE):
            i = (first + tl.arange(0, SHARE))[None, None, :]
            at = x[:, :, None] + (i // POOL * W + i % POOL).to(tl.int64) * x_p
            mask = inside[:, :, None] & (i < POOL * POOL)
            sums += wide(tl.load(at + later, mask=mask, other=0)) - wide(tl.load(at, mask=mask, other=0))
        total = tl.sum(sums, 2)
    to = into(y, y_n, y_c, y_p, n, e, c, h, w, width, length, DENSE, CHANNELS_LAST)
    tl.store(to, total / (POOL * POOL), mask=inside)


@triton.jit
def gradient_kernel(
    dx, dx_n, dx_c, dx_p, dy, dy_n, dy_c, dy_p, C, all_channels, H, W, height, width, lines, length,
    POOL: tl.constexpr, DENSE: tl.constexpr, CHANNELS_LAST: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx_j = (dy_{j-1} - dy_j) / pool^2, the same for all pixels of a window; rows and columns left over get zero."""
    n, line, e, c, h, w = line_of(lines, all_channels, tl.cdiv(H, POOL), length, CHANNELS_LAST, LINES, BLOCK)
    inside = (line < lines) & (e < length)
    pooled = inside & (h < height) & (w // POOL < width)
    at = dy + n * dy_n + c.to(tl.int64) * dy_c + (h * width + w // POOL).to(tl.int64) * dy_p
    earlier = tl.load(at - tl.cast(C, tl.int64) * dy_c, mask=pooled & (c >= C), other=0)
    here = tl.load(at, mask=pooled & (c < all_channels - C), other=0)
    value = (wide(earlier) - wide(here)) / (POOL * POOL)
    to = into(dx, dx_n, dx_c, dx_p, n, e, c, h * POOL, w, W, length, DENSE, CHANNELS_LAST)
    for row in range(POOL):
        tl.store(to + tl.cast(row * W, tl.int64) * dx_p, value, mask=inside & (h * POOL + row < H))


def maps(x: Clips) -> tuple:
    """What a kernel gets of x: pointer, and strides of maps, channels and pixels."""
    return x.tensor, x.sn, x.sc, x.sp


def cut(x: Clips, rows: int, width: int, share: int = 1) -> tuple[int, tuple[int, int], dict]:
    """Programs of a map, lines and their length, and constants, for so many rows and columns of x's channels."""
    lines, length = (rows, width * x.C) if x.channels_last else (rows * x.C, width)
    block = fitting(length, BLOCK // share)
    constants = {**frame_cut(x, block=block), "LINES": BLOCK // share // block}
    return cdiv(lines, constants["LINES"]) * cdiv(length, block), (lines, length), constants


@entry
def frame_difference(x: Tensor, n_frames: int, pool: int) -> Tensor:
    x = clips(x, 1)
    C, height, width = x.C // n_frames, x.H // pool, x.W // pool
    moving = x.C - C
    y = empty_like(x, 1, C=moving, H=height, W=width)
    if y.tensor.numel() == 0:
        return y.tensor
    if pool == 2 and not x.channels_last:
        block = 2 * BLOCK if x.tensor.element_size() == 2 else BLOCK  # half as many results are 16 bytes a thread
        wrap_triton(difference_rows_kernel)[(x.N * cdiv(C * height * 2 * width, block),)](
            y.tensor, y.sn, y.sc, x.tensor, x.sn, x.sc, n_frames, C, x.W, height, 2 * width, y.P, BLOCK=block
        )
    else:
        share = power_of_two(pool * pool, 64) if pool > 3 else 1
        programs, sizes, constants = cut(y, height, width, share)
        wrap_triton(difference_kernel)[(x.N * programs,)](
            *maps(y), *maps(x), C, moving, x.W, height, width, *sizes, **constants, POOL=pool, SHARE=share
        )
    return y.tensor


@entry
def frame_difference_backward(grad: Tensor, n_frames: int, pool: int, height: int, width: int) -> Tensor:
    dy = clips(grad, 1)
    C = dy.C // (n_frames - 1)
    dx = empty_like(dy, 1, C=C * n_frames, H=height, W=width)
    if dx.tensor.numel() == 0:
        return dx.tensor
    if dy.tensor.numel() == 0:
        return dx.tensor.zero_()
    programs, sizes, constants = cut(dx, cdiv(height, pool), width)
    wrap_triton(gradient_kernel)[(dx.N * programs,)](
        *maps(dx), *maps(dy), C, dx.C, height, width, dy.H, dy.W, *sizes, **constants, POOL=pool
    )
    return dx.tensor
