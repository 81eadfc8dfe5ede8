"""bidirectional_difference in Triton.

The 3x3 product of frame t is computed once and subtracted from frame t - 1 (`forward`) and frame t + 1 (`backward`): a
program has some strips of rows and walks T. Likewise the backward adds up what the two gradients say of the product of
frame t; it transposes the product, and correlates the sum with x for the weight's gradient. Windows are read from a
cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    add_up,
    cdiv,
    clips,
    empty_like,
    entry,
    nothing,
    partial_sums,
    registers,
    wide,
    within,
    wrap_triton,
)
from ._strips import laid, read_strip, start, strip, strips, sum_of_channels, write_strip


@triton.jit
def taps_of(weight, c, C, present):
    """The nine taps of each channel; zero where there is nothing to take."""
    taps = ()
    for k in tl.static_range(9):
        taps = taps + (wide(tl.load(weight + c * 9 + k, mask=within(c, C, present), other=0)),)
    return taps


@triton.jit
def read_rows(
    x, at, x_p: tl.constexpr, h, w, H, inside, present, W: tl.constexpr, V: tl.constexpr, CHANNELS_LAST: tl.constexpr
):  # fmt: skip
    """Columns -1 .. V of the rows above, at and below strips; zero outside the plane."""
    row: tl.constexpr = W * x_p
    above, below = inside & (h > 0) & within(h, H, present), inside & within(h, H - 1, present)
    first = read_strip(x, at - row, x_p, above, w, 0, 1, W, V, CHANNELS_LAST)
    second = read_strip(x, at, x_p, inside & within(h, H, present), w, 0, 1, W, V, CHANNELS_LAST)
    third = read_strip(x, at + row, x_p, below, w, 0, 1, W, V, CHANNELS_LAST)
    return first, second, third


@triton.jit
def product_of(rows, taps, V: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The 3x3 product, or the transposed one."""
    products = ()
    for j in tl.static_range(V):
        total = taps[8 if TRANSPOSED else 0] * rows[0][j]
        for k in tl.static_range(1, 9):
            total += taps[8 - k if TRANSPOSED else k] * rows[k // 3][j + k % 3]
        products = products + (total,)
    return products


@triton.jit
def bidirectional_kernel(
    forward, backward, y_n, y_t, y_c, y_p: tl.constexpr, x, x_n, x_t, x_c, x_p: tl.constexpr, weight, T, C, H, sign,
    W: tl.constexpr, V: tl.constexpr, DENSE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr, ACROSS: tl.constexpr, DOWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, _, c, h, w, inside = strip(C, H, W, V, CHANNELS, ACROSS, DOWN, BLOCK, CHANNELS_LAST)
    x += start(n, c, h, w, x_n, x_c, x_p, H, W, DENSE, CHANNELS_LAST)
    at = start(n, c, h, w, y_n, y_c, y_p, H, W, DENSE, CHANNELS_LAST)
    forward += at
    backward += at
    taps = taps_of(weight, c, C, T > 1)
    zero = wide(tl.zeros([BLOCK], x.dtype.element_ty))
    zeros = (zero,) * V
    before = zeros
    product_before = zeros
    for t in range(T):
        rows = read_rows(x, tl.cast(t, tl.int64) * x_t, x_p, h, w, H, inside, T > t, W, V, CHANNELS_LAST)
        product = product_of(rows, taps, V, False)
        here = rows[1][1 : V + 1]
        of_last, of_this = (), ()
        for j in tl.static_range(V):
            of_last = of_last + (sign * (before[j] - product[j]),)
            of_this = of_this + (tl.where(within(h, H, T * 0 + t > 0), sign * (here[j] - product_before[j]), 0),)
        to = tl.cast(t, tl.int64) * y_t
        in_last = inside & within(h, H, T * 0 + t > 0)
        write_strip(forward, to - y_t, y_p, of_last, in_last, w, W, V, CHANNELS_LAST)
        write_strip(backward, to, y_p, of_this, inside, w, W, V, CHANNELS_LAST)
        before = here
        product_before = product
    write_strip(forward, tl.cast(T - 1, tl.int64) * y_t, y_p, zeros, inside, w, W, V, CHANNELS_LAST)


@triton.jit
def bidirectional_backward_kernel(
    dx, dx_n, dx_t, dx_c, dx_p: tl.constexpr, forward, f_n, f_t, f_c, f_p: tl.constexpr,
    backward, b_n, b_t, b_c, b_p: tl.constexpr, x, x_n, x_t, x_c, x_p: tl.constexpr,
    parts, weight, N, T, C, H, rows, places, sign,
    NEED_X: tl.constexpr, NEED_WEIGHT: tl.constexpr, W: tl.constexpr, V: tl.constexpr,
    DENSE: tl.constexpr, CHANNELS_LAST: tl.constexpr, CHANNELS: tl.constexpr, ACROSS: tl.constexpr,
    DOWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of programs has every `rows`-th clip. parts [rows, places, 9, C]: sums for the weight's gradient."""
    first, at, c, h, w, inside = strip(C, H, W, V, CHANNELS, ACROSS, DOWN, BLOCK, CHANNELS_LAST)
    zero = tl.full([], 0, tl.int64)
    x += start(zero, c, h, w, x_n, x_c, x_p, H, W, DENSE, CHANNELS_LAST)
    dx += start(zero, c, h, w, dx_n, dx_c, dx_p, H, W, DENSE, CHANNELS_LAST)
    forward += start(zero, c, h, w, f_n, f_c, f_p, H, W, DENSE, CHANNELS_LAST)
    backward += start(zero, c, h, w, b_n, b_c, b_p, H, W, DENSE, CHANNELS_LAST)
    taps = taps_of(weight, c, C, T > 1)
    sums = (wide(tl.zeros([BLOCK], x.dtype.element_ty)),) * 9
    for n in range(first, N, rows):
        for t in range(T):
            of_last = n * f_n + tl.cast(t - 1, tl.int64) * f_t  # what read the product of frame t
            of_next = n * b_n + tl.cast(t + 1, tl.int64) * b_t
            ahead = read_rows(forward, of_last, f_p, h, w, H, inside, T * 0 + t > 0, W, V, CHANNELS_LAST)
            behind = read_rows(backward, of_next, b_p, h, w, H, inside, T > t + 1, W, V, CHANNELS_LAST)
            both = ()
            for a in tl.static_range(3):
                row = ()
                for k in tl.static_range(V + 2):
                    row = row + (ahead[a][k] + behind[a][k],)
                both = both + (row,)
            if NEED_X:
                in_next, in_last = inside & within(h, H, T > t + 1), inside & within(h, H, T * 0 + t > 0)
                own = read_strip(forward, of_last + f_t, f_p, in_next, w, 0, 0, W, V, CHANNELS_LAST)
                own_too = read_strip(backward, of_next - b_t, b_p, in_last, w, 0, 0, W, V, CHANNELS_LAST)
                product = product_of(both, taps, V, True)
                results = ()
                for j in tl.static_range(V):
                    results = results + (sign * (own[j] + own_too[j] - product[j]),)
                write_strip(dx, n * dx_n + tl.cast(t, tl.int64) * dx_t, dx_p, results, inside, w, W, V, CHANNELS_LAST)
            if NEED_WEIGHT:
                # A frame that nothing reads adds nothing, not even 0 * Inf.
                frame = n * x_n + tl.cast(t, tl.int64) * x_t
                near = read_rows(x, frame, x_p, h, w, H, inside, T > 1, W, V, CHANNELS_LAST)
                more = ()
                for k in tl.static_range(9):
                    total = sums[k]
                    for j in tl.static_range(V):
                        total += both[1][j + 1] * near[k // 3][j + k % 3]
                    more = more + (total,)
                sums = more
    if NEED_WEIGHT:
        channel = tl.min(c, 0) + tl.arange(0, CHANNELS)
        for k in tl.static_range(9):
            to = parts + ((first * places + at) * 9 + k) * C + channel
            tl.store(to, -sign * sum_of_channels(sums[k], CHANNELS, CHANNELS_LAST), mask=channel < C)


@entry
def bidirectional_difference(
    x: Tensor, weight: Tensor, n_segment: int | None, neighbor_first: bool
) -> tuple[Tensor, Tensor]:
    x = clips(x, n_segment)
    forward, backward = empty_like(x, n_segment), empty_like(x, n_segment)
    if x.tensor.numel() > 0:
        cut = strips(x)
        wrap_triton(bidirectional_kernel)[(x.N * cut.programs,)](
            forward.tensor, *laid(backward), *laid(x), weight.contiguous(), x.T, x.C, x.H,
            -1.0 if neighbor_first else 1.0, **cut.constants(x, forward),
        )  # fmt: skip
    return forward.tensor, backward.tensor


@entry
def bidirectional_difference_backward(
    grad_forward: Tensor,
    grad_backward: Tensor,
    x: Tensor,
    weight: Tensor,
    n_segment: int | None,
    neighbor_first: bool,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    x = clips(x, n_segment)
    forward = clips(grad_forward, n_segment, x, "grad_forward")
    backward = clips(grad_backward, n_segment, x, "grad_backward")
    dx = empty_like(x, n_segment) if need_x else None
    dweight = weight.new_empty(weight.shape) if need_weight else nothing(weight)
    if x.tensor.numel() == 0:
        dweight.zero_()
    elif need_x or need_weight:
        cut = strips(x, by_channel=True)
        # Rows of programs: enough to fill a GPU, and no more sums than that.
        rows = min(x.N, cdiv(2048, cut.programs)) if need_weight else x.N
        parts = partial_sums(x, rows * cut.places, 9, x.C) if need_weight else dweight
        like = x if dx is None else dx
        # In 16 bits the loads of twice as many threads are needed to keep memory busy.
        limit = registers(x.tensor, 128) if x.channels_last and x.tensor.element_size() == 2 else {}
        wrap_triton(bidirectional_backward_kernel)[(rows * cut.programs,)](
            *laid(like), *laid(forward), *laid(backward), *laid(x), parts, weight.contiguous(),
            x.N, x.T, x.C, x.H, rows, cut.places, -1.0 if neighbor_first else 1.0, NEED_X=need_x,
            NEED_WEIGHT=need_weight, **cut.constants(x, like, forward, backward), **limit,
        )  # fmt: skip
        if need_weight:
            add_up(dweight, parts, rows * cut.places, x.C, 9)
    return nothing(x.tensor) if dx is None else dx.tensor, dweight
