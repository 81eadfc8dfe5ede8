"""Motion attention: frames are enhanced by the mean of two sigmoid attention maps (TDN eq. 2, 6)."""

import torch
from torch import Tensor

from ._contract import Op, accumulate_wide, check_shape, check_tensor, empty_clips, register


def motion_attention(x: Tensor, forward: Tensor, backward: Tensor, centered: bool = False) -> Tensor:
    r"""Adds to x its product with the mean of the two directions' attention.

    .. math::
        y = x + x \circ \tfrac12 \left( \sigma(\text{forward}) + \sigma(\text{backward}) \right)

    (TDN eq. 2 and 6, as published). ``centered=True`` subtracts 0.5 from each sigmoid (TDN as released).

    Args:
        x: ``[N*T, C, H, W]`` or ``[N, C, T, H, W]``.
        forward: the logits of the attention to the next frame; shape, dtype and device of `x`.
        backward: the logits of the attention to the previous frame; the same.
        centered: whether logits of 0 leave `x` as it is.

    Returns:
        A tensor like `x`.

    Raises:
        ValueError: wrong rank, or a shape or device that is not that of `x`.
        TypeError: an argument is no dense floating-point tensor, a dtype is not that of `x`, or `centered` no bool.

    Note:
        Contiguous and channels_last tensors and channel slices of them are read in place and the layout of `x` is kept;
        logits in another layout than that of `x` are copied. Deterministic; float16 and bfloat16 compute in float32.
    """
    return op(x, forward, backward, centered)


def _check(x, forward, backward, centered) -> None:
    check_tensor("x", x)
    if x.dim() not in (4, 5):
        raise ValueError(f"x must be [N*T, C, H, W] or [N, C, T, H, W], got {x.dim()}-D {list(x.shape)}")
    for name, logits in (("forward", forward), ("backward", backward)):
        check_tensor(name, logits, like=x)
        check_shape(name, logits, x.shape)
    if not isinstance(centered, bool):
        raise TypeError(f"centered must be a bool, got {type(centered).__name__}")


@accumulate_wide
def _reference(x: Tensor, forward: Tensor, backward: Tensor, centered: bool) -> Tensor:
    attention = 0.5 * (torch.sigmoid(forward) + torch.sigmoid(backward))
    return x + x * (attention - 0.5 if centered else attention)


op = Op("motion_attention", check=_check, reference=_reference)


@accumulate_wide
def _second_derivative(x: Tensor, dy: Tensor, forward: Tensor, backward: Tensor, ddx, ddforward, ddbackward, centered):
    """The gradients to dy, x, forward and backward of <ddx, dx> + <ddforward, dforward> + <ddbackward, dbackward>."""
    scale, slope, to_logits = (0.5 if centered else 1.0), 0, []
    for logits, ddlogits in ((forward, ddforward), (backward, ddbackward)):
        sigmoid = torch.sigmoid(logits)
        first = 0.5 * sigmoid * (1 - sigmoid)
        scale = scale + 0.5 * sigmoid
        slope = slope + first * ddlogits
        to_logits.append(dy * first * (ddx + x * (1 - 2 * sigmoid) * ddlogits))
    return ddx * scale + x * slope, dy * slope, *to_logits


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.centered = inputs
    ctx.save_for_backward(*tensors)


def _backward(ops, ctx, dy: Tensor):
    needs = ctx.needs_input_grad[:3]
    grads = ops.motion_attention_backward(dy, *ctx.saved_tensors, ctx.centered, *needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None


def _save_backward(ctx, inputs, output) -> None:
    *tensors, ctx.centered, ctx.need_x, ctx.need_forward, ctx.need_backward = inputs
    ctx.save_for_backward(*tensors)


def _double_backward(ops, ctx, *ddgrads: Tensor):
    dy, x, forward, backward = ctx.saved_tensors
    needs = (ctx.need_x, ctx.need_forward, ctx.need_backward)
    dds = (dd if need and dd is not None else torch.zeros_like(x) for dd, need in zip(ddgrads, needs, strict=True))
    return *_second_derivative(x, dy, forward, backward, *dds, ctx.centered), *[None] * 4


def _fake_backward(dy, x, forward, backward, centered, *needs):
    return tuple(empty_clips(x, 1 if x.dim() == 4 else None) if need else x.new_empty(0) for need in needs)


def _fake(x, forward, backward, centered=False):
    return empty_clips(x, 1 if x.dim() == 4 else None)


register("motion_attention", _fake, check=_check, setup_context=_save, backward=_backward)
register(
    "motion_attention_backward",
    _fake_backward,
    check=lambda dy, *arguments: _check(*arguments[:4]),
    setup_context=_save_backward,
    backward=_double_backward,
)
