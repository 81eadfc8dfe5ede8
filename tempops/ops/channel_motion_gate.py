"""Channel motion gate: channel weights from the pooled frames of a clip, mixed by how much they differ (CMR's CME)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._contract import Op, accumulate_wide, check_int, check_shape, check_tensor, register


def channel_motion_gate(pooled: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, n_segment: int) -> Tensor:
    r"""Gates each frame's channels, with the other frames of its clip mixed in, the different ones most.

    For the pooled frames :math:`\bar x_t` of a clip (CMR eq. 2-6, as published),

    .. math::
        z_t = W_1 \bar x_t, \quad k_t = W_2 \bar x_t, \quad \hat d_{tj} = \text{softmax}_j(-k_t \cdot k_j),

        \hat z_t = z_t + \sum_j \hat d_{tj} z_j, \quad a_t = \sigma(W_3 \hat z_t)

    where j runs over all T frames, t among them.

    Args:
        pooled: ``[N*T, C]``, the global average pool of each frame, the T frames of a clip adjacent.
        w1: ``[C/r, C]``, for the features that are mixed.
        w2: ``[C/r, C]``, for the features that are compared.
        w3: ``[C, C/r]``, back to the channels.
        n_segment: T; it must divide N*T.

    Returns:
        The weights :math:`a`, ``[N*T, C]`` in (0, 1), to be multiplied with the frames' channels.

    Raises:
        ValueError: wrong rank, shape of a weight, device or `n_segment`.
        TypeError: an argument is no dense floating-point tensor or has not `pooled`'s dtype.

    Note:
        float16 and bfloat16 are computed in float32 and rounded once. Deterministic. The result is contiguous.
    """
    return op(pooled, w1, w2, w3, n_segment)


def _check(pooled, w1, w2, w3, n_segment) -> None:
    check_tensor("pooled", pooled)
    if pooled.dim() != 2:
        raise ValueError(f"pooled must be [N*T, C], got {pooled.dim()}-D {list(pooled.shape)}")
    check_int("n_segment", n_segment, least=1)
    frames, channels = pooled.shape
    if frames % n_segment != 0:
        raise ValueError(f"n_segment={n_segment} does not divide {frames} frames")
    for name, weight in (("w1", w1), ("w2", w2), ("w3", w3)):
        check_tensor(name, weight, like=pooled)
    if w1.dim() != 2 or w1.size(1) != channels:
        raise ValueError(f"w1 must be [C/r, C] with C = {channels}, got {list(w1.shape)}")
    check_shape("w2", w2, w1.shape)
    check_shape("w3", w3, w1.shape[::-1])


@accumulate_wide
def _reference(pooled: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, n_segment: int) -> Tensor:
    clips = (pooled.size(0) // n_segment, n_segment)
    z, k = F.linear(pooled, w1).unflatten(0, clips), F.linear(pooled, w2).unflatten(0, clips)
    mixing = (-(k @ k.transpose(1, 2))).softmax(-1)
    return F.linear((z + mixing @ z).flatten(0, 1), w3).sigmoid()


op = Op("channel_motion_gate", check=_check, reference=_reference, recorded="channel_motion_gate_forward")


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.n_segment = inputs
    ctx.save_for_backward(*tensors, output)


def _backward(ops, ctx, grad: Tensor):
    *inputs, output = ctx.saved_tensors
    _, z, k = ops.channel_motion_gate_forward(*inputs, ctx.n_segment)
    return _gradients(ops, ctx, grad, *inputs, output, z, k)


def _save_features(ctx, inputs, output) -> None:
    *tensors, ctx.n_segment = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output)


def _backward_of_features(ops, ctx, grad: Tensor, *_):
    return _gradients(ops, ctx, grad, *ctx.saved_tensors)


def _gradients(ops, ctx, grad: Tensor, *saved: Tensor):
    needed = ctx.needs_input_grad[:4]
    grads = ops.channel_motion_gate_backward(grad, *saved, ctx.n_segment, *needed)
    return *(g if need else None for g, need in zip(grads, needed)), None


def _fake_forward(pooled, w1, w2, w3, n_segment):
    wide = torch.promote_types(pooled.dtype, torch.float32)
    features = (pooled.new_empty(pooled.size(0), w1.size(0), dtype=wide) for _ in range(2))
    return pooled.new_empty(pooled.shape), *features


def _check_backward(grad, pooled, w1, w2, w3, output, z, k, n_segment, *needed) -> None:
    _check(pooled, w1, w2, w3, n_segment)
    for name, x in (("grad", grad), ("output", output)):
        check_shape(name, x, pooled.shape)
    for name, x in (("z", z), ("k", k)):
        check_shape(name, x, (pooled.size(0), w1.size(0)))


def _fake_backward(grad, pooled, w1, w2, w3, output, z, k, n_segment, *needed):
    return tuple(
        torch.empty(x.shape if need else 0, dtype=x.dtype, device=x.device)
        for x, need in zip((pooled, w1, w2, w3), needed)
    )


def _save_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.n_segment, *ctx.needed = inputs[8:]


def _double_backward(ops, ctx, *upstream):
    """The derivative of the backward: its equations from last to first, each in plain PyTorch.

    z and k are taken as the functions of `pooled` that they are, and get no gradient of their own.
    """
    grads = _derivative(*ctx.saved_tensors, *upstream, ctx.n_segment, ctx.needed)
    return *grads, None, None, None, None, None, None, None


def _derivative(grad, pooled, w1, w2, w3, output, up, u1, u2, u3, n_segment, needed):
    dtype = grad.dtype
    wide = torch.promote_types(dtype, torch.float32)
    tensors = (grad, pooled, w1, w2, w3, output)
    grad, pooled, w1, w2, w3, output = (x.to(wide) for x in tensors)
    up, u1, u2, u3 = (
        u.to(wide) if need else torch.zeros_like(x)
        for u, x, need in zip((up, u1, u2, u3), (pooled, w1, w2, w3), needed)
    )

    def clips(x: Tensor) -> Tensor:
        return x.unflatten(0, (x.size(0) // n_segment, n_segment))

    def outer(a: Tensor, b: Tensor) -> Tensor:
        return a @ b.mT

    # The backward, with [N, T, R] for what is mixed. `g_` is the gradient of a name of the forward ...
    z, k = clips(pooled @ w1.mT), clips(pooled @ w2.mT)
    mixing = (-outer(k, k)).softmax(-1)
    mixed = z + mixing @ z
    g_logits = grad * output * (1 - output)
    g_mixed = clips(g_logits @ w3)
    g_mixing = outer(g_mixed, z)
    centred = g_mixing - (mixing * g_mixing).sum(-1, keepdim=True)
    g_scores = mixing * centred
    symmetric = g_scores + g_scores.mT
    g_z, g_k = g_mixed + mixing.mT @ g_mixed, -(symmetric @ k)

    # ... and `b_` what comes back to a name of the forward or of the backward (`b_g_...`).
    b_g_z = clips(up @ w1.mT + pooled @ u1.mT)
    b_g_k = clips(up @ w2.mT + pooled @ u2.mT)
    b_symmetric = -outer(b_g_k, k)
    b_g_scores = b_symmetric + b_symmetric.mT
    weighted = mixing * b_g_scores
    b_g_mixing = weighted - mixing * weighted.sum(-1, keepdim=True)
    b_mixing = b_g_scores * centred - g_mixing * weighted.sum(-1, keepdim=True) + outer(g_mixed, b_g_z)
    b_g_mixed = (b_g_z + mixing @ b_g_z + b_g_mixing @ z).flatten(0, 1)
    b_mixed = clips(g_logits @ u3)
    b_mixing = b_mixing + outer(b_mixed, z)
    b_scores = mixing * (b_mixing - (mixing * b_mixing).sum(-1, keepdim=True))
    b_z = (b_mixed + mixing.mT @ b_mixed + b_g_mixing.mT @ g_mixed).flatten(0, 1)
    b_k = (-(symmetric @ b_g_k) - (b_scores + b_scores.mT) @ k).flatten(0, 1)
    b_g_logits = mixed.flatten(0, 1) @ u3.mT + b_g_mixed @ w3.mT
    g_z, g_k = g_z.flatten(0, 1), g_k.flatten(0, 1)

    b_grad = b_g_logits * output * (1 - output)
    b_pooled = g_z @ u1 + g_k @ u2 + b_z @ w1 + b_k @ w2
    b_w1 = g_z.mT @ up + b_z.mT @ pooled
    b_w2 = g_k.mT @ up + b_k.mT @ pooled
    b_w3 = g_logits.mT @ b_g_mixed
    b_output = b_g_logits * grad * (1 - 2 * output)
    return tuple(b.to(dtype) for b in (b_grad, b_pooled, b_w1, b_w2, b_w3, b_output))


register(
    "channel_motion_gate",
    lambda pooled, *_: torch.empty(pooled.shape, dtype=pooled.dtype, device=pooled.device),
    check=_check,
    setup_context=_save,
    backward=_backward,
)
register(
    "channel_motion_gate_forward",
    _fake_forward,
    check=_check,
    setup_context=_save_features,
    backward=_backward_of_features,
)
register(
    "channel_motion_gate_backward",
    _fake_backward,
    check=_check_backward,
    setup_context=_save_backward,
    backward=_double_backward,
)
