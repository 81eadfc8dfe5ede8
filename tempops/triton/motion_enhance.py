"""motion_enhance in Triton.

A program has some elements and walks T. The maximum around an element is taken of the elements of the window, which
neighbours read again from a cache. The backward gathers: an element has lost a window to any element in it that comes
before it and is as large, or comes after it and is larger, or to a later NaN. The elements up to two radii away each
tell of which windows it has lost; one bit a window says so while there are at most 25. Larger windows are searched
one by one.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    BLOCK,
    Clips,
    cdiv,
    check_like,
    clips,
    empty_like,
    entry,
    frame_cut,
    offset,
    pixel,
    place,
    wide,
    within,
    wrap_triton,
)


@triton.jit
def near(h, w, a, b, H, W, inside):
    """Where there is an element a rows and b columns away; below zero is far above any size."""
    return inside & ((h + a).to(tl.uint32) < H) & ((w + b).to(tl.uint32) < W)


@triton.jit
def larger(best, x, x_p, a, b, h, w, H, W, inside):
    mask = near(h, w, a, b, H, W, inside)
    value = wide(tl.load(x + (a * W + b) * x_p, mask=mask, other=float("-inf")))
    return tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def enhance_kernel(
    y, y_n, y_t, y_pitch, x, x_n, x_t, x_pitch, x_p, T, size, length, H, W,
    R: tl.constexpr, DENSE: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, i = place(size, BLOCK)
    inside = i < size
    p = pixel(i, length, CHANNELS_LAST)
    h, w = p // W, p % W
    x += n * x_n + offset(i, length, x_pitch, DENSE)
    y += n * y_n + offset(i, length, y_pitch, DENSE)
    step = tl.cast(x_p, tl.int64)
    here = wide(tl.load(x, mask=inside, other=0))
    for t in range(T - 1):
        there = x + tl.cast(t + 1, tl.int64) * x_t
        centre = wide(tl.load(there, mask=inside, other=0))
        best = centre
        for a in range(-R, R + 1):
            for b in tl.static_range(-R, R + 1):
                best = larger(best, there, step, a, b, h, w, H, W, inside)
        tl.store(y + tl.cast(t, tl.int64) * y_t, best - here, mask=inside)
        here = centre


@triton.jit
def beats(x, x_p, value, a, b, h, w, H, W, inside):
    """Whether the element a rows and b columns away wins over `value`, as F.max_pool2d picks; never over itself."""
    mask = near(h, w, a, b, H, W, inside)
    other = wide(tl.load(x + (a * W + b) * x_p, mask=mask, other=0))
    first = a * 2 * W + b < 0
    larger = (other > value) | ((other == value) & first)
    return mask & (larger | ((other != other) & ((value == value) | (a * 2 * W + b > 0))))


@triton.jit
def windows_with(a, b, R: tl.constexpr):
    """A bit for each window that has an element with the one a rows and b columns away from it."""
    S: tl.constexpr = 2 * R + 1
    top, bottom = tl.maximum(a, 0), tl.minimum(a, 0) + 2 * R
    left, right = tl.maximum(b, 0), tl.minimum(b, 0) + 2 * R
    row = ((1 << (right - left + 1)) - 1) << left
    rows = ((1 << (S * (bottom - top + 1))) - 1) // ((1 << S) - 1) << (S * top)
    return row * rows


@triton.jit
def won_gradient(dy, dy_p, won, a, b, h, w, H, W, inside):
    """The gradient of the window a rows and b columns away, where it was won."""
    mask = near(h, w, a, b, H, W, inside) & won
    return wide(tl.load(dy + (a * W + b) * dy_p, mask=mask, other=0))


@triton.jit
def enhance_backward_kernel(
    dx, dx_n, dx_t, dx_pitch, dy, dy_n, dy_t, dy_pitch, dy_p, x, x_n, x_t, x_pitch, x_p, T, size, length, H, W,
    R: tl.constexpr, DENSE: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    S: tl.constexpr = 2 * R + 1
    n, i = place(size, BLOCK)
    inside = i < size
    p = pixel(i, length, CHANNELS_LAST)
    h, w = p // W, p % W
    x += n * x_n + offset(i, length, x_pitch, DENSE)
    dx += n * dx_n + offset(i, length, dx_pitch, DENSE)
    dy += n * dy_n + offset(i, length, dy_pitch, DENSE)
    step, dy_step = tl.cast(x_p, tl.int64), tl.cast(dy_p, tl.int64)
    for t in range(T):
        here = x + tl.cast(t, tl.int64) * x_t
        of_here = dy + tl.cast(t, tl.int64) * dy_t
        of_windows = of_here - dy_t
        total = -wide(tl.load(of_here, mask=within(i, size, T > t + 1), other=0))
        if t > 0:
            value = wide(tl.load(here, mask=inside, other=0))
            lost = tl.zeros([BLOCK], tl.int32)
            if R <= 2:
                for a in range(-2 * R, 2 * R + 1):
                    for b in tl.static_range(-2 * R, 2 * R + 1):
                        beaten = beats(here, step, value, a, b, h, w, H, W, inside)
                        lost |= tl.where(beaten, windows_with(a, b, R), 0)
                for a in range(-R, R + 1):
                    for b in tl.static_range(-R, R + 1):
                        won = (lost >> ((a + R) * S + b + R)) & 1 == 0
                        total += won_gradient(of_windows, dy_step, won, a, b, h, w, H, W, inside)
            else:
                for a in range(-R, R + 1):
                    for b in range(-R, R + 1):
                        lost = tl.zeros([BLOCK], tl.int32)
                        for row in range(a - R, a + R + 1):
                            for column in range(b - R, b + R + 1):
                                beaten = beats(here, step, value, row, column, h, w, H, W, inside)
                                lost |= beaten.to(tl.int32)
                        total += won_gradient(of_windows, dy_step, lost == 0, a, b, h, w, H, W, inside)
        tl.store(dx + tl.cast(t, tl.int64) * dx_t, total, mask=inside)


@triton.jit
def gather_kernel(
    y, y_n, y_t, y_pitch, other, other_n, other_t, other_pitch, other_p, x, x_n, x_t, x_pitch, x_p,
    T, size, length, H, W,
    R: tl.constexpr, DENSE: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, i = place(size, BLOCK)
    inside = i < size
    p = pixel(i, length, CHANNELS_LAST)
    h, w = p // W, p % W
    x += n * x_n + offset(i, length, x_pitch, DENSE)
    y += n * y_n + offset(i, length, y_pitch, DENSE)
    other += n * other_n + offset(i, length, other_pitch, DENSE)
    step, other_step = tl.cast(x_p, tl.int64), tl.cast(other_p, tl.int64)
    for t in range(T - 1):
        from_ = other + tl.cast(t + 1, tl.int64) * other_t
        best = wide(tl.full([BLOCK], float("-inf"), x.dtype.element_ty))
        chosen = tl.zeros([BLOCK], best.dtype)
        seen = i < 0
        for a in range(-R, R + 1):
            for b in range(-R, R + 1):
                mask = near(h, w, a, b, H, W, inside)
                at = tl.cast(a * W + b, tl.int64)
                value = wide(tl.load(x + tl.cast(t + 1, tl.int64) * x_t + at * step, mask=mask, other=0))
                takes = mask & ((value > best) | (value != value) | (seen == 0))
                chosen = tl.where(takes, wide(tl.load(from_ + at * other_step, mask=takes, other=0)), chosen)
                best = tl.where(takes, value, best)
                seen = seen | mask
        here = wide(tl.load(other + tl.cast(t, tl.int64) * other_t, mask=inside, other=0))
        tl.store(y + tl.cast(t, tl.int64) * y_t, chosen - here, mask=inside)


def shape(x: Clips) -> tuple:
    return x.T, x.size, x.length, x.H, x.W


def radius(x: Clips, kernel_size: int) -> int:
    """Half the kernel size. A window that reaches over the whole plane from everywhere may as well end there."""
    return min(kernel_size // 2, max(1, x.H, x.W) - 1)


def before_last(x: Tensor, n_segment: int | None) -> tuple[tuple, int | None]:
    """The shape of an output or its gradient, and its frames a clip where it is 4-D."""
    if x.dim() == 5:
        return (*x.shape[:2], x.size(2) - 1, *x.shape[3:]), None
    return (x.size(0) // n_segment * (n_segment - 1), *x.shape[1:]), n_segment - 1


@entry
def motion_enhance(x: Tensor, n_segment: int | None, kernel_size: int) -> Tensor:
    x = clips(x, n_segment)
    y = empty_like(x, n_segment, T=x.T - 1)
    if x.tensor.numel() > 0:
        wrap_triton(enhance_kernel)[(x.N * cdiv(x.size, BLOCK),)](
            *y.address, *x.address, x.sp, *shape(x), R=radius(x, kernel_size), **frame_cut(x, y)
        )
    return y.tensor


@entry
def motion_enhance_backward(grad: Tensor, x: Tensor, n_segment: int | None, kernel_size: int) -> Tensor:
    sizes, segments = before_last(x, n_segment)
    check_like(grad, x, "grad", sizes)
    x = clips(x, n_segment)
    dy = clips(grad, segments, channels_last=x.channels_last)
    dx = empty_like(x, n_segment)
    if x.tensor.numel() > 0:
        wrap_triton(enhance_backward_kernel)[(x.N * cdiv(x.size, BLOCK),)](
            *dx.address, *dy.address, dy.sp, *x.address, x.sp, *shape(x), R=radius(x, kernel_size),
            **frame_cut(x, dx, dy),
        )  # fmt: skip
    return dx.tensor


@entry
def motion_enhance_gather(other: Tensor, x: Tensor, n_segment: int | None, kernel_size: int) -> Tensor:
    x = clips(x, n_segment)
    other = clips(other, n_segment, x, "other")
    y = empty_like(x, n_segment, T=x.T - 1)
    if x.tensor.numel() > 0:
        wrap_triton(gather_kernel)[(x.N * cdiv(x.size, BLOCK),)](
            *y.address, *other.address, other.sp, *x.address, x.sp, *shape(x), R=radius(x, kernel_size),
            **frame_cut(x, y, other),
        )  # fmt: skip
    return y.tensor
