"""Shift and 1x1 convolution: a convolution that reads its channel groups from the neighbouring frames (TSM)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._contract import (
    Op,
    check_choice,
    check_clips,
    check_int,
    check_shape,
    check_tensor,
    empty_clips,
    is_channels_last,
    register,
)
from .temporal_shift import MODES
from .temporal_shift import _reference as _shift_reference


def shift_conv1x1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    n_segment: int | None = None,
    fold_div: int = 8,
    mode: str = "bidirectional",
    activation: str | None = None,
) -> Tensor:
    r"""Convolves the temporally shifted x with a 1x1 kernel, without writing the shifted tensor where that is faster.

    .. math::
        y_t = \text{act}(W\, \text{shift}(x)_t + b)

    with the shift of :func:`temporal_shift`, as TSM puts it before the first convolution of a residual block (TSM as
    released; MENet eq. 6 for ``reversed``).

    Args:
        x: ``[N*T, C, H, W]``, the T frames of a clip adjacent, or ``[N, C, T, H, W]``.
        weight: ``[Cout, C, 1, 1]``; for a 5-D `x` also ``[Cout, C, 1, 1, 1]``.
        bias: ``[Cout]`` or None.
        n_segment: T for a 4-D `x`, which it must divide; None for a 5-D `x`.
        fold_div: a group that moves is ``C // fold_div`` channels; at least 2, for ``causal`` at least 1.
        mode: ``"bidirectional"``, ``"reversed"`` or ``"causal"``, as in :func:`temporal_shift`.
        activation: None or ``"relu"``.

    Returns:
        ``[N*T, Cout, H, W]`` or ``[N, Cout, T, H, W]``, channels_last exactly where `x` is.

    Raises:
        ValueError: wrong rank, shape, device, `n_segment`, `fold_div`, `mode` or `activation`.
        TypeError: an argument is no dense floating-point tensor or has not x's dtype.

    Note:
        Under autocast it behaves as ``conv2d``: it computes in autocast's dtype. Sums are in float32 (float64 for
        float64) as those of ``conv2d`` are, and on CUDA float32 follows ``torch.backends.cudnn.allow_tf32`` as it does
        there. Contiguous and channels_last tensors and channel slices of them are read in place. Deterministic for a
        given number of threads; where the product is left to ``conv2d`` on CUDA, as deterministic as that.
    """
    return op(x, weight, bias, n_segment, fold_div, mode, activation, _allow_tf32())


@torch.compiler.assume_constant_result
def _allow_tf32() -> bool:
    """What `torch.backends.cudnn.allow_tf32` says, in a way that its successor `fp32_precision` allows too."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


def _check(x, weight, bias, n_segment, fold_div, mode, activation, allow_tf32) -> None:
    channels = check_clips(x, n_segment).C
    if channels == 0:
        raise ValueError(f"x must have at least 1 channel, got {list(x.shape)}")
    check_choice("mode", mode, MODES)
    check_int("fold_div", fold_div, least=1 if mode == "causal" else 2)
    check_choice("activation", activation, (None, "relu"))
    check_tensor("weight", weight, like=x)
    outputs = weight.size(0) if weight.dim() > 0 else 0
    check_shape("weight", weight, *((outputs, channels, *(1,) * sides) for sides in range(2, x.dim() - 1)))
    if bias is not None:
        check_tensor("bias", bias, like=x)
        check_shape("bias", bias, (outputs,))


def _reference(x, weight, bias, n_segment, fold_div, mode, activation, allow_tf32) -> Tensor:
    convolve = F.conv3d if x.dim() == 5 else F.conv2d
    ones = [1] * (x.dim() - 2)
    kernel = weight.reshape(*weight.shape[:2], *ones)
    shifted = _shift_reference(x, n_segment, fold_div, mode)
    if 0 in x.shape[2:]:  # which PyTorch's convolution refuses
        y = torch.einsum("nc...,oc->no...", shifted, kernel.flatten(1))
        y = y if bias is None else y + bias.reshape(-1, *ones)
    else:
        y = convolve(shifted, kernel, bias)
    return y.relu() if activation == "relu" else y


op = Op("shift_conv1x1", check=_check, reference=_reference, autocast="compute")


def _fake(x, weight, bias=None, n_segment=None, *_) -> Tensor:
    return empty_clips(x, n_segment, C=weight.size(0))


def _save(ctx, inputs, output) -> None:
    x, weight, bias, *ctx.arguments, activation, ctx.allow_tf32 = inputs
    ctx.channels_last, ctx.weight_shape = is_channels_last(x), weight.shape
    need_x, need_weight = ctx.needs_input_grad[:2]
    ctx.need_bias = bias is not None and ctx.needs_input_grad[2]
    ctx.save_for_backward(
        x if need_weight else None, weight if need_x else None, output if activation == "relu" else None
    )


def _backward(ops, ctx, dy: Tensor):
    x, weight, output = ctx.saved_tensors
    if output is not None:
        dy = torch.ops.aten.threshold_backward(dy, output, 0)  # where relu gave 0, no gradient passes
    dx, dweight, dbias = ops.shift_conv1x1_backward(
        dy, x, weight, *ctx.arguments, ctx.channels_last, ctx.need_bias, ctx.allow_tf32
    )
    return (
        dx if weight is not None else None,
        dweight.view(ctx.weight_shape) if x is not None else None,
        dbias if ctx.need_bias else None,
        *[None] * 5,
    )


def _fake_backward(dy, x, weight, n_segment, fold_div, mode, channels_last, need_bias, allow_tf32=True):
    layout = torch.contiguous_format
    if channels_last:
        layout = torch.channels_last_3d if dy.dim() == 5 else torch.channels_last
    none = (0,)
    dx_shape = none if weight is None else (dy.size(0), weight.size(1), *dy.shape[2:])
    return (
        torch.empty(
            dx_shape,
            dtype=dy.dtype,
            device=dy.device,
            memory_format=torch.contiguous_format if weight is None else layout,
        ),
        dy.new_empty(none if x is None else (dy.size(1), x.size(1))),
        dy.new_empty(dy.size(1) if need_bias else none),
    )


def _save_backward(ctx, inputs, output) -> None:
    dy, x, weight, *ctx.arguments, ctx.channels_last, ctx.need_bias, ctx.allow_tf32 = inputs
    ctx.save_for_backward(dy, x, weight)


def _double_backward(ops, ctx, ddx, ddweight, ddbias):
    # dx = A^T(dy; weight), dweight = dy shift(x)^T and dbias are linear in each of dy, x and weight.
    dy, x, weight = ctx.saved_tensors
    need_dy, need_x, need_weight = ctx.needs_input_grad[:3]
    ddx = None if weight is None else ddx
    ddweight = None if x is None else ddweight[..., None, None]
    ddbias = ddbias if ctx.need_bias else None
    b_dy = b_x = b_weight = None

    def forward(x, weight):
        return ops.shift_conv1x1(x, weight, None, *ctx.arguments, None, ctx.allow_tf32)

    def backward(x, weight):
        return ops.shift_conv1x1_backward(dy, x, weight, *ctx.arguments, ctx.channels_last, False, ctx.allow_tf32)

    if need_dy:
        parts = []
        if ddx is not None:
            parts.append(forward(ddx, weight))
        if ddweight is not None:
            parts.append(forward(x, ddweight))
        if ddbias is not None:
            parts.append(ddbias.view(-1, *[1] * (dy.dim() - 2)).expand_as(dy))
        b_dy = sum(parts)
    if need_x:
        b_x = backward(None, ddweight)[0]
    if need_weight:
        b_weight = backward(ddx, None)[1].view_as(weight)
    return b_dy, b_x, b_weight, *[None] * 6


register("shift_conv1x1", _fake, check=_check, setup_context=_save, backward=_backward)
register("shift_conv1x1_backward", _fake_backward, setup_context=_save_backward, backward=_double_backward)
