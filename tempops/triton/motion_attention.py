"""motion_attention in Triton: one pass over memory. A program has some elements of one frame."""

import triton
import triton.language as tl
from torch import Tensor

from ._common import BLOCK, cdiv, clips, empty_like, entry, frame_cut, nothing, offset, place, wide, wrap_triton


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) and its derivative e / (1 + e)^2 for e = e^-x, which loses no digits where the value is near 1.

    e stays finite, as Inf * 0 would be NaN; a NaN stays one.
    """
    least = -700.0 if x.dtype == tl.float64 else -87.0
    e = tl.exp(-tl.where(x < least, least, x))
    value = 1 / (1 + e)
    return value, e * value * value


@triton.jit
def attention_kernel(
    y, y_n, y_t, y_pitch, x, x_n, x_t, x_pitch, ahead, ahead_n, ahead_t, ahead_pitch,
    behind, behind_n, behind_t, behind_pitch, T, size, length,
    CENTERED: tl.constexpr, DENSE: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    frame, i = place(size, BLOCK)
    n, t = frame // T, frame % T
    inside = i < size
    value = wide(tl.load(x + n * x_n + t * x_t + offset(i, length, x_pitch, DENSE), mask=inside))
    to_next = wide(tl.load(ahead + n * ahead_n + t * ahead_t + offset(i, length, ahead_pitch, DENSE), mask=inside))
    to_last = wide(tl.load(behind + n * behind_n + t * behind_t + offset(i, length, behind_pitch, DENSE), mask=inside))
    base = 0.5 if CENTERED else 1.0
    result = value * (base + 0.5 * (sigmoid(to_next)[0] + sigmoid(to_last)[0]))
    tl.store(y + n * y_n + t * y_t + offset(i, length, y_pitch, DENSE), result, mask=inside)


@triton.jit
def attention_backward_kernel(
    dx, dahead, dbehind, out_n, out_t, out_pitch, dy, dy_n, dy_t, dy_pitch, x, x_n, x_t, x_pitch,
    ahead, ahead_n, ahead_t, ahead_pitch, behind, behind_n, behind_t, behind_pitch, T, size, length,
    CENTERED: tl.constexpr, NEED_X: tl.constexpr, NEED_AHEAD: tl.constexpr, NEED_BEHIND: tl.constexpr,
    DENSE: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    frame, i = place(size, BLOCK)
    n, t = frame // T, frame % T
    inside = i < size
    grad = wide(tl.load(dy + n * dy_n + t * dy_t + offset(i, length, dy_pitch, DENSE), mask=inside))
    value = wide(tl.load(x + n * x_n + t * x_t + offset(i, length, x_pitch, DENSE), mask=inside))
    to_next = wide(tl.load(ahead + n * ahead_n + t * ahead_t + offset(i, length, ahead_pitch, DENSE), mask=inside))
    to_last = wide(tl.load(behind + n * behind_n + t * behind_t + offset(i, length, behind_pitch, DENSE), mask=inside))
    next_value, next_slope = sigmoid(to_next)
    last_value, last_slope = sigmoid(to_last)
    at = n * out_n + t * out_t + offset(i, length, out_pitch, DENSE)
    base = 0.5 if CENTERED else 1.0
    if NEED_X:
        tl.store(dx + at, grad * (base + 0.5 * (next_value + last_value)), mask=inside)
    if NEED_AHEAD:
        tl.store(dahead + at, 0.5 * grad * value * next_slope, mask=inside)
    if NEED_BEHIND:
        tl.store(dbehind + at, 0.5 * grad * value * last_slope, mask=inside)


def frames(x: Tensor) -> int | None:
    """How x may be read: frames do not meet here, so any count would do."""
    return 1 if x.dim() == 4 else None


@entry
def motion_attention(x: Tensor, forward: Tensor, backward: Tensor, centered: bool) -> Tensor:
    segments = frames(x)
    x = clips(x, segments)
    ahead, behind = clips(forward, segments, x, "forward"), clips(backward, segments, x, "backward")
    y = empty_like(x, segments)
    if x.tensor.numel() > 0:
        wrap_triton(attention_kernel)[(x.N * x.T * cdiv(x.size, BLOCK),)](
            *y.address, *x.address, *ahead.address, *behind.address, x.T, x.size, x.length,
            CENTERED=centered, **frame_cut(x, y, ahead, behind),
        )  # fmt: skip
    return y.tensor


@entry
def motion_attention_backward(
    grad: Tensor,
    x: Tensor,
    forward: Tensor,
    backward: Tensor,
    centered: bool,
    need_x: bool,
    need_forward: bool,
    need_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    segments, needs = frames(x), (need_x, need_forward, need_backward)
    x = clips(x, segments)
    ahead, behind = clips(forward, segments, x, "forward"), clips(backward, segments, x, "backward")
    dy = clips(grad, segments, x)
    results = [empty_like(x, segments) if need else None for need in needs]
    some = next((result for result in results if result is not None), None)
    if some is not None and x.tensor.numel() > 0:
        pointers = [some.tensor if result is None else result.tensor for result in results]
        wrap_triton(attention_backward_kernel)[(x.N * x.T * cdiv(x.size, BLOCK),)](
            *pointers, *some.address[1:], *dy.address, *x.address, *ahead.address, *behind.address,
            x.T, x.size, x.length, CENTERED=centered, NEED_X=need_x, NEED_AHEAD=need_forward,
            NEED_BEHIND=need_backward, **frame_cut(x, some, dy, ahead, behind),
        )  # fmt: skip
    return tuple(nothing(x.tensor) if result is None else result.tensor for result in results)
