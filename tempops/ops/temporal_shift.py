"""Temporal shift: a part of the channels is read from the next or the previous frame (TSM; MENet eq. 6)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _backend
from ._contract import (
    Op,
    check_choice,
    check_clips,
    check_int,
    empty_clips,
    from_clips,
    is_transformed,
    register,
    register_inplace,
    to_clips,
)

MODES = ("bidirectional", "reversed", "causal")


def temporal_shift(x: Tensor, n_segment: int | None = None, fold_div: int = 8, mode: str = "bidirectional") -> Tensor:
    r"""Moves two groups of channels by one frame, in opposite directions, at no arithmetic.

    With :math:`f = \lfloor C / \text{fold\_div} \rfloor` and zeros outside the clip,

    .. math::
        y_t[0:f] = x_{t+1}[0:f], \quad y_t[f:2f] = x_{t-1}[f:2f], \quad y_t[2f:] = x_t[2f:]

    (``bidirectional``: TSM as released). ``reversed`` exchanges t+1 and t-1 (MENet eq. 6, as published). ``causal``
    reads t-1 in the first group and leaves all others (TSM's online model, as released).

    Args:
        x: ``[N*T, C, H, W]``, the T frames of a clip adjacent, or ``[N, C, T, H, W]``.
        n_segment: T for a 4-D `x`, which it must divide; None for a 5-D `x`.
        fold_div: the group is ``C // fold_div`` channels; at least 2 where two groups move, at least 1 for ``causal``.
        mode: ``"bidirectional"``, ``"reversed"`` or ``"causal"``.

    Returns:
        A tensor like `x`.

    Raises:
        ValueError: wrong rank, `n_segment`, `fold_div` or `mode`.
        TypeError: `x` is no dense floating-point tensor.

    Note:
        Contiguous and channels_last tensors and channel slices of them are read in place and the layout is kept.
        The values are moved, not computed: exact in every dtype, deterministic, NaN stays in its channel group.
    """
    return op(x, n_segment, fold_div, mode)


def temporal_shift_(x: Tensor, n_segment: int | None = None, fold_div: int = 8, mode: str = "bidirectional") -> Tensor:
    """The same as :func:`temporal_shift`, in place: only the shifted channels are touched.

    It differentiates as any in-place function does: `x` may be no leaf that requires a gradient, and no tensor that an
    earlier op keeps for its backward. `x` must not overlap itself (an expanded tensor, sliding windows). Returns `x`.
    """
    _check_inplace(x, n_segment, fold_div, mode)
    namespace = None if is_transformed() else _backend.namespace(x.device.type, "temporal_shift_")
    if namespace is None:
        return _reference_inplace(x, n_segment, fold_div, mode)
    if torch.compiler.is_compiling():  # a compiler has no in-place: this is what it makes of one
        return x.copy_(op(x, n_segment, fold_div, mode))
    if torch.is_grad_enabled() and x.requires_grad:
        return _InPlace.apply(x, getattr(torch.ops, namespace), n_segment, fold_div, mode)
    getattr(torch.ops, namespace).temporal_shift_(x, n_segment, fold_div, mode)
    return x


def _offsets(mode: str) -> tuple[int, int]:
    """The frame offsets that the two groups read at."""
    return {"bidirectional": (1, -1), "reversed": (-1, 1), "causal": (-1, 0)}[mode]


def _check(x, n_segment, fold_div, mode) -> None:
    check_clips(x, n_segment)
    check_choice("mode", mode, MODES)
    check_int("fold_div", fold_div, least=1 if mode == "causal" else 2)


def _reference(x: Tensor, n_segment: int | None, fold_div: int, mode: str) -> Tensor:
    fold = x.size(1) // fold_div
    groups, offsets = (slice(0, fold), slice(fold, 2 * fold), slice(2 * fold, None)), (*_offsets(mode), 0)
    if torch.jit.is_tracing():  # which makes constants of what slices are written to
        frames = F.pad(to_clips(x, n_segment), (0, 0, 0, 0, 0, 0, 1, 1))
        parts = [frames[:, 1 + o : frames.size(1) - 1 + o, group] for group, o in zip(groups, offsets)]
        return from_clips(torch.cat(parts, 2), x)
    y = torch.zeros_like(x)
    source, target = to_clips(x, n_segment), to_clips(y, n_segment)
    for group, offset in zip(groups, offsets):
        if offset > 0:
            target[:, :-1, group] = source[:, 1:, group]
        elif offset < 0:
            target[:, 1:, group] = source[:, :-1, group]
        else:
            target[:, :, group] = source[:, :, group]
    return y


def _check_inplace(x, n_segment, fold_div, mode) -> None:
    _check(x, n_segment, fold_div, mode)
    if _may_overlap(x):
        raise ValueError(f"x must not overlap itself to be shifted in place, got strides {x.stride()}")


def _may_overlap(x: Tensor) -> bool:
    """Whether a stride does not pass all that the smaller ones reach. True of some views whose elements lie apart."""
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape) if size > 1):
        if stride <= reach:
            return x.numel() > 0
        reach += stride * (size - 1)
    return False


def _reference_inplace(x: Tensor, n_segment: int | None, fold_div: int, mode: str) -> Tensor:
    moving = x[:, : (1 if mode == "causal" else 2) * (x.size(1) // fold_div)]
    moving.copy_(_reference(x, n_segment, fold_div, mode)[:, : moving.size(1)])
    return x


op = Op("temporal_shift", check=_check, reference=_reference)


def _save_arguments(ctx, inputs, output) -> None:
    _, *ctx.arguments = inputs


# The shift is linear: its backward is its transpose, and the backward's backward is the shift.
register(
    "temporal_shift",
    lambda x, n_segment=None, *_: empty_clips(x, n_segment),
    check=_check,
    setup_context=_save_arguments,
    backward=lambda ops, ctx, dy: (ops.temporal_shift_backward(dy, *ctx.arguments), None, None, None),
)
register(
    "temporal_shift_backward",
    lambda dy, n_segment, *_: empty_clips(dy, n_segment),
    check=_check,
    setup_context=_save_arguments,
    backward=lambda ops, ctx, ddx: (ops.temporal_shift(ddx, *ctx.arguments), None, None, None),
)
register_inplace("temporal_shift_", check=_check_inplace)


class _InPlace(torch.autograd.Function):
    """What differentiates temporal_shift_: an entry of torch.ops can not mark its argument as changed."""

    @staticmethod
    def forward(ctx, x, ops, *arguments):
        ops.temporal_shift_(x, *arguments)
        ctx.mark_dirty(x)
        ctx.ops, ctx.arguments = ops, arguments
        return x

    @staticmethod
    def backward(ctx, dy):
        return ctx.ops.temporal_shift_backward(dy, *ctx.arguments), None, None, None, None
