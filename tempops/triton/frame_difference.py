"""frame_difference in Triton. What is pooled are differences, not frames: the difference of two means of frames that
are alike would lose digits.

Planar maps pooled by 2: a program walks the frames of some pairs of rows with the last frame in registers, reads whole
rows and adds up neighbours afterwards, so that all accesses are wide. Any other layout and window: a program has some
results and reads each of its frames once more than that, from a cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._common import BLOCK, Clips, cdiv, clips, empty_like, entry, place, wide, wrap_triton


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
def difference_kernel(
    y, y_n, y_c, y_p, x, x_n, x_c, x_p, C, moving, W, height, width, pool,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pixels = height * width
    n, i = place(moving * pixels, BLOCK)
    inside = i < moving * pixels
    c = i % moving if CHANNELS_LAST else i // pixels
    p = i // moving if CHANNELS_LAST else i % pixels
    x += n * x_n + c.to(tl.int64) * x_c + ((p // width) * pool * W + (p % width) * pool).to(tl.int64) * x_p
    later = tl.cast(C, tl.int64) * x_c
    total = tl.zeros([BLOCK], tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32)
    for a in range(pool):
        for b in range(pool):
            at = x + (tl.cast(a, tl.int64) * W + b) * x_p
            total += wide(tl.load(at + later, mask=inside, other=0)) - wide(tl.load(at, mask=inside, other=0))
    y += n * y_n + c.to(tl.int64) * y_c + p.to(tl.int64) * y_p
    tl.store(y, total / (pool * pool), mask=inside)


@triton.jit
def gradient_kernel(
    dx, dx_n, dx_c, dx_p, dy, dy_n, dy_c, dy_p, C, all_channels, H, W, height, width, pool,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx_j = (dy_{j-1} - dy_j) / pool^2, the same for all pixels of a window; rows and columns left over get zero."""
    n, i = place(all_channels * H * W, BLOCK)
    c = i % all_channels if CHANNELS_LAST else i // (H * W)
    p = i // all_channels if CHANNELS_LAST else i % (H * W)
    h, w = p // W // pool, p % W // pool
    pooled = (i < all_channels * H * W) & (h < height) & (w < width)
    at = dy + n * dy_n + c.to(tl.int64) * dy_c + (h * width + w).to(tl.int64) * dy_p
    earlier = tl.load(at - tl.cast(C, tl.int64) * dy_c, mask=pooled & (c >= C), other=0)
    here = tl.load(at, mask=pooled & (c < all_channels - C), other=0)
    dx += n * dx_n + c.to(tl.int64) * dx_c + p.to(tl.int64) * dx_p
    tl.store(dx, (wide(earlier) - wide(here)) / (pool * pool), mask=i < all_channels * H * W)


def maps(x: Clips) -> tuple:
    """What a kernel gets of x: pointer, and strides of maps, channels and pixels."""
    return x.tensor, x.sn, x.sc, x.sp


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
        wrap_triton(difference_kernel)[(x.N * cdiv(y.size, BLOCK),)](
            *maps(y), *maps(x), C, moving, x.W, height, width, pool, CHANNELS_LAST=x.channels_last, BLOCK=BLOCK
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
    wrap_triton(gradient_kernel)[(dx.N * cdiv(dx.size, BLOCK),)](
        *maps(dx), *maps(dy), C, dx.C, height, width, dy.H, dy.W, pool, CHANNELS_LAST=dy.channels_last, BLOCK=BLOCK
    )
    return dx.tensor
