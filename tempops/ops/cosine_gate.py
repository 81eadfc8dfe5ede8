"""Cosine gate: pixels that resemble the next frame's are damped, so that moving areas stand out (CMR eq. 8)."""

from torch import Tensor

from ._contract import Op, accumulate_wide, empty_clips, register
from .temporal_cosine_similarity import check_similarity, similarity, similarity_second_derivative


def cosine_gate(x: Tensor, n_segment: int | None = None, eps: float = 1e-8) -> Tensor:
    r"""Multiplies every pixel by one minus its similarity to the same pixel of the next frame.

    .. math::
        y_t = x_t \circ (1 - s_t)

    with :math:`s` of :func:`temporal_cosine_similarity` (CMR eq. 7-8, as published; the convolution, batch
    normalisation and residual of eq. 8 are the layer's).

    Args:
        x: ``[N*T, C, H, W]``, the T frames of a clip adjacent, or ``[N, C, T, H, W]``; T at least 2.
        n_segment: T for a 4-D `x`, which it must divide; None for a 5-D `x`.
        eps: the norm up to which a pixel counts as zero, in units of `x`; at least 0. Such pixels pass unchanged.

    Returns:
        A tensor like `x`.

    Raises:
        ValueError: wrong rank, `n_segment` or `eps`, or a single frame a clip.
        TypeError: `x` is no dense floating-point tensor, or `eps` no number.

    Note:
        Contiguous and channels_last tensors and channel slices of them are read in place and the layout is kept.
        Deterministic; sums are in float32 or wider (float64 for float64). NaN in a frame reaches the pairs that it is
        in.
    """
    return op(x, n_segment, eps)


@accumulate_wide
def _reference(x: Tensor, n_segment: int | None, eps: float) -> Tensor:
    return x * (1 - similarity(x, n_segment, eps))


op = Op("cosine_gate", check=check_similarity, reference=_reference)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.n_segment, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ops, ctx, dy: Tensor):
    (x,) = ctx.saved_tensors
    return ops.cosine_gate_backward(dy, x, ctx.n_segment, ctx.eps), None, None


def _double_backward(ops, ctx, ddx: Tensor):
    dy, x = ctx.saved_tensors
    return *_second_derivative(x, dy, ddx, ops, ctx.n_segment, ctx.eps), None, None


@accumulate_wide
def _second_derivative(x: Tensor, dy: Tensor, ddx: Tensor, ops, n_segment: int | None, eps: float):
    """The gradients to dy and x of <ddx, dx>, with dx = dy * (1 - s) - (the gradient that <dy, x> as ds gives to x)."""
    arguments = n_segment, eps
    gradient = (dy * x).sum(1, keepdim=True)
    to_gradient, to_x = similarity_second_derivative(x, gradient, ddx, *arguments)
    to_dy = ddx * (1 - ops.temporal_cosine_similarity(x, *arguments)) - to_gradient * x
    through_s = ops.temporal_cosine_similarity_backward((ddx * dy).sum(1, keepdim=True), x, *arguments)
    return to_dy, -to_gradient * dy - to_x - through_s


register(
    "cosine_gate",
    lambda x, n_segment=None, *_: empty_clips(x, n_segment),
    check=check_similarity,
    setup_context=_save,
    backward=_backward,
)
register(
    "cosine_gate_backward",
    lambda dy, x, n_segment, eps: empty_clips(x, n_segment),
    check=lambda dy, *arguments: check_similarity(*arguments),
    setup_context=_save,
    backward=_double_backward,
)
