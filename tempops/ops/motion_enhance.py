"""Motion enhancement: the maximum around each pixel of the next frame, minus this frame (MENet eq. 4-5)."""

from torch import Tensor
from torch.nn import functional as F

from ._contract import (
    Op,
    accumulate_wide,
    check_clips,
    check_int,
    clip_shape,
    empty_clips,
    from_clips,
    memory_format,
    register,
    to_clips,
)


def motion_enhance(x: Tensor, n_segment: int | None = None, kernel_size: int = 3) -> Tensor:
    r"""Subtracts each frame from the local maxima of the next: a motion residual that keeps salient points.

    .. math::
        R_t(i, j) = \max_{|a|, |b| \le k // 2} x_{t+1}(i + a, j + b) - x_t(i, j)

    (MENet eq. 4-5, as published), over the elements inside the plane; :math:`k` is `kernel_size`, the stride 1.

    Args:
        x: ``[N*T, C, H, W]``, the T frames of a clip adjacent, or ``[N, C, T, H, W]``; T is at least 2.
        n_segment: T for a 4-D `x`, which it must divide; None for a 5-D `x`.
        kernel_size: the side of the square, odd and at least 1.

    Returns:
        ``[N*(T-1), C, H, W]`` or ``[N, C, T-1, H, W]``, in x's layout.

    Raises:
        ValueError: wrong rank, `n_segment` or `kernel_size`, or fewer than 2 frames.
        TypeError: `x` is no dense floating-point tensor, or an integer argument is none.

    Note:
        Contiguous and channels_last tensors and channel slices of them are read in place and the layout is kept.
        Deterministic. The gradient of a maximum goes to the element that ``F.max_pool2d`` picks: the first of equals in
        row-major order, or the last NaN. A NaN reaches the windows that hold it. Fast for `kernel_size` 3.
    """
    return op(x, n_segment, kernel_size)


def _check(x, n_segment, kernel_size) -> None:
    check_clips(x, n_segment, least_frames=2)
    check_int("kernel_size", kernel_size, least=1)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")


@accumulate_wide
def _reference(x: Tensor, n_segment: int | None, kernel_size: int) -> Tensor:
    frames = to_clips(x, n_segment)
    past, future = frames[:, :-1], frames[:, 1:]
    if 0 in past.shape[2:]:  # which PyTorch's pooling refuses
        return from_clips(past, x).clone()
    peaks = F.max_pool2d(future.flatten(0, 1), kernel_size, stride=1, padding=kernel_size // 2).view_as(future)
    return from_clips(peaks - past, x).contiguous(memory_format=memory_format(x))


op = Op("motion_enhance", check=_check, reference=_reference)


def _fake(x, n_segment=None, kernel_size=3):
    return empty_clips(x, n_segment, T=clip_shape(x, n_segment).T - 1)


def _save(ctx, inputs, output) -> None:
    x, *ctx.arguments = inputs
    ctx.save_for_backward(x)


def _save_second(ctx, inputs, output) -> None:
    _, x, *ctx.arguments = inputs
    ctx.save_for_backward(x)


def _backward(ops, ctx, dy):
    return ops.motion_enhance_backward(dy, *ctx.saved_tensors, *ctx.arguments), None, None


# Which elements won does not change with x, except where two are equal: x itself gets no gradient of second order.
def _backward_backward(ops, ctx, ddx):
    return ops.motion_enhance_gather(ddx, *ctx.saved_tensors, *ctx.arguments), None, None, None


def _gather_backward(ops, ctx, dy):
    return ops.motion_enhance_backward(dy, *ctx.saved_tensors, *ctx.arguments), None, None, None


register("motion_enhance", _fake, check=_check, setup_context=_save, backward=_backward)
register(
    "motion_enhance_backward",
    lambda dy, x, n_segment, *_: empty_clips(x, n_segment),
    check=lambda dy, *arguments: _check(*arguments),
    setup_context=_save_second,
    backward=_backward_backward,
)
register(
    "motion_enhance_gather",
    lambda other, *arguments: _fake(*arguments),
    check=lambda other, *arguments: _check(*arguments),
    setup_context=_save_second,
    backward=_gather_backward,
)
