"""bidirectional_difference in Triton.

The 3x3 product of frame t is computed once and subtracted from frame t - 1 (`forward`) and frame t + 1 (`backward`): a
program has a tile of a clip and walks T. Likewise the backward adds up what the two gradients say of the product of
frame t, and transposes the product once. The weight's gradient, which correlates the same sum with x, is a kernel of
its own: one for both would need more registers than there are. Windows are read from a cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    BLOCK,
    cdiv,
    clips,
    empty_like,
    entry,
    nothing,
    partial_sums,
    tile,
    tiles,
    total_kernel,
    wide,
    within,
    wrap_triton,
)


@triton.jit
def taps_of(weight, c, C):
    """The nine taps of each channel, as a column each."""
    taps = ()
    for k in tl.static_range(9):
        taps = taps + (wide(tl.load(weight + c * 9 + k, mask=c < C, other=0))[:, None],)
    return taps


@triton.jit
def near(p, a, b, P, H, W):
    """Which pixels have one a rows and b columns away; below zero is far above any size."""
    h, w = p // W, p % W
    return (p < P) & ((h + a).to(tl.uint32) < H) & ((w + b).to(tl.uint32) < W)


@triton.jit
def bidirectional_kernel(
    forward, backward, y_n, y_t, y_c, y_p, x, x_n, x_t, x_c, x_p, weight, T, C, P, H, W,
    SIGN: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    n, _, c, p = tile(C, P, CHANNELS, PIXELS)
    inside = (c < C)[:, None] & (p < P)[None, :]
    taps = taps_of(weight, c, C)
    x += n * x_n + c.to(tl.int64)[:, None] * x_c + p.to(tl.int64)[None, :] * x_p
    at = n * y_n + c.to(tl.int64)[:, None] * y_c + p.to(tl.int64)[None, :] * y_p
    forward += at
    backward += at
    step = tl.cast(x_p, tl.int64)
    before = wide(tl.zeros([CHANNELS, PIXELS], x.dtype.element_ty))
    product_before = before
    for t in range(T):
        frame = x + tl.cast(t, tl.int64) * x_t
        product = tl.zeros_like(before)
        for k in tl.static_range(9):
            a, b = k // 3 - 1, k % 3 - 1
            mask = (c < C)[:, None] & near(p, a, b, P, H, W)[None, :]
            value = wide(tl.load(frame + (a * W + b) * step, mask=mask, other=0))
            product += tl.where(mask, taps[k] * value, 0)
        here = wide(tl.load(frame, mask=inside, other=0))
        to = tl.cast(t, tl.int64) * y_t
        tl.store(forward + to - y_t, SIGN * (before - product), mask=within(c, C, T * 0 + t > 0)[:, None] & inside)
        tl.store(backward + to, tl.where(T * 0 + t > 0, SIGN * (here - product_before), 0), mask=inside)
        before = here
        product_before = product
    tl.store(forward + tl.cast(T - 1, tl.int64) * y_t, tl.zeros_like(before), mask=inside)


@triton.jit
def bidirectional_backward_kernel(
    dx, dx_n, dx_t, dx_c, dx_p, forward, f_n, f_t, f_c, f_p, backward, b_n, b_t, b_c, b_p, weight, T, C, P, H, W,
    SIGN: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    n, _, c, p = tile(C, P, CHANNELS, PIXELS)
    inside = (c < C)[:, None] & (p < P)[None, :]
    taps = taps_of(weight, c, C)
    cc, pp = c.to(tl.int64)[:, None], p.to(tl.int64)[None, :]
    dx += n * dx_n + cc * dx_c + pp * dx_p
    forward += n * f_n + cc * f_c + pp * f_p
    backward += n * b_n + cc * b_c + pp * b_p
    f_step, b_step = tl.cast(f_p, tl.int64), tl.cast(b_p, tl.int64)
    for t in range(T):
        of_last = forward + tl.cast(t - 1, tl.int64) * f_t  # what read the product of frame t
        of_next = backward + tl.cast(t + 1, tl.int64) * b_t
        in_last, in_next = within(c, C, T * 0 + t > 0)[:, None], within(c, C, T > t + 1)[:, None]
        total = wide(tl.load(of_last + f_t, mask=in_next & inside, other=0))
        total += wide(tl.load(of_next - b_t, mask=in_last & inside, other=0))
        for k in tl.static_range(9):
            a, b = k // 3 - 1, k % 3 - 1
            there = near(p, a, b, P, H, W)[None, :]
            value = wide(tl.load(of_last + (a * W + b) * f_step, mask=in_last & there, other=0))
            value += wide(tl.load(of_next + (a * W + b) * b_step, mask=in_next & there, other=0))
            total -= tl.where((in_last | in_next) & there, taps[8 - k] * value, 0)
        tl.store(dx + tl.cast(t, tl.int64) * dx_t, SIGN * total, mask=inside)


@triton.jit
def bidirectional_weight_kernel(
    parts, forward, f_n, f_t, f_c, f_p, backward, b_n, b_t, b_c, b_p, x, x_n, x_t, x_c, x_p,
    N, T, C, P, H, W, rows, SIGN: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """The sums over its pixels, frames and clips that make the weight's gradient."""
    start, chunk, c, p = tile(C, P, CHANNELS, PIXELS)
    inside = (c < C)[:, None] & (p < P)[None, :]
    cc, pp = c.to(tl.int64)[:, None], p.to(tl.int64)[None, :]
    forward += cc * f_c + pp * f_p
    backward += cc * b_c + pp * b_p
    x += cc * x_c + pp * x_p
    step = tl.cast(x_p, tl.int64)
    q = (wide(tl.zeros([CHANNELS, PIXELS], x.dtype.element_ty)),) * 9
    for n in range(start, N, rows):
        for t in range(T):
            in_last, in_next = within(c, C, T * 0 + t > 0)[:, None], within(c, C, T > t + 1)[:, None]
            of_last = forward + n * f_n + tl.cast(t - 1, tl.int64) * f_t  # what read the product of frame t
            of_next = backward + n * b_n + tl.cast(t + 1, tl.int64) * b_t
            total = wide(tl.load(of_last, mask=in_last & inside, other=0))
            total += wide(tl.load(of_next, mask=in_next & inside, other=0))
            frame = x + n * x_n + tl.cast(t, tl.int64) * x_t
            sums = ()
            for k in tl.static_range(9):
                a, b = k // 3 - 1, k % 3 - 1
                mask = (in_last | in_next) & near(p, a, b, P, H, W)[None, :]
                value = wide(tl.load(frame + (a * W + b) * step, mask=mask, other=0))
                sums = sums + (q[k] + tl.where(mask, value * total, 0),)
            q = sums
    for k in tl.static_range(9):
        at = ((start * tl.cdiv(P, PIXELS) + chunk) * 9 + k) * C + c
        tl.store(parts + at, -SIGN * tl.sum(q[k], 1), mask=c < C)


@entry
def bidirectional_difference(
    x: Tensor, weight: Tensor, n_segment: int | None, neighbor_first: bool
) -> tuple[Tensor, Tensor]:
    x = clips(x, n_segment)
    forward, backward = empty_like(x, n_segment), empty_like(x, n_segment)
    if x.tensor.numel() > 0:
        cut = tiles(x)
        wrap_triton(bidirectional_kernel)[(x.N * cut.blocks * cut.chunks,)](
            forward.tensor, *backward.strides, *x.strides, weight.contiguous(), x.T, x.C, x.P, x.H, x.W,
            SIGN=-1 if neighbor_first else 1, **cut.constants,
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
    else:
        cut, sign = tiles(x), -1 if neighbor_first else 1
        if need_x:
            wrap_triton(bidirectional_backward_kernel)[(x.N * cut.blocks * cut.chunks,)](
                *dx.strides, *forward.strides, *backward.strides, weight.contiguous(), x.T, x.C, x.P, x.H, x.W,
                SIGN=sign, **cut.constants,
            )  # fmt: skip
        if need_weight:
            # 16 bytes a thread of each tensor: nine sums of each element are kept.
            cut = tiles(x, 32, BLOCK // 2 if x.tensor.element_size() > 2 else BLOCK)
            # Rows of programs: enough to fill a GPU, and no more sums than that.
            rows = min(x.N, cdiv(2048, cut.blocks * cut.chunks))
            parts = partial_sums(x, rows * cut.chunks, 9, x.C)
            wrap_triton(bidirectional_weight_kernel)[(rows * cut.blocks * cut.chunks,)](
                parts, *forward.strides, *backward.strides, *x.strides, x.N, x.T, x.C, x.P, x.H, x.W, rows,
                SIGN=sign, **cut.constants,
            )  # fmt: skip
            wrap_triton(total_kernel)[(cdiv(x.C * 9, 16),)](
                dweight, parts, weight, x.C, rows * cut.chunks, 1, 9, x.C, 1,
                PER_CLIP=False, FACTOR=False, ELEMENTS=16, TERMS=64,
            )  # fmt: skip
    return nothing(x.tensor) if dx is None else dx.tensor, dweight
