"""Temporal convolution: every channel is filtered along time, optionally gated first (TIM, LTS, TEFE, TAM)."""

from torch import Tensor

from ._contract import (
    Op,
    accumulate_wide,
    check_clips,
    check_shape,
    check_tensor,
    clip_shape,
    empty_clips,
    from_clips,
    needs,
    register,
    to_clips,
)


def temporal_conv(x: Tensor, weight: Tensor, n_segment: int | None = None, gate: Tensor | None = None) -> Tensor:
    r"""Filters each channel along time with its own kernel, after an optional gate.

    .. math:: y_t = \sum_{k=0}^{K-1} w_k \, g_{t+k-P} \, x_{t+k-P}, \qquad P = \lfloor K/2 \rfloor

    Taps outside the clip contribute exactly 0. It is TEINet's TIM and GTE's LTS with one kernel a channel, TEFE eq. 6
    and TANet's TAM with one kernel a clip and channel; `gate` is CMR's CME before the TIM, and TEFE eq. 4.

    Args:
        x: ``[N*T, C, H, W]``, the T frames of a clip adjacent, or ``[N, C, T, H, W]``.
        weight: ``[C, K]``, one kernel a channel; ``[G, K]`` with G dividing C, one for C/G adjacent channels;
            ``[N, C, K]``, one a clip and channel. K is odd; 3 and 5 are fast.
        n_segment: T for a 4-D `x`, which it must divide; None for a 5-D `x`.
        gate: ``[N*T, C]``, multiplied into the frames before the taps; None for no gate.

    Returns:
        A tensor like `x`.

    Raises:
        ValueError: wrong rank or `n_segment`, a `weight` or `gate` of another shape or device, K even.
        TypeError: an argument is no dense floating-point tensor, or not of x's dtype.

    Note:
        Contiguous and channels_last tensors and channel slices of them are read in place and the layout is kept.
        float16 and bfloat16 are added up in float32. Deterministic, gradients to all three tensors included.
    """
    return op(x, weight, n_segment, gate)


def _check(x, weight, n_segment, gate) -> None:
    shape = check_clips(x, n_segment)
    check_tensor("weight", weight, like=x)
    if weight.dim() not in (2, 3):
        raise ValueError(f"weight must be [C, K], [G, K] or [N, C, K], got {weight.dim()}-D {list(weight.shape)}")
    taps = weight.size(-1)
    if taps % 2 == 0:
        raise ValueError(f"weight must have an odd number of taps K, got shape {list(weight.shape)}")
    if weight.dim() == 3:
        check_shape("weight", weight, (shape.N, shape.C, taps))
    elif weight.size(0) == 0 or shape.C % weight.size(0) != 0:
        raise ValueError(f"weight has {weight.size(0)} kernels, which does not divide {shape.C} channels")
    if gate is not None:
        check_tensor("gate", gate, like=x)
        check_shape("gate", gate, (shape.N * shape.T, shape.C))


@accumulate_wide
def _reference(x: Tensor, weight: Tensor, n_segment: int | None, gate: Tensor | None) -> Tensor:
    n, t, c, _, _ = clip_shape(x, n_segment)
    frames = to_clips(x, n_segment)
    if gate is not None:
        frames = frames * gate.view(n, t, c, 1, 1)
    taps = weight.size(-1)
    if weight.dim() == 2:
        weight = weight.repeat_interleave(c // weight.size(0), 0)
    kernels = weight.view(-1, 1, c, taps, 1, 1)  # [N or 1, T, C, K, H, W]
    y = frames * kernels[:, :, :, taps // 2]
    for k in range(taps):
        offset = k - taps // 2
        if 0 < offset < t:
            y[:, :-offset] += frames[:, offset:] * kernels[:, :, :, k]
        elif -t < offset < 0:
            y[:, -offset:] += frames[:, :offset] * kernels[:, :, :, k]
    return from_clips(y, x)


op = Op("temporal_conv", check=_check, reference=_reference)


def _fake_backward(dy, x, weight, n_segment, gate, need_x, need_weight, need_gate):
    return (
        empty_clips(x, n_segment) if need_x else x.new_empty(0),
        weight.new_empty(weight.shape) if need_weight else weight.new_empty(0),
        gate.new_empty(gate.shape) if need_gate else weight.new_empty(0),
    )


def _check_backward(dy, x, weight, n_segment, gate, need_x, need_weight, need_gate) -> None:
    _check(x, weight, n_segment, gate)
    if need_gate and gate is None:
        raise ValueError("gate is None, so it has no gradient")


def _save(ctx, inputs, output) -> None:
    x, weight, ctx.n_segment, gate = inputs
    ctx.save_for_backward(x, weight, gate)


def _backward(ops, ctx, dy):
    x, weight, gate = ctx.saved_tensors
    need_x, need_weight, _, need_gate = needs(ctx, 4)
    dx, dweight, dgate = ops.temporal_conv_backward(dy, x, weight, ctx.n_segment, gate, need_x, need_weight, need_gate)
    return dx if need_x else None, dweight if need_weight else None, None, dgate if need_gate else None


def _save_backward(ctx, inputs, output) -> None:
    dy, x, weight, ctx.n_segment, gate, *ctx.needed = inputs
    ctx.save_for_backward(dy, x, weight, gate)


def _double_backward(ops, ctx, ddx, ddweight, ddgate):
    """y is linear in each of x, weight and gate, so each term replaces one of them by what flows into its gradient."""
    dy, x, weight, gate = ctx.saved_tensors
    inputs = {"x": x, "weight": weight, "gate": gate}
    arrived = dict(zip(inputs, (ddx, ddweight, ddgate)))
    wants = dict(zip(("dy", *inputs), (*ctx.needs_input_grad[:3], ctx.needs_input_grad[4])))
    grads = dict.fromkeys(wants)

    def add(name: str, value: Tensor) -> None:
        grads[name] = value if grads[name] is None else grads[name] + value

    for replaced, needed in zip(inputs, ctx.needed):
        if not needed:
            continue
        at = inputs | {replaced: arrived[replaced]}
        arguments = (at["x"], at["weight"], ctx.n_segment, at["gate"])
        if wants["dy"]:
            add("dy", ops.temporal_conv(*arguments))
        others = [wants[name] and name != replaced for name in inputs]
        if any(others):
            for name, other, value in zip(inputs, others, ops.temporal_conv_backward(dy, *arguments, *others)):
                if other:
                    add(name, value)
    return grads["dy"], grads["x"], grads["weight"], None, grads["gate"], None, None, None


register(
    "temporal_conv",
    lambda x, weight, n_segment, gate: empty_clips(x, n_segment),
    check=_check,
    setup_context=_save,
    backward=_backward,
)
register(
    "temporal_conv_backward",
    _fake_backward,
    check=_check_backward,
    setup_context=_save_backward,
    backward=_double_backward,
)
