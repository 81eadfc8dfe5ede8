"""temporal_shift in Triton: a program walks T with three frames in registers, so that each is read once.

All of a frame is read with wide loads, and which of the three an element takes is decided afterwards. That order also
makes the kernel right in place: a frame is read before it or the one before it is written.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..ops.temporal_shift import _offsets
from ._common import (
    BLOCK,
    Clips,
    cdiv,
    channel,
    clips,
    empty_like,
    entry,
    frame_cut,
    inplace_entry,
    offset,
    place,
    within,
    wrap_triton,
)


@triton.jit
def shift_kernel(
    y, y_n, y_t, y_pitch, x, x_n, x_t, x_pitch,
    T, size, length, fold,
    FIRST: tl.constexpr, SECOND: tl.constexpr,
    DENSE: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, i = place(size, BLOCK)
    c = channel(i, length, CHANNELS_LAST)
    x += n * x_n + offset(i, length, x_pitch, DENSE)
    y += n * y_n + offset(i, length, y_pitch, DENSE)
    here = tl.load(x, mask=i < size, other=0)
    before = tl.zeros_like(here)
    for t in range(T):
        after = tl.load(x + tl.cast(t + 1, tl.int64) * x_t, mask=within(i, size, T > t + 1), other=0)
        first = after if FIRST > 0 else before
        second = after if SECOND > 0 else (before if SECOND < 0 else here)
        shifted = tl.where(c < fold, first, tl.where(c < 2 * fold, second, here))
        tl.store(y + tl.cast(t, tl.int64) * y_t, shifted, mask=i < size)
        before = here
        here = after


def shift(y: Clips, x: Clips, fold: int, offsets: tuple[int, int]) -> None:
    """Writes to y the shifted x; y may be x."""
    if x.tensor.numel() == 0:
        return
    first, second = offsets
    # No tracer meets the in-place entry, and outside of one a wrapped launch is slow and keeps memory.
    kernel = shift_kernel if y is x else wrap_triton(shift_kernel)
    kernel[(x.N * cdiv(x.size, BLOCK),)](
        *y.address, *x.address, x.T, x.size, x.length, fold, FIRST=first, SECOND=second, **frame_cut(x, y)
    )


@entry
def temporal_shift(x: Tensor, n_segment: int | None, fold_div: int, mode: str) -> Tensor:
    x = clips(x, n_segment)
    y = empty_like(x, n_segment)
    shift(y, x, x.C // fold_div, _offsets(mode))
    return y.tensor


@entry
def temporal_shift_backward(grad: Tensor, n_segment: int | None, fold_div: int, mode: str) -> Tensor:
    dy = clips(grad, n_segment)
    dx = empty_like(dy, n_segment)
    first, second = _offsets(mode)
    shift(dx, dy, dy.C // fold_div, (-first, -second))
    return dx.tensor


@inplace_entry
def temporal_shift_(x: Tensor, n_segment: int | None, fold_div: int, shift_mode: str) -> None:
    fold = x.size(1) // fold_div
    moving = x[:, : fold if shift_mode == "causal" else 2 * fold]
    target = clips(moving, n_segment)
    shift(target, target, fold, _offsets(shift_mode))
    if target.tensor is not moving:  # it had to be copied to be read
        moving.copy_(target.tensor)
