"""shift_conv1x1 in Triton: a matrix product of all pixels of all frames by the weight, whose K loop changes frame.

The channels of a group that moves come from a neighbouring frame, which only moves the addresses of the loop's blocks
and hides what lies outside the clip. The gradient to x is the plain product with the transposed weight; the shift is in
where its results are written. The gradient to the weight sums over pixels, in splits whose sums are added up last.

TILES, the table of block sizes, is predicted, not measured. Nothing is tuned at run time: a first call compiles one
kernel.
"""

import functools
import math

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
    registers,
    view,
    wide,
    wrap_triton,
)

SPLITS = 264  # programs that the sum over pixels is split among, at most


@triton.jit
def operand(x, mask, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """A tile of a product; widened for the interpreter, which multiplies no bfloat16.

    float32 to the nearest number that tensor cores read, which leave the last 13 bits out.
    """
    value = tl.load(x, mask=mask, other=0)
    if WIDEN:
        return wide(value)
    elif PRECISION == "tf32" and value.dtype == tl.float32:
        bits = value.to(tl.uint32, bitcast=True)
        return (bits + tl.where(tl.abs(value) < float("inf"), 0x1000, 0)).to(tl.float32, bitcast=True)
    else:
        return value


@triton.jit
def frame_of(m, T, P):
    """Clip, frame and pixel of pixel m of all."""
    f = m // P
    return (f // T).to(tl.int64), f % T, m % P


@triton.jit
def pixel_at(m, n, t, p, x_n, x_t, x_p, FLAT: tl.constexpr):
    """Where pixel m is."""
    if FLAT:
        return m.to(tl.int64) * x_p
    else:
        return n * x_n + t.to(tl.int64) * x_t + p.to(tl.int64) * x_p


@triton.jit
def offset_of(i, fold, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """How many frames away channel i comes from, or goes to."""
    return tl.where(i < fold, FIRST, tl.where(i < 2 * fold, SECOND, 0))


@triton.jit
def product_kernel(
    y, y_n, y_t, y_c, y_p, x, x_n, x_t, x_c, x_p, weight, w_o, w_i, bias, M, padded, T, parts, C, Cout, folds,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, Y_FLAT: tl.constexpr, X_FLAT: tl.constexpr, Y_PLANES: tl.constexpr,
    X_PLANES: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, AT_OUTPUT: tl.constexpr,
    BIAS: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [M, Cout] = x [M, C] W, with the shift where x is read, or AT_OUTPUT where y is written.

    A frame has `parts` * PIXELS pixels and a group that moves `folds` * CHANNELS channels. FLAT: all pixels are one row
    of equal steps. PLANES: a channel's pixels are followed by the next one's.
    """
    P, fold = parts * PIXELS, folds * CHANNELS
    x_step, y_step = P if X_PLANES else x_c, P if Y_PLANES else y_c
    columns = tl.cdiv(Cout, BLOCK_N)
    m = (tl.program_id(0) // columns + 0 * padded) * BLOCK_M + tl.arange(0, BLOCK_M)  # in 64 bits if these need them
    o = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    n, t, p = frame_of(m, T, P)
    rows = x + pixel_at(m, n, t, p, x_n, x_t, x_p, X_FLAT)[:, None]
    total = wide(tl.zeros([BLOCK_M, BLOCK_N], x.dtype.element_ty))
    for block in range(tl.cdiv(C, BLOCK_K)):
        i = block * BLOCK_K + tl.arange(0, BLOCK_K)
        at = i.to(tl.int64) * x_step
        mask = (m < M)[:, None] & (i < C)[None, :]
        if not AT_OUTPUT:
            offset = offset_of(i, fold, FIRST, SECOND)
            at += offset.to(tl.int64) * x_t
            mask = mask & ((t[:, None] + offset[None, :]).to(tl.uint32) < T)  # below zero is far above T
        a = operand(rows + at[None, :], mask, PRECISION, WIDEN)
        there = (o < Cout)[None, :] & (i < C)[:, None]
        b = operand(weight + (o[None, :] * w_o + i[:, None] * w_i), there, PRECISION, WIDEN)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)
    if BIAS:
        total += wide(tl.load(bias + o, mask=o < Cout, other=0))[None, :]
    if RELU:
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    to = pixel_at(m, n, t, p, y_n, y_t, y_p, Y_FLAT)[:, None] + (o.to(tl.int64) * y_step)[None, :]
    if AT_OUTPUT:
        target = t[:, None] + offset_of(o, fold, FIRST, SECOND)[None, :]
        # What would leave the clip is written to the frame at its other end, which nothing moves to, as zero.
        total = tl.where((target >= 0) & (target < T), total, 0)
        target = tl.where(target < 0, target + T, tl.where(target >= T, target - T, target))
        to += (target - t[:, None]).to(tl.int64) * y_t
    tl.store(y + to, total, mask=(m < M)[:, None] & (o < Cout)[None, :])


@triton.jit
def weight_kernel(
    sums, dy, dy_n, dy_t, dy_c, dy_p, x, x_n, x_t, x_c, x_p, M, padded, T, parts, C, Cout, folds, per_split,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, Y_FLAT: tl.constexpr, X_FLAT: tl.constexpr, Y_PLANES: tl.constexpr,
    X_PLANES: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sums [splits, Cout, C]: of dy^T shift(x), those over per_split blocks of BLOCK_K pixels."""
    P, fold = parts * PIXELS, folds * CHANNELS
    rows, columns = tl.cdiv(Cout, BLOCK_M), tl.cdiv(C, BLOCK_N)
    split = tl.program_id(0) // (rows * columns) + 0 * padded  # in 64 bits if pixels need them
    tile = tl.program_id(0) % (rows * columns)
    o = tile // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tile % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    offset = offset_of(i, fold, FIRST, SECOND)[None, :]
    dy += (o.to(tl.int64) * (P if Y_PLANES else dy_c))[:, None]
    x += offset.to(tl.int64) * x_t + (i.to(tl.int64) * (P if X_PLANES else x_c))[None, :]
    total = wide(tl.zeros([BLOCK_M, BLOCK_N], x.dtype.element_ty))
    for block in range(per_split):
        m = (split * per_split + block) * BLOCK_K + tl.arange(0, BLOCK_K)
        n, t, p = frame_of(m, T, P)
        there = (o < Cout)[:, None] & (m < M)[None, :]
        a = operand(dy + pixel_at(m, n, t, p, dy_n, dy_t, dy_p, Y_FLAT)[None, :], there, PRECISION, WIDEN)
        mask = (m < M)[:, None] & (i < C)[None, :] & ((t[:, None] + offset).to(tl.uint32) < T)
        b = operand(x + pixel_at(m, n, t, p, x_n, x_t, x_p, X_FLAT)[:, None], mask, PRECISION, WIDEN)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)
    sums += (split.to(tl.int64) * Cout + o)[:, None] * C + i[None, :]
    tl.store(sums, total, mask=(o < Cout)[:, None] & (i < C)[None, :])


# Tiles by what a product must have at least: columns, depth (how many numbers are added up), rows to fill a GPU.
# Each is BLOCK_M, BLOCK_N, bytes of BLOCK_K, num_warps, num_stages; the first that fits a GPU's shared memory is taken.
# Columns change fastest from program to program, so that those that read the same rows run together; the weight stays
# in the second-level cache. Predicted for an H200 with its 132 multiprocessors: `python benchmarks/tune.py` measures.
TILES = {
    (256, 1024, 16896): (128, 256, 128, 8, 4),
    (65, 0, 8448): (128, 128, 128, 8, 3),
    (33, 0, 8448): (128, 64, 128, 4, 3),
    (17, 0, 8448): (128, 32, 128, 4, 3),
    (0, 0, 8448): (128, 16, 128, 4, 3),
    (0, 0, 0): (64, 64, 128, 4, 4),
}
# The same for the gradient to the weight, by rows and columns: Cout and C.
WEIGHT_TILES = {
    (65, 65): (128, 128, 128, 8, 3),
    (33, 65): (64, 128, 128, 4, 3),
    (0, 0): (64, 64, 128, 4, 4),
}


@functools.cache
def shared_memory(device: torch.device) -> int:
    """What a program may have of it, in bytes; where there is no GPU, what it may have on an H200."""
    if device.type != "cuda":
        return 232448
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def tile_of(tiles: dict, sizes: tuple[int, ...], depth: int, x: Tensor, precision: str) -> dict:
    """The tile of a product, its warps, and its stages: no more than there are blocks of numbers to add up."""
    size = x.element_size()
    if size == 8:
        tile = 32, 32, 128, 4, 2
    elif precision == "ieee" and size == 4:  # on the ordinary units, from registers
        tile = 64, 64, 64, 8, 3
    else:
        tile = next(
            (m, n, k, warps, stages)
            for least, (m, n, k, warps, stages) in tiles.items()
            if all(a >= b for a, b in zip(sizes, least)) and (m + n) * k * stages <= shared_memory(x.device)
        )
    m, n, k, warps, stages = tile
    tile = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k // size}
    tile |= {"num_warps": warps, "num_stages": int(min(stages, 1 + cdiv(depth * size, k)))}
    # Two programs of 128 by 128 at a time, one of which computes while the other begins or ends; not of float32, whose
    # rounding takes registers.
    return tile | (registers(x, 128) if (m, n, warps, size) == (128, 128, 8, 2) else {})


def described(y: Clips, x: Clips, fold: int) -> tuple[int, int, dict]:
    """Pixels of a frame and channels of a group as multiples of constants, for wide loads; the layouts."""
    per_load = max(1, 16 // x.tensor.element_size())
    pixels, channels = math.gcd(x.P, per_load), math.gcd(fold, per_load)
    constants = {"PIXELS": pixels, "CHANNELS": channels}
    for name, clip in (("Y", y), ("X", x)):
        flat = clip.st == clip.P * clip.sp and clip.sn == clip.T * clip.st
        constants[f"{name}_FLAT"] = clip.channels_last and flat
        constants[f"{name}_PLANES"] = not clip.channels_last and clip.sc == clip.P
    return x.P // pixels, fold // channels, constants


def copyable(x: Clips, n_segment: int | None) -> Clips:
    """x as its tiles can be copied asynchronously, four bytes at least: other planes are laid out anew."""
    if x.channels_last or x.P * x.tensor.element_size() % 4 == 0:
        return x
    return view(x.tensor.contiguous(memory_format=format_of(x.tensor, True)), n_segment, True)


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
    blocks = tile_of(TILES, (y.C, x.C, M), x.C, x.tensor, precision)
    parts, folds, constants = described(y, x, fold)
    first, second = offsets
    rows = cdiv(M, blocks["BLOCK_M"])
    wrap_triton(product_kernel)[(rows * cdiv(y.C, blocks["BLOCK_N"]),)](
        *y.strides, *x.strides, weight, *(strides[::-1] if back else strides), weight if bias is None else bias,
        M, rows * blocks["BLOCK_M"], x.T, parts, x.C, y.C, folds, FIRST=first, SECOND=second, AT_OUTPUT=back,
        BIAS=bias is not None, RELU=relu, PRECISION=precision, WIDEN=INTERPRETED, **constants, **blocks,
    )  # fmt: skip


def weight_gradient(dy: Clips, x: Clips, fold: int, offsets: tuple[int, int], precision: str) -> Tensor:
    """dy^T shift(x), [Cout, C]."""
    M = x.N * x.T * x.P
    blocks = tile_of(WEIGHT_TILES, (dy.C, x.C), M, x.tensor, precision)
    tiles, steps = cdiv(dy.C, blocks["BLOCK_M"]) * cdiv(x.C, blocks["BLOCK_N"]), cdiv(M, blocks["BLOCK_K"])
    per_split = cdiv(steps, max(1, SPLITS // tiles))
    splits = cdiv(steps, per_split)
    sums = x.tensor.new_empty((splits, dy.C, x.C), dtype=torch.promote_types(x.tensor.dtype, torch.float32))
    parts, folds, constants = described(dy, x, fold)
    first, second = offsets
    wrap_triton(weight_kernel)[(splits * tiles,)](
        sums, *dy.strides, *x.strides, M, splits * per_split * blocks["BLOCK_K"], x.T, parts, x.C, dy.C, folds,
        per_split,
        FIRST=first, SECOND=second, PRECISION=precision, WIDEN=INTERPRETED, **constants, **blocks,
    )  # fmt: skip
    return sums.sum(0).to(x.tensor.dtype)


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
        convolve(
            y,
            copyable(x, n_segment),
            weight,
            bias,
            x.C // fold_div,
            _offsets(mode),
            precision,
            relu=activation == "relu",
        )
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
    dy = copyable(clips(grad, n_segment, channels_last=channels_last), n_segment)
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
            read = copyable(clips(x, n_segment, channels_last=channels_last), n_segment)
            dweight = weight_gradient(dy, read, read.C // fold_div, offsets, precision)
    return dx, dweight, dbias
