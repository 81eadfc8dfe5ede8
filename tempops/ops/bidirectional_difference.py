"""Bidirectional temporal differences with a smoothed neighbour (TDN eq. 4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._contract import (
    Op,
    accumulate_wide,
    check_clips,
    check_shape,
    check_tensor,
    empty_clips,
    register,
    to_clips,
)


def bidirectional_difference(
    x: Tensor, weight: Tensor, n_segment: int | None = None, neighbor_first: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Subtracts from each frame the filtered next frame, and the filtered previous one.

    .. math::
        \text{forward}_t = x_t - w * x_{t+1}, \qquad \text{backward}_t = x_t - w * x_{t-1}

    with a depthwise 3x3 convolution, zero padding (TDN eq. 4; the backward index as released). The last frame of
    `forward` and the first of `backward` are 0. `neighbor_first` gives the opposite sign, as the released code has it.

    Args:
        x: ``[N*T, C, H, W]``, the T frames of a clip adjacent, or ``[N, C, T, H, W]``.
        weight: ``[C, 1, 3, 3]``, one kernel a channel.
        n_segment: T for a 4-D `x`, which it must divide; None for a 5-D `x`.
        neighbor_first: False for frame minus filtered neighbour, True for the reverse.

    Returns:
        ``(forward, backward)``, each like `x`.

    Raises:
        ValueError: wrong rank or `n_segment`, a `weight` of another shape or device.
        TypeError: an argument is no dense floating-point tensor, or `weight` is not of x's dtype.

    Note:
        Contiguous and channels_last tensors and channel slices of them are read in place and the layout is kept.
        float16 and bfloat16 are added up in float32. Deterministic, both gradients included.
    """
    return op(x, weight, n_segment, neighbor_first)


def _check(x, weight, n_segment, neighbor_first) -> None:
    shape = check_clips(x, n_segment)
    check_tensor("weight", weight, like=x)
    check_shape("weight", weight, (shape.C, 1, 3, 3))
    if not isinstance(neighbor_first, bool):
        raise TypeError(f"neighbor_first must be a bool, got {type(neighbor_first).__name__}")


@accumulate_wide
def _reference(x: Tensor, weight: Tensor, n_segment: int | None, neighbor_first: bool) -> tuple[Tensor, Tensor]:
    frames = to_clips(x, n_segment)
    smoothed = F.conv2d(frames.flatten(0, 1), weight, padding=1, groups=x.size(1)).view_as(frames)
    forward, backward = torch.zeros_like(x), torch.zeros_like(x)
    to_clips(forward, n_segment)[:, :-1] = frames[:, :-1] - smoothed[:, 1:]
    to_clips(backward, n_segment)[:, 1:] = frames[:, 1:] - smoothed[:, :-1]
    return (-forward, -backward) if neighbor_first else (forward, backward)


op = Op("bidirectional_difference", check=_check, reference=_reference)


def _fake_backward(df, db, x, weight, n_segment, neighbor_first, need_x, need_weight):
    dx = empty_clips(x, n_segment) if need_x else x.new_empty(0)
    return dx, weight.new_empty(weight.shape if need_weight else 0)


def _save(ctx, inputs, output) -> None:
    x, weight, *ctx.arguments = inputs
    ctx.save_for_backward(x, weight)


def _backward(ops, ctx, df, db):
    need_x, need_weight = ctx.needs_input_grad[:2]
    dx, dweight = ops.bidirectional_difference_backward(
        df, db, *ctx.saved_tensors, *ctx.arguments, need_x, need_weight
    )
    return dx if need_x else None, dweight if need_weight else None, None, None


def _save_backward(ctx, inputs, output) -> None:
    df, db, x, weight, *ctx.arguments, ctx.need_x, ctx.need_weight = inputs
    ctx.save_for_backward(df, db, x, weight)


def _double_backward(ops, ctx, ddx, ddweight):
    """The differences are a part linear in x alone plus a product of x and weight.

    The gradient to x is linear in the output gradients and, through the product, in weight; that to weight is linear in
    the output gradients and in x. The part in x alone is what is left with a weight of zero.
    """
    df, db, x, weight = ctx.saved_tensors
    need_df, need_db, need_x, need_weight = ctx.needs_input_grad[:4]
    to_df = to_db = dx = dweight = None
    zero = torch.zeros_like(weight)

    def add(total, value):
        return value if total is None else total + value

    if ctx.need_x:
        if need_df or need_db:
            to_df, to_db = ops.bidirectional_difference(ddx, weight, *ctx.arguments)
        if need_weight:
            _, dweight = ops.bidirectional_difference_backward(df, db, ddx, weight, *ctx.arguments, False, True)
    if ctx.need_weight:
        if need_df or need_db:
            product = ops.bidirectional_difference(x, ddweight, *ctx.arguments)
            linear = ops.bidirectional_difference(x, zero, *ctx.arguments)
            to_df, to_db = add(to_df, product[0] - linear[0]), add(to_db, product[1] - linear[1])
        if need_x:
            product, _ = ops.bidirectional_difference_backward(df, db, x, ddweight, *ctx.arguments, True, False)
            linear, _ = ops.bidirectional_difference_backward(df, db, x, zero, *ctx.arguments, True, False)
            dx = product - linear
    return to_df if need_df else None, to_db if need_db else None, dx, dweight, None, None, None, None


register("bidirectional_difference",
         lambda x, weight, n_segment, neighbor_first: (empty_clips(x, n_segment), empty_clips(x, n_segment)),
         check=_check, setup_context=_save, backward=_backward)  # fmt: skip
register("bidirectional_difference_backward", _fake_backward, setup_context=_save_backward, backward=_double_backward)
