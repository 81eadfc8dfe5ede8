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
from ._strips import laid, read_strip, start, strip, strips, write_strip


@triton.jit
def near(h, w, a, b, H, W, inside):
    """Where there is an element a rows and b columns away; below zero is far above any size."""
    return inside & ((h + a).to(tl.uint32) < H) & ((w + b).to(tl.uint32) < W)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def replaced(columns, k: tl.constexpr, value):
    return columns[:k] + (value,) + columns[k + 1 :]


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
                mask = near(h, w, a, b, H, W, inside)
                best = larger(best, wide(tl.load(there + (a * W + b) * step, mask=mask, other=float("-inf"))))
        tl.store(y + tl.cast(t, tl.int64) * y_t, best - here, mask=inside)
        here = centre


@triton.jit
def largest(
    x, at, x_p: tl.constexpr, present, w,
    W: tl.constexpr, V: tl.constexpr, CHANNELS_LAST: tl.constexpr, REACH: tl.constexpr,
):  # fmt: skip
    """The columns of a row's strips, and for each column within REACH - 1 of them the maximum of it and its neighbours.

    A row that the plane has not is -Inf.
    """
    values = read_strip(x, at, x_p, present, w, float("-inf"), REACH, W, V, CHANNELS_LAST)
    pairs, triples = (), ()
    for k in tl.static_range(V + 2 * REACH - 1):
        pairs = pairs + (larger(values[k], values[k + 1]),)
    for k in tl.static_range(V + 2 * REACH - 2):
        triples = triples + (larger(pairs[k], values[k + 2]),)
    return values, triples


@triton.jit
def enhance_3_kernel(
    y, y_n, y_t, y_c, y_p: tl.constexpr, x, x_n, x_t, x_c, x_p: tl.constexpr, T, C, H,
    W: tl.constexpr, V: tl.constexpr, DENSE: tl.constexpr, CHANNELS_LAST: tl.constexpr, CHANNELS: tl.constexpr,
    ACROSS: tl.constexpr, DOWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, _, c, h, w, inside = strip(C, H, W, V, CHANNELS, ACROSS, DOWN, BLOCK, CHANNELS_LAST)
    x += start(n, c, h, w, x_n, x_c, x_p, H, W, DENSE, CHANNELS_LAST)
    y += start(n, c, h, w, y_n, y_c, y_p, H, W, DENSE, CHANNELS_LAST)
    here = read_strip(x, 0, x_p, inside, w, 0, 0, W, V, CHANNELS_LAST)
    for t in range(1, T):
        there = tl.cast(t, tl.int64) * x_t
        centre, middle = largest(x, there, x_p, inside, w, W, V, CHANNELS_LAST, 1)
        above = largest(x, there - W * x_p, x_p, inside & (h > 0), w, W, V, CHANNELS_LAST, 1)[1]
        below = largest(x, there + W * x_p, x_p, inside & (h + 1 < H), w, W, V, CHANNELS_LAST, 1)[1]
        results = ()
        for k in tl.static_range(V):
            results = results + (larger(larger(above[k], middle[k]), below[k]) - here[k],)
        write_strip(y, tl.cast(t - 1, tl.int64) * y_t, y_p, results, inside, w, W, V, CHANNELS_LAST)
        here = centre[1 : V + 1]


@triton.jit
def enhance_3_backward_kernel(
    dx, dx_n, dx_t, dx_c, dx_p: tl.constexpr, dy, dy_n, dy_t, dy_c, dy_p: tl.constexpr,
    x, x_n, x_t, x_c, x_p: tl.constexpr, T, C, H,
    W: tl.constexpr, V: tl.constexpr, DENSE: tl.constexpr, CHANNELS_LAST: tl.constexpr, CHANNELS: tl.constexpr,
    ACROSS: tl.constexpr, DOWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A window's gradient goes to the row that won it, and from the middle of that row to the element that won there.

    What comes first has won if what comes later is neither larger nor NaN.
    """
    n, _, c, h, w, inside = strip(C, H, W, V, CHANNELS, ACROSS, DOWN, BLOCK, CHANNELS_LAST)
    x += start(n, c, h, w, x_n, x_c, x_p, H, W, DENSE, CHANNELS_LAST)
    dy += start(n, c, h, w, dy_n, dy_c, dy_p, H, W, DENSE, CHANNELS_LAST)
    dx += start(n, c, h, w, dx_n, dx_c, dx_p, H, W, DENSE, CHANNELS_LAST)
    row: tl.constexpr = W * x_p
    dy_row: tl.constexpr = W * dy_p
    for t in range(T):
        of_here = tl.cast(t, tl.int64) * dy_t
        own = read_strip(dy, of_here, dy_p, inside & within(h, H, T > t + 1), w, 0, 0, W, V, CHANNELS_LAST)
        totals = ()
        for k in tl.static_range(V):
            totals = totals + (-own[k],)
        if t > 0:
            here = tl.cast(t, tl.int64) * x_t
            above_2 = largest(x, here - 2 * row, x_p, inside & (h > 1), w, W, V, CHANNELS_LAST, 2)[1]
            above_1 = largest(x, here - row, x_p, inside & (h > 0), w, W, V, CHANNELS_LAST, 2)[1]
            values, middle = largest(x, here, x_p, inside, w, W, V, CHANNELS_LAST, 2)
            below_1 = largest(x, here + row, x_p, inside & (h + 1 < H), w, W, V, CHANNELS_LAST, 2)[1]
            below_2 = largest(x, here + 2 * row, x_p, inside & (h + 2 < H), w, W, V, CHANNELS_LAST, 2)[1]
            windows = of_here - dy_t
            up = read_strip(dy, windows - dy_row, dy_p, inside & (h > 0), w, 0, 1, W, V, CHANNELS_LAST)
            same = read_strip(dy, windows, dy_p, inside, w, 0, 1, W, V, CHANNELS_LAST)
            under = read_strip(dy, windows + dy_row, dy_p, inside & (h + 1 < H), w, 0, 1, W, V, CHANNELS_LAST)
            for k in tl.static_range(V + 2):
                # The row around column k - 1, which is the middle of `left`, `value` and `right`.
                best = middle[k]
                wins = (best != best) | (h < 1)
                most = tl.where(best != best, float("inf"), best)
                early = tl.where(h < 2, above_1[k], larger(above_1[k], above_2[k]))
                gradient = tl.where((best > early) | wins, up[k], 0)
                gradient += tl.where(((best > above_1[k]) | wins) & (below_1[k] <= most), same[k], 0)
                gradient += tl.where(larger(below_1[k], below_2[k]) <= most, under[k], 0)
                left, value, right = values[k], values[k + 1], values[k + 2]
                to_right = (right > larger(left, value)) | (right != right)
                to_value = (value > left) | (value != value) | (w + k < 2)
                rest = tl.where(to_right, 0, gradient)
                if k > 1:
                    totals = replaced(totals, k - 2, totals[k - 2] + tl.where(to_value, 0, rest))
                if k > 0 and k <= V:
                    totals = replaced(totals, k - 1, totals[k - 1] + tl.where(to_value, rest, 0))
                if k < V:
                    totals = replaced(totals, k, totals[k] + tl.where(to_right, gradient, 0))
        write_strip(dx, tl.cast(t, tl.int64) * dx_t, dx_p, totals, inside, w, W, V, CHANNELS_LAST)


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
    if x.tensor.numel() > 0 and kernel_size == 3:
        cut = strips(x)
        wrap_triton(enhance_3_kernel)[(x.N * cut.programs,)](*laid(y), *laid(x), x.T, x.C, x.H, **cut.constants(x, y))
    elif x.tensor.numel() > 0:
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
    if x.tensor.numel() > 0 and kernel_size == 3:
        cut = strips(x)
        wrap_triton(enhance_3_backward_kernel)[(x.N * cut.programs,)](
            *laid(dx), *laid(dy), *laid(x), x.T, x.C, x.H,
            **cut.constants(x, dx, dy),
        )  # fmt: skip
    elif x.tensor.numel() > 0:
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
