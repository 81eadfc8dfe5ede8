"""channel_motion_gate in Triton. The products with the weights are PyTorch's; what lies between them, the mixing of a
clip's frames, is kernels. A program has one frame t: its row of the [T, T] matrices, a block of features at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import check_like, entry, nothing, power_of_two, wrap_triton

FEATURES = 32  # of a block


@triton.jit
def scores_of(a, b, t, T, R, FRAMES: tl.constexpr, FEATURES: tl.constexpr):
    """<a_t, b_j> for the frames j of a clip."""
    j = tl.arange(0, FRAMES)
    sums = tl.zeros([FRAMES, FEATURES], a.dtype.element_ty)
    for block in range(tl.cdiv(R, FEATURES)):
        r = block * FEATURES + tl.arange(0, FEATURES)
        row = tl.load(a + t * R + r, mask=r < R, other=0)
        mask = (j < T)[:, None] & (r < R)[None, :]
        sums += row[None, :] * tl.load(b + j[:, None] * R + r[None, :], mask=mask, other=0)
    return tl.sum(sums, 1)


@triton.jit
def mixing_of(k, t, T, R, FRAMES: tl.constexpr, FEATURES: tl.constexpr):
    """Row t of softmax over j of -k_t.k_j."""
    j = tl.arange(0, FRAMES)
    scores = tl.where(j < T, -scores_of(k, k, t, T, R, FRAMES, FEATURES), float("-inf"))
    powers = tl.exp(scores - tl.max(scores, 0))
    return powers / tl.sum(powers, 0)


@triton.jit
def weighted(weights, x, r, T, R, FRAMES: tl.constexpr):
    """sum_j weights_j x_j of some features r."""
    j = tl.arange(0, FRAMES)
    mask = (j < T)[:, None] & (r < R)[None, :]
    return tl.sum(weights[:, None] * tl.load(x + j[:, None] * R + r[None, :], mask=mask, other=0), 0)


@triton.jit
def mix_kernel(mixed, z, k, T, R, FRAMES: tl.constexpr, FEATURES: tl.constexpr):
    """mixed_t = z_t + sum_j mixing_tj z_j, all [N, T, R]."""
    n, t = tl.program_id(0) // T, tl.program_id(0) % T
    clip = n.to(tl.int64) * T * R
    mixing = mixing_of(k + clip, t, T, R, FRAMES, FEATURES)
    for block in range(tl.cdiv(R, FEATURES)):
        r = block * FEATURES + tl.arange(0, FEATURES)
        own = tl.load(z + clip + t * R + r, mask=r < R, other=0)
        tl.store(mixed + clip + t * R + r, own + weighted(mixing, z + clip, r, T, R, FRAMES), mask=r < R)


@triton.jit
def rows_kernel(mixing, ds, dmixed, z, k, T, R, FRAMES: tl.constexpr, FEATURES: tl.constexpr):
    """Row t of mixing and of ds_tj = mixing_tj (dmixed_t.z_j - sum_i mixing_ti dmixed_t.z_i), [N, T, T]."""
    n, t = tl.program_id(0) // T, tl.program_id(0) % T
    clip = n.to(tl.int64) * T * R
    j = tl.arange(0, FRAMES)
    row = mixing_of(k + clip, t, T, R, FRAMES, FEATURES)
    dmixing = scores_of(dmixed + clip, z + clip, t, T, R, FRAMES, FEATURES)
    dmixing -= tl.sum(tl.where(j < T, row * dmixing, 0), 0)
    at = (n.to(tl.int64) * T + t) * T + j
    tl.store(mixing + at, row, mask=j < T)
    tl.store(ds + at, row * dmixing, mask=j < T)


@triton.jit
def mix_backward_kernel(
    dz, dk, mixing, ds, dmixed, k, T, R, FRAMES: tl.constexpr, FEATURES: tl.constexpr
):  # fmt: skip
    """dz_t = dmixed_t + sum_j mixing_jt dmixed_j and dk_t = -sum_j (ds_tj + ds_jt) k_j, all [N, T, R]."""
    n, t = tl.program_id(0) // T, tl.program_id(0) % T
    clip, square = n.to(tl.int64) * T * R, n.to(tl.int64) * T * T
    j = tl.arange(0, FRAMES)
    column = tl.load(mixing + square + j * T + t, mask=j < T, other=0)
    both = tl.load(ds + square + j * T + t, mask=j < T, other=0)
    both += tl.load(ds + square + t * T + j, mask=j < T, other=0)
    for block in range(tl.cdiv(R, FEATURES)):
        r = block * FEATURES + tl.arange(0, FEATURES)
        own = tl.load(dmixed + clip + t * R + r, mask=r < R, other=0)
        tl.store(dz + clip + t * R + r, own + weighted(column, dmixed + clip, r, T, R, FRAMES), mask=r < R)
        tl.store(dk + clip + t * R + r, -weighted(both, k + clip, r, T, R, FRAMES), mask=r < R)


def widened(x: Tensor) -> Tensor:
    """Half types are computed in float32 and rounded once."""
    return x.contiguous().to(torch.promote_types(x.dtype, torch.float32))


def sizes(z: Tensor, n_segment: int) -> tuple[tuple[int], tuple, dict]:
    """The grid, T and R, and the constants of all kernels."""
    frames = power_of_two(n_segment, 1 << 30)
    return (z.size(0),), (n_segment, z.size(1)), {"FRAMES": frames, "FEATURES": FEATURES}


def mix(z: Tensor, k: Tensor, n_segment: int) -> Tensor:
    mixed = torch.empty_like(z)
    if z.numel() > 0:
        grid, shape, constants = sizes(z, n_segment)
        wrap_triton(mix_kernel)[grid](mixed, z, k, *shape, **constants)
    return mixed


@entry
def channel_motion_gate(pooled: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, n_segment: int) -> Tensor:
    return channel_motion_gate_forward(pooled, w1, w2, w3, n_segment)[0]


@entry
def channel_motion_gate_forward(
    pooled: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, n_segment: int
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = pooled.dtype
    pooled, w1, w2, w3 = (widened(x) for x in (pooled, w1, w2, w3))
    z, k = pooled @ w1.t(), pooled @ w2.t()
    return (mix(z, k, n_segment) @ w3.t()).sigmoid().to(dtype), z, k


@entry
def channel_motion_gate_backward(
    grad: Tensor,
    pooled: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    output: Tensor,
    z: Tensor,
    k: Tensor,
    n_segment: int,
    need_pooled: bool,
    need_w1: bool,
    need_w2: bool,
    need_w3: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_like(grad, pooled, "grad")
    check_like(output, pooled, "output")
    like, dtype = pooled, pooled.dtype
    z, k = z.contiguous(), k.contiguous()
    grad, pooled, w1, w2, w3 = (widened(x) for x in (grad, pooled, w1, w2, w3))
    mixed = mix(z, k, n_segment)
    # A result rounded to half the bits says too little of its slope a (1 - a).
    gate = output if output.dtype == grad.dtype else (mixed @ w3.t()).sigmoid()
    dlogits = grad * gate * (1 - gate)
    dw3 = (dlogits.t() @ mixed).to(dtype) if need_w3 else nothing(like)
    if not (need_pooled or need_w1 or need_w2):
        return nothing(like), nothing(like), nothing(like), dw3
    dmixed = dlogits @ w3
    dz, dk = torch.empty_like(z), torch.empty_like(k)
    if z.numel() > 0:
        mixing, ds = (z.new_empty(z.size(0), n_segment) for _ in range(2))
        grid, shape, constants = sizes(z, n_segment)
        wrap_triton(rows_kernel)[grid](mixing, ds, dmixed, z, k, *shape, **constants)
        wrap_triton(mix_backward_kernel)[grid](dz, dk, mixing, ds, dmixed, k, *shape, **constants)
    dpooled = (dz @ w1 + dk @ w2).to(dtype) if need_pooled else nothing(like)
    dw1 = (dz.t() @ pooled).to(dtype) if need_w1 else nothing(like)
    dw2 = (dk.t() @ pooled).to(dtype) if need_w2 else nothing(like)
    return dpooled, dw1, dw2, dw3
