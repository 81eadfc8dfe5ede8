"""Bidirectional difference: each frame minus the convolved next and previous frame (TDN eq. 4)."""

from torch import Tensor, zeros_like
from torch.nn import functional as F

from ._contract import (
    Op,
    accumulate_wide,
    check_clips,
    check_shape,
    check_tensor,
    empty_clips,
    from_clips,
    memory_format,
    register,
    to_clips,
)


def bidirectional_difference(
    x: Tensor, weight: Tensor, n_segment: int | None = None, neighbor_first: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Subtracts from each frame a depthwise 3x3 convolution of the next frame, and of the previous one.

    .. math::
        \text{forward}_t = x_t - W * x_{t+1}, \qquad \text{backward}_t = x_t - W * x_{t-1}

    with zero padding; :math:`\text{forward}_{T-1} = \text{backward}_0 = 0`. (TDN eq. 4; the index of the backward
    difference as released.) `neighbor_first` gives the opposite sign (as released).

    Args:
        x: ``[N*T, C, H, W]``, the T frames of a clip adjacent, or ``[N, C, T, H, W]``.
        weight: ``[C, 1, 3, 3]``, one kernel per channel, of x's dtype.
        n_segment: T for a 4-D `x`, which it must divide; None for a 5-D `x`.
        neighbor_first: subtract the frame from its convolved neighbour.

    Returns:
        The forward and the backward difference, each like `x`.

    Raises:
        ValueError: wrong rank, `n_segment` or shape of `weight`.
        TypeError: `x` or `weight` is no dense floating-point tensor, dtypes differ, or `neighbor_first` is no bool.

    Note:
        Contiguous and channels_last tensors and channel slices of them are read in place and the layout is kept. Half
        types are computed in float32 and rounded once. Deterministic, whatever the number of threads: the weight's
        gradient is added up in fixed blocks, in float64 between them.
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
    if 0 in frames.shape[2:]:  # which PyTorch's convolution refuses
        convolved = frames * weight.sum()
    else:
        convolved = F.conv2d(frames.flatten(0, 1), weight, padding=1, groups=x.size(1)).view_as(frames)
    forward, backward = frames[:, :-1] - convolved[:, 1:], frames[:, 1:] - convolved[:, :-1]
    if neighbor_first:
        forward, backward = -forward, -backward
    forward, backward = F.pad(forward, (0, 0, 0, 0, 0, 0, 0, 1)), F.pad(backward, (0, 0, 0, 0, 0, 0, 1, 0))
    layout = memory_format(x)
    return tuple(from_clips(y, x).contiguous(memory_format=layout) for y in (forward, backward))


op = Op("bidirectional_difference", check=_check, reference=_reference)


def _fake(x, weight, n_segment=None, neighbor_first=False):
    return empty_clips(x, n_segment), empty_clips(x, n_segment)


def _fake_backward(grad_forward, grad_backward, x, weight, n_segment, neighbor_first, need_x, need_weight):
    return (
        empty_clips(x, n_segment) if need_x else x.new_empty(0),
        weight.new_empty(weight.shape) if need_weight else weight.new_empty(0),
    )


def _check_backward(grad_forward, grad_backward, x, weight, n_segment, neighbor_first, need_x, need_weight):
    _check(x, weight, n_segment, neighbor_first)


def _save(ctx, inputs, output) -> None:
    x, weight, *ctx.arguments = inputs
    # Only the gradient of the weight reads x.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)


def _backward(ops, ctx, grad_forward, grad_backward):
    x, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    x = grad_forward if x is None else x
    grads = ops.bidirectional_difference_backward(grad_forward, grad_backward, x, weight, *ctx.arguments, *needs)
    return *(grad if need else None for grad, need in zip(grads, needs)), None, None


def _save_backward(ctx, inputs, output) -> None:
    grad_forward, grad_backward, x, weight, *ctx.arguments, ctx.need_x, ctx.need_weight = inputs
    ctx.save_for_backward(grad_forward, grad_backward, x if ctx.need_weight else None, weight)


def _backward_backward(ops, ctx, ddx, ddweight):
    """The differences are bilinear in x and weight, but for the frame itself: that is what a zero weight leaves."""
    grad_forward, grad_backward, x, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    of_forward = of_backward = of_x = of_weight = None
    if ctx.need_x and (needs[0] or needs[1]):
        of_forward, of_backward = ops.bidirectional_difference(ddx, weight, *ctx.arguments)
    if ctx.need_weight and (needs[0] or needs[1]):
        change = ops.bidirectional_difference(x, ddweight, *ctx.arguments)
        frame = ops.bidirectional_difference(x, zeros_like(weight), *ctx.arguments)
        of_forward, of_backward = (
            a - b if of is None else of + a - b for of, a, b in zip((of_forward, of_backward), change, frame)
        )
    if ctx.need_weight and needs[2]:
        grads = grad_forward, grad_backward, x
        change, _ = ops.bidirectional_difference_backward(*grads, ddweight, *ctx.arguments, True, False)
        frame, _ = ops.bidirectional_difference_backward(*grads, zeros_like(weight), *ctx.arguments, True, False)
        of_x = change - frame
    if ctx.need_x and needs[3]:
        grads = grad_forward, grad_backward, ddx
        _, of_weight = ops.bidirectional_difference_backward(*grads, weight, *ctx.arguments, False, True)
    return of_forward, of_backward, of_x, of_weight, None, None, None, None


register("bidirectional_difference", _fake, check=_check, setup_context=_save, backward=_backward)
register(
    "bidirectional_difference_backward",
    _fake_backward,
    check=_check_backward,
    setup_context=_save_backward,
    backward=_backward_backward,
)
