"""Temporal cosine similarity: how alike a pixel's channels are in this frame and in the next one (CMR eq. 7)."""

import numbers

import torch
from torch import Tensor

from ._contract import Op, accumulate_wide, check_clips, empty_clips, from_clips, register, to_clips


def temporal_cosine_similarity(x: Tensor, n_segment: int | None = None, eps: float = 1e-8) -> Tensor:
    r"""Compares every pixel with the same pixel of the next frame, over the channels.

    .. math::
        s_t = \frac{x_t^\top x_{t+1}}{\lVert x_t \rVert \, \lVert x_{t+1} \rVert}, \quad 1 \le t \le T - 1, \qquad
        s_T = s_{T-1}

    (CMR eq. 7, as published). Where either norm is at most `eps`, the similarity and its gradient are 0 (decided here:
    pixels after a ReLU are often all zero).

    Args:
        x: ``[N*T, C, H, W]``, the T frames of a clip adjacent, or ``[N, C, T, H, W]``; T at least 2.
        n_segment: T for a 4-D `x`, which it must divide; None for a 5-D `x`.
        eps: the norm up to which a pixel counts as zero, in units of `x`; at least 0.

    Returns:
        ``[N*T, 1, H, W]`` or ``[N, 1, T, H, W]``, in [-1, 1] up to rounding.

    Raises:
        ValueError: wrong rank, `n_segment` or `eps`, or a single frame a clip.
        TypeError: `x` is no dense floating-point tensor, or `eps` no number.

    Note:
        Contiguous and channels_last tensors and channel slices of them are read in place. Deterministic; sums are in
        float32 or wider (float64 for float64). NaN in a frame reaches the pairs that it is in.
    """
    return op(x, n_segment, eps)


def check_similarity(x, n_segment, eps) -> None:
    check_clips(x, n_segment, least_frames=2)
    if isinstance(eps, bool) or not isinstance(eps, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"eps must be a float, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")


def _inverse_norm(clips: Tensor, eps: float) -> Tensor:
    """1 / |x| over the channels of ``[N, T, C, H, W]``; 0, with zero gradient, where the norm is at most eps."""
    square = clips.square().sum(2, keepdim=True)
    still = square.sqrt() <= eps
    return torch.where(still, 0, torch.where(still, 1, square).rsqrt())


@accumulate_wide
def similarity(x: Tensor, n_segment: int | None, eps: float) -> Tensor:
    clips = to_clips(x, n_segment)
    inverse = _inverse_norm(clips, eps)
    s = (clips[:, :-1] * clips[:, 1:]).sum(2, keepdim=True) * inverse[:, :-1] * inverse[:, 1:]
    return from_clips(torch.cat([s, s[:, -1:]], 1), x)


op = Op("temporal_cosine_similarity", check=check_similarity, reference=similarity)


@accumulate_wide
def similarity_second_derivative(x: Tensor, ds: Tensor, ddx: Tensor, n_segment: int | None, eps: float):
    """The gradients to ds and x of <ddx, dx>, where dx is the gradient that ds gives to x.

    With u = x / |x| and the projection p(v) = (v - <v, u> u) / |x|, both 0 where the norm is at most eps, dx is
    p(du) for du[t] = ds[t] u[t+1] + ds[t-1] u[t-1], after the last frame's ds was added to the one before.
    """
    clips, ds, v = (to_clips(a, n_segment) for a in (x, ds, ddx))
    ds = torch.cat([ds[:, :-2], ds[:, -2:].sum(1, keepdim=True)], 1)
    inverse = _inverse_norm(clips, eps)
    u = clips * inverse

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(2, keepdim=True)

    def project(a: Tensor) -> Tensor:
        return inverse * (a - dot(a, u) * u)

    def neighbours(a: Tensor) -> Tensor:
        nothing = torch.zeros_like(a[:, :1])
        return torch.cat([ds * a[:, 1:], nothing], 1) + torch.cat([nothing, ds * a[:, :-1]], 1)

    du, pv = neighbours(u), project(v)
    to_ds = dot(pv[:, :-1], u[:, 1:]) + dot(pv[:, 1:], u[:, :-1])
    to_x = project(neighbours(pv)) - inverse * (dot(pv, du) * u + dot(u, du) * pv + dot(v, u) * project(du))
    return from_clips(torch.cat([to_ds, to_ds[:, -1:]], 1), x), from_clips(to_x, x)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.n_segment, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ops, ctx, ds: Tensor):
    (x,) = ctx.saved_tensors
    return ops.temporal_cosine_similarity_backward(ds, x, ctx.n_segment, ctx.eps), None, None


def _double_backward(ops, ctx, ddx: Tensor):
    ds, x = ctx.saved_tensors
    return *similarity_second_derivative(x, ds, ddx, ctx.n_segment, ctx.eps), None, None


def _fake(x, n_segment=None, eps=1e-8):
    return empty_clips(x, n_segment, C=1)


register("temporal_cosine_similarity", _fake, check=check_similarity, setup_context=_save, backward=_backward)
register(
    "temporal_cosine_similarity_backward",
    lambda ds, x, n_segment, eps: empty_clips(x, n_segment),
    check=lambda ds, *arguments: check_similarity(*arguments),
    setup_context=_save,
    backward=_double_backward,
)
