"""Frame difference: the differences of consecutive frames, average-pooled (TDN's short-term module, S-TDM)."""

import torch.nn.functional as F
from torch import Tensor

from ._contract import Op, accumulate_wide, check_int, check_tensor, empty_clips, register


def frame_difference(x: Tensor, n_frames: int = 5, pool: int = 2) -> Tensor:
    r"""Subtracts each frame from the next and pools the differences, in one pass over the frames.

    The F frames :math:`x_0, \dots, x_{F-1}` lie side by side in the channels;

    .. math::
        d_j = \text{avgpool}(x_{j+1} - x_j), \quad 0 \le j < F - 1

    with windows of ``pool`` x ``pool`` and as stride (TDN, the input of S-TDM, as released).

    Args:
        x: ``[M, F*C, H, W]``: M groups of F frames of C channels.
        n_frames: F, at least 2; it must divide the channels of `x`.
        pool: side of the pooling window, at least 1. Rows and columns that fill no window are left out.

    Returns:
        ``[M, (F-1)*C, H // pool, W // pool]``, in the layout of `x`; empty where a side is shorter than `pool`.

    Raises:
        ValueError: wrong rank, `n_frames` or `pool`.
        TypeError: `x` is no dense floating-point tensor.

    Note:
        Contiguous and channels_last tensors and channel slices of them are read in place and the layout is kept.
        float16 and bfloat16 are computed in float32 and rounded once. Deterministic.
    """
    return op(x, n_frames, pool)


def _check(x, n_frames, pool) -> None:
    check_tensor("x", x)
    if x.dim() != 4:
        raise ValueError(f"x must be [M, F*C, H, W], got {x.dim()}-D {list(x.shape)}")
    check_int("n_frames", n_frames, least=2)
    check_int("pool", pool, least=1)
    if x.size(1) % n_frames != 0:
        raise ValueError(f"n_frames={n_frames} does not divide {x.size(1)} channels")


@accumulate_wide
def _reference(x: Tensor, n_frames: int, pool: int) -> Tensor:
    channels = x.size(1) // n_frames
    difference = x[:, channels:] - x[:, : x.size(1) - channels]
    height, width = x.size(2) // pool, x.size(3) // pool
    if 0 in (*difference.shape, height, width):  # avg_pool2d takes no empty maps
        return difference[:, :, :height, :width]
    return F.avg_pool2d(difference, pool)


op = Op("frame_difference", check=_check, reference=_reference)


def _fake(x: Tensor, n_frames: int, pool: int) -> Tensor:
    channels = x.size(1) // n_frames * (n_frames - 1)
    return empty_clips(x, 1, C=channels, H=x.size(2) // pool, W=x.size(3) // pool)


def _fake_backward(dy: Tensor, n_frames: int, pool: int, height: int, width: int) -> Tensor:
    return empty_clips(dy, 1, C=dy.size(1) // (n_frames - 1) * n_frames, H=height, W=width)


def _check_backward(dy, n_frames, pool, height, width) -> None:
    check_tensor("grad", dy)
    check_int("n_frames", n_frames, least=2)
    check_int("pool", pool, least=1)
    if dy.dim() != 4 or dy.size(1) % (n_frames - 1) or dy.size(2) != height // pool or dy.size(3) != width // pool:
        raise ValueError(f"grad must be [M, (F-1)*C, {height // pool}, {width // pool}], got {list(dy.shape)}")


def _save_arguments(ctx, inputs, output) -> None:
    x, ctx.n_frames, ctx.pool = inputs
    ctx.size = x.shape[2:]


def _backward(ops, ctx, dy: Tensor):
    return ops.frame_difference_backward(dy, ctx.n_frames, ctx.pool, *ctx.size), None, None


def _save_backward_arguments(ctx, inputs, output) -> None:
    _, *ctx.arguments, _, _ = inputs


def _double_backward(ops, ctx, ddx: Tensor):
    return ops.frame_difference(ddx, *ctx.arguments), None, None, None, None


# The op is linear: its backward is its transpose, and the backward's backward is the op.
register("frame_difference", _fake, check=_check, setup_context=_save_arguments, backward=_backward)
register(
    "frame_difference_backward",
    _fake_backward,
    check=_check_backward,
    setup_context=_save_backward_arguments,
    backward=_double_backward,
)
