"""shift_conv1x1 in Triton: a matrix product of all pixels of all frames by the weight, whose K loop changes frame.

The channels of a group that moves come from a neighbouring frame, so the loop over the input's channels is one loop a
group, each with a frame of its own. The gradient to x is the plain product with the transposed weight; the shift is in
where its results are written. The gradient to the weight sums over pixels, in splits whose sums are added up last.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.temporal_shift import _offsets
from ._common import (
    INTERPRETED,
    Clips,
    cdiv,
    check_like,
    clips,
    empty_like,
    entry,
    format_of,
    nothing,
    view,
    wide,
    wrap_triton,
)

SPLITS = 264  # programs that the sum over pixels is split among, at most


@triton.jit
def operand(x, mask, WIDEN: tl.constexpr):
    """A tile of a product; widened for the interpreter, which multiplies no bfloat16."""
    value = tl.load(x, mask=mask, other=0)
    return wide(value) if WIDEN else value


@triton.jit
def frame_of(m, T, P):
    """Clip, frame and pixel of pixel m of all."""
    f = m // P
    return (f // T).to(tl.int64), f % T, m % P


@triton.jit
def group_product(
    total, x, x_t, x_c, weight, w_o, w_i, source, rows, o, begin, end, T, Cout,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Adds the product of the input channels begin .. end - 1, read at frames `source`; none outside the clip."""
    rows = rows & (source >= 0) & (source < T)
    x += source.to(tl.int64)[:, None] * x_t
    for block in range(tl.cdiv(end - begin, BLOCK_K)):
        i = begin + block * BLOCK_K + tl.arange(0, BLOCK_K)
        a = operand(x + i.to(tl.int64)[None, :] * x_c, rows[:, None] & (i < end)[None, :], WIDEN)
        b = operand(weight + o[None, :] * w_o + i[:, None] * w_i, (o < Cout)[None, :] & (i < end)[:, None], WIDEN)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@triton.jit
def product_kernel(
    y, y_n, y_t, y_c, y_p, x, x_n, x_t, x_c, x_p, weight, w_o, w_i, bias, M, T, P, C, Cout, fold, moving,
    FIRST: tl.constexpr, SECOND: tl.constexpr, AT_OUTPUT: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [M, Cout] = x [M, C] W, with the shift where x is read, or AT_OUTPUT where y is written."""
    columns = tl.cdiv(Cout, BLOCK_N)
    m = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    n, t, p = frame_of(m, T, P)
    x += (n * x_n + p * x_p)[:, None]
    total = wide(tl.zeros([BLOCK_M, BLOCK_N], x.dtype.element_ty))
    if AT_OUTPUT:
        total = group_product(total, x, x_t, x_c, weight, w_o, w_i, t, m < M, o, 0, C, T, Cout,
                              BLOCK_K, PRECISION, WIDEN)  # fmt: skip
        offset = tl.where(o < fold, FIRST, tl.where(o < moving, SECOND, 0))
        target = t[:, None] + offset[None, :]
        # What would leave the clip is written to the frame at its other end, which nothing moves to, as zero.
        total = tl.where((target >= 0) & (target < T), total, 0)
        target = tl.where(target < 0, target + T, tl.where(target >= T, target - T, target))
    else:
        total = group_product(total, x, x_t, x_c, weight, w_o, w_i, t + FIRST, m < M, o, 0, fold, T, Cout,
                              BLOCK_K, PRECISION, WIDEN)  # fmt: skip
        total = group_product(total, x, x_t, x_c, weight, w_o, w_i, t + SECOND, m < M, o, fold, moving, T, Cout,
                              BLOCK_K, PRECISION, WIDEN)  # fmt: skip
        total = group_product(total, x, x_t, x_c, weight, w_o, w_i, t, m < M, o, moving, C, T, Cout,
                              BLOCK_K, PRECISION, WIDEN)  # fmt: skip
        target = t[:, None]
    if BIAS:
        total += wide(tl.load(bias + o, mask=o < Cout, other=0))[None, :]
    if RELU:
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    y += (n * y_n + p * y_p)[:, None] + target.to(tl.int64) * y_t + o.to(tl.int64)[None, :] * y_c
    tl.store(y, total, mask=(m < M)[:, None] & (o < Cout)[None, :])


@triton.jit
def weight_kernel(
    parts, dy, dy_n, dy_t, dy_c, dy_p, x, x_n, x_t, x_c, x_p, M, T, P, C, Cout, fold, moving, per_split,
    FIRST: tl.constexpr, SECOND: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """parts [splits, Cout, C]: of dy^T shift(x), the sums over per_split blocks of BLOCK_K pixels."""
    rows, columns = tl.cdiv(Cout, BLOCK_M), tl.cdiv(C, BLOCK_N)
    split = (tl.program_id(0) // (rows * columns)).to(tl.int64)
    tile = tl.program_id(0) % (rows * columns)
    o = tile // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tile % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    offset = tl.where(i < fold, FIRST, tl.where(i < moving, SECOND, 0))[None, :]
    dy += o.to(tl.int64)[:, None] * dy_c
    x += offset.to(tl.int64) * x_t + i.to(tl.int64)[None, :] * x_c
    total = wide(tl.zeros([BLOCK_M, BLOCK_N], x.dtype.element_ty))
    for block in range(per_split):
        m = (split * per_split + block) * BLOCK_K + tl.arange(0, BLOCK_K)
        n, t, p = frame_of(m, T, P)
        at = (n * dy_n + t * dy_t + p * dy_p)[None, :]
        a = operand(dy + at, (o < Cout)[:, None] & (m < M)[None, :], WIDEN)
        source = t[:, None] + offset
        mask = (m < M)[:, None] & (i < C)[None, :] & (source >= 0) & (source < T)
        b = operand(x + (n * x_n + t * x_t + p * x_p)[:, None], mask, WIDEN)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)
    parts += (split * Cout + o)[:, None] * C + i[None, :]
    tl.store(parts, total, mask=(o < Cout)[:, None] & (i < C)[None, :])


def shape_of_blocks(rows: int, columns: int, x: Tensor, precision: str) -> dict:
    """The tile of a product of that many rows and columns, its warps and stages: the one table to tune."""
    size = x.element_size()
    if size == 8:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
    if size == 4 and precision == "ieee":  # on the ordinary units, from registers
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 3}
    deep = 64 // size
    if rows >= 128 * 66 and columns >= 128:
        return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": deep, "num_warps": 8, "num_stages": 4}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": deep, "num_warps": 4, "num_stages": 4}


def precision_of(x: Tensor, allow_tf32: bool) -> str:
    """How tl.dot is to multiply; the 16-bit types are exact either way."""
    return "tf32" if x.dtype != torch.float32 or allow_tf32 else "ieee"


def convolve(
    y: Clips,
    x: Clips,
    weight: Tensor,
    bias: Tensor | None,
    fold: int,
    offsets: tuple[int, int],
    precision: str,
    *,
    relu: bool = False,
    back: bool = False,
) -> None:
    """y = W shift(x), or `back`: y = shift^T(W^T x)."""
    M, strides = x.N * x.T * x.P, weight.stride()[:2]
    blocks = shape_of_blocks(M, y.C, x.tensor, precision)
    first, second = offsets
    wrap_triton(product_kernel)[(cdiv(M, blocks["BLOCK_M"]) * cdiv(y.C, blocks["BLOCK_N"]),)](
        *y.strides, *x.strides, weight, *(strides[::-1] if back else strides), weight if bias is None else bias,
        M, x.T, x.P, x.C, y.C, fold, 2 * fold, FIRST=first, SECOND=second, AT_OUTPUT=back, BIAS=bias is not None,
        RELU=relu, PRECISION=precision, WIDEN=INTERPRETED, **blocks,
    )  # fmt: skip


def weight_gradient(dy: Clips, x: Clips, fold: int, offsets: tuple[int, int], precision: str) -> Tensor:
    """dy^T shift(x), [Cout, C]."""
    M = x.N * x.T * x.P
    blocks = shape_of_blocks(dy.C, x.C, x.tensor, precision)
    tiles, steps = cdiv(dy.C, blocks["BLOCK_M"]) * cdiv(x.C, blocks["BLOCK_N"]), cdiv(M, blocks["BLOCK_K"])
    per_split = cdiv(steps, max(1, SPLITS // tiles))
    splits = cdiv(steps, per_split)
    parts = x.tensor.new_empty((splits, dy.C, x.C), dtype=torch.promote_types(x.tensor.dtype, torch.float32))
    first, second = offsets
    wrap_triton(weight_kernel)[(splits * tiles,)](
        parts, *dy.strides, *x.strides, M, x.T, x.P, x.C, dy.C, fold, 2 * fold, per_split,
        FIRST=first, SECOND=second, PRECISION=precision, WIDEN=INTERPRETED, **blocks,
    )  # fmt: skip
    return parts.sum(0).to(x.tensor.dtype)


@entry
def shift_conv1x1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    n_segment: int | None,
    fold_div: int,
    mode: str,
    activation: str | None,
    allow_tf32: bool,
) -> Tensor:
    x = clips(x, n_segment)
    y = empty_like(x, n_segment, C=weight.size(0))
    if y.tensor.numel() > 0:
        bias = None if bias is None else bias.contiguous()
        precision = precision_of(x.tensor, allow_tf32)
        convolve(y, x, weight, bias, x.C // fold_div, _offsets(mode), precision, relu=activation == "relu")
    return y.tensor


@entry
def shift_conv1x1_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    n_segment: int | None,
    fold_div: int,
    mode: str,
    channels_last: bool,
    need_bias: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = nothing(grad), nothing(grad), nothing(grad)
    if need_bias:
        dbias = grad.sum([d for d in range(grad.dim()) if d != 1])
    dy = clips(grad, n_segment, channels_last=channels_last)
    offsets, precision = _offsets(mode), precision_of(grad, allow_tf32)
    if weight is not None:
        check_like(weight.flatten(1), grad, "weight", (dy.C, weight.size(1)))
        fold = weight.size(1) // fold_div
        sizes = (grad.size(0), weight.size(1), *grad.shape[2:])
        layout = format_of(grad, channels_last)
        dx = torch.empty(sizes, dtype=grad.dtype, device=grad.device, memory_format=layout)
        if grad.numel() == 0:
            dx.zero_()
        else:
            convolve(view(dx, n_segment, channels_last), dy, weight, None, fold, offsets, precision, back=True)
    if x is not None:
        check_like(x, grad, "x", (grad.size(0), x.size(1), *grad.shape[2:]))
        if grad.numel() == 0:
            dweight = grad.new_zeros(dy.C, x.size(1))
        else:
            read = clips(x, n_segment, channels_last=channels_last)
            dweight = weight_gradient(dy, read, read.C // fold_div, offsets, precision)
    return dx, dweight, dbias
