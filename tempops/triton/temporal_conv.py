"""temporal_conv in Triton: y[t] = sum_k w_k * gate[t+k-R] * x[t+k-R], R = K // 2.

A program has some elements and walks T with the K frames of the window in registers, so that each is read once. The
backward reads dy and x once, writes dx = gate * d with d[t] = sum_k w_k * dy[t+R-k], and adds up by tile what the
gradients to weight and gate are sums of: dweight_k of gate[t] * x[t] * dy[t+R-k], dgate[t] of x[t] * d[t].
"""

import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    BLOCK,
    Clips,
    add_up,
    cdiv,
    channel,
    clips,
    empty_like,
    entry,
    frame_cut,
    nothing,
    offset,
    partial_sums,
    place,
    planes,
    registers,
    tile,
    tiles,
    wide,
    wide_as,
    within,
    wrap_triton,
)

FAST = (1, 3, 5)  # kernel sizes whose window stays in registers


@triton.jit
def read(x, x_t, gate, t, T, C, c, i, size, GATED: tl.constexpr):
    """Elements i of frame t, times their gate; zero outside the clip."""
    mask = within(i, size, (t >= 0) & (t < T))
    value = wide(tl.load(x + tl.cast(t, tl.int64) * x_t, mask=mask, other=0))
    if GATED:
        value *= wide(tl.load(gate + tl.cast(t, tl.int64) * C + c, mask=mask, other=0))
    return value


@triton.jit
def conv_kernel(
    y, y_n, y_t, y_pitch, x, x_n, x_t, x_pitch, weight, gate, T, C, size, length, group, per_clip,
    K: tl.constexpr, GATED: tl.constexpr, TRANSPOSED: tl.constexpr,
    DENSE: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The convolution or its transpose: taps reversed, and the gate of the frame written in place of those read."""
    R: tl.constexpr = K // 2
    GATED_READ: tl.constexpr = GATED and not TRANSPOSED
    n, i = place(size, BLOCK)
    inside = i < size
    c = channel(i, length, CHANNELS_LAST)
    x += n * x_n + offset(i, length, x_pitch, DENSE)
    y += n * y_n + offset(i, length, y_pitch, DENSE)
    gate += n * T * C
    kernel = weight + (n * per_clip + c // group) * K
    taps = ()
    window = ()  # frame t + k - R is window[k]
    for k in tl.static_range(K):
        taps = taps + (wide(tl.load(kernel + (K - 1 - k if TRANSPOSED else k), mask=inside, other=0)),)
        if k < K - 1:
            window = window + (read(x, x_t, gate, k - R, T, C, c, i, size, GATED_READ),)
    for t in range(T):
        window = window + (read(x, x_t, gate, t + R, T, C, c, i, size, GATED_READ),)
        total = taps[R] * window[R]
        for k in tl.static_range(K):
            if k != R:  # never 0 * Inf outside the clip
                total += tl.where((t + k >= R) & (t + k < T + R), taps[k] * window[k], 0)
        if GATED and TRANSPOSED:
            total *= wide(tl.load(gate + tl.cast(t, tl.int64) * C + c, mask=inside, other=0))
        tl.store(y + tl.cast(t, tl.int64) * y_t, total, mask=inside)
        window = window[1:]


@triton.jit
def long_conv_kernel(
    y, y_n, y_t, y_pitch, x, x_n, x_t, x_pitch, weight, gate, T, C, size, length, group, per_clip, K,
    GATED: tl.constexpr, TRANSPOSED: tl.constexpr,
    DENSE: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same for any K: taps and frames are read from the cache."""
    n, i = place(size, BLOCK)
    inside = i < size
    c = channel(i, length, CHANNELS_LAST)
    x += n * x_n + offset(i, length, x_pitch, DENSE)
    y += n * y_n + offset(i, length, y_pitch, DENSE)
    gate += n * T * C
    kernel = weight + (n * per_clip + c // group) * K
    for t in range(T):
        total = wide(tl.zeros([BLOCK], x.dtype.element_ty))
        for k in range(tl.maximum(0, K // 2 - t), tl.minimum(K, T + K // 2 - t)):
            value = read(x, x_t, gate, t + k - K // 2, T, C, c, i, size, GATED and not TRANSPOSED)
            total += value * wide(tl.load(kernel + (K - 1 - k if TRANSPOSED else k), mask=inside, other=0))
        if GATED and TRANSPOSED:
            total *= wide(tl.load(gate + tl.cast(t, tl.int64) * C + c, mask=inside, other=0))
        tl.store(y + tl.cast(t, tl.int64) * y_t, total, mask=inside)


@triton.jit
def read_tile(x, x_t, t, T, c, C, p, P):
    mask = within(c, C, (t >= 0) & (t < T))[:, None] & (p < P)[None, :]
    return wide(tl.load(x + tl.cast(t, tl.int64) * x_t, mask=mask, other=0))


@triton.jit(do_not_specialize=["first"])
def conv_backward_kernel(
    dx, dx_n, dx_t, dx_c, dx_p, dy, dy_n, dy_t, dy_c, dy_p, x, x_n, x_t, x_c, x_p, parts, gate_parts, weight, gate,
    N, T, C, of_plane, K, first, group, per_clip, rows,
    TAPS: tl.constexpr, BY_CLIP: tl.constexpr, GATED: tl.constexpr, NEED_X: tl.constexpr, PLANES: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """For taps first .. first + TAPS - 1 of K: partial sums, and dx if NEED_X, where TAPS is K.

    A row of programs has every `rows`-th clip. parts: [rows or clips, tiles, K, C]; gate_parts: [frames, tiles, passes
    over the taps, C]. A plane has of_plane * UNIT pixels. PLANES: it is followed by the next one, in all tensors.
    """
    P = of_plane * UNIT
    start, chunk, c, p = tile(C, P, CHANNELS, PIXELS)
    chunks = tl.cdiv(P, PIXELS)
    R = K // 2
    cc, pp = c.to(tl.int64)[:, None], p.to(tl.int64)[None, :]
    inside = (c < C)[:, None] & (p < P)[None, :]
    dx += cc * (P if PLANES else dx_c) + pp * dx_p
    dy += cc * (P if PLANES else dy_c) + pp * dy_p
    x += cc * (P if PLANES else x_c) + pp * x_p
    zero = wide(tl.zeros([CHANNELS, PIXELS], x.dtype.element_ty))
    q = (zero,) * TAPS
    for n in range(start, N, rows):
        taps = ()
        window = ()  # window[j] is dy of frame t + R - first - j
        for j in tl.static_range(TAPS):
            if NEED_X or GATED:
                tap = wide(tl.load(weight + (n * per_clip + c // group) * K + first + j, mask=c < C, other=0))
                taps = taps + (tap[:, None],)
            if j > 0:
                window = window + (read_tile(dy + n * dy_n, dy_t, R - first - j, T, c, C, p, P),)
        for t in range(T):
            window = (read_tile(dy + n * dy_n, dy_t, t + R - first, T, c, C, p, P),) + window
            here = wide(tl.load(x + n * x_n + tl.cast(t, tl.int64) * x_t, mask=inside, other=0))
            factor = wide(tl.load(gate + (n * T + t) * C + c, mask=c < C, other=0))[:, None] if GATED else 1
            if NEED_X or GATED:
                total = zero
                for j in tl.static_range(TAPS):
                    s = t + R - first - j
                    total += tl.where((s >= 0) & (s < T), taps[j] * window[j], 0)
                if GATED:
                    passes = K // TAPS
                    at = (((n * T + t) * chunks + chunk) * passes + first // TAPS) * C + c
                    tl.store(gate_parts + at, tl.sum(here * total, 1), mask=c < C)
                if NEED_X:
                    tl.store(dx + n * dx_n + tl.cast(t, tl.int64) * dx_t, factor * total, mask=inside)
            sums = ()
            for j in tl.static_range(TAPS):
                s = t + R - first - j
                sums = sums + (q[j] + tl.where((s >= 0) & (s < T), factor * here * window[j], 0),)
            q = sums
            window = window[: TAPS - 1]
        if BY_CLIP:
            for j in tl.static_range(TAPS):
                tl.store(parts + ((n * chunks + chunk) * K + first + j) * C + c, tl.sum(q[j], 1), mask=c < C)
            q = (zero,) * TAPS
    if not BY_CLIP:
        for j in tl.static_range(TAPS):
            tl.store(parts + ((start * chunks + chunk) * K + first + j) * C + c, tl.sum(q[j], 1), mask=c < C)


@triton.jit
def gate_kernel(dgate, parts, C, rows, BLOCK: tl.constexpr):
    """dgate [frames, C], each the sum of `rows` rows."""
    f, c = place(C, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    for row in range(rows):
        sums += tl.load(parts + (f * rows + row) * C + c, mask=c < C, other=0).to(tl.float64)
    tl.store(dgate + f * C + c, wide_as(sums, dgate), mask=c < C)


def kernels_of(weight: Tensor, x: Clips) -> tuple[int, int]:
    """How many channels share a kernel; C where each clip has its own kernels, else 0."""
    return (1, x.C) if weight.dim() == 3 else (x.C // weight.size(0), 0)


def convolve(y: Clips, x: Clips, weight: Tensor, gate: Tensor | None, transposed: bool) -> None:
    """Writes to y the convolution of x, or the transposed one."""
    K = weight.size(-1)
    shape = (x.T, x.C, x.size, x.length, *kernels_of(weight, x))
    tensors = (*y.address, *x.address, weight, weight if gate is None else gate)
    grid = (x.N * cdiv(x.size, BLOCK),)
    flags = {"GATED": gate is not None, "TRANSPOSED": transposed, **frame_cut(x, y)}
    if K in FAST:
        wrap_triton(conv_kernel)[grid](*tensors, *shape, K=K, **flags)
    else:
        wrap_triton(long_conv_kernel)[grid](*tensors, *shape, K, **flags)


@entry
def temporal_conv(x: Tensor, weight: Tensor, n_segment: int | None, gate: Tensor | None) -> Tensor:
    x = clips(x, n_segment)
    y = empty_like(x, n_segment)
    if x.tensor.numel() > 0:
        convolve(y, x, weight.contiguous(), None if gate is None else gate.contiguous(), False)
    return y.tensor


@entry
def temporal_conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    n_segment: int | None,
    gate: Tensor | None,
    need_x: bool,
    need_weight: bool,
    need_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x = clips(x, n_segment)
    dy = clips(grad, n_segment, x)
    weight, gate = weight.contiguous(), None if gate is None else gate.contiguous()
    dx = empty_like(x, n_segment) if need_x else None
    dweight = weight.new_empty(weight.shape) if need_weight else nothing(weight)
    dgate = gate.new_empty(gate.shape) if need_gate else nothing(weight)
    results = nothing(weight) if dx is None else dx.tensor, dweight, dgate
    if x.tensor.numel() == 0:
        return results[0], dweight.zero_(), dgate.zero_()
    K = weight.size(-1)
    fast = K in FAST
    if need_weight or need_gate:
        cut, (group, per_clip), like = tiles(x), kernels_of(weight, x), x if dx is None else dx
        # Rows of programs: enough to fill a GPU, and no more sums than that.
        by_clip, constants = per_clip > 0, planes(x, dy, like)
        rows = x.N if by_clip else min(x.N, cdiv(2048, cut.blocks * cut.chunks))
        parts = partial_sums(x, rows * cut.chunks, K, x.C)
        passes = 1 if fast else K
        # The compiler takes more than twice what it needs. Without wide loads and with five taps that is much.
        limit = registers(x.tensor, 128) if K <= 3 and (x.channels_last or constants["UNIT"] > 1) else {}
        gate_parts = partial_sums(x, 0 if gate is None else x.N * x.T * cut.chunks * passes, x.C)
        for first in range(0, K, K // passes):
            wrap_triton(conv_backward_kernel)[(rows * cut.blocks * cut.chunks,)](
                *like.strides, *dy.strides, *x.strides, parts, gate_parts, weight, weight if gate is None else gate,
                x.N, x.T, x.C, x.P // constants["UNIT"], K, first, group, per_clip, rows,
                TAPS=K // passes, BY_CLIP=by_clip, GATED=gate is not None, NEED_X=fast and need_x,
                **constants, **cut.constants, **limit,
            )  # fmt: skip
        if need_weight:
            add_up(dweight, parts, rows * cut.chunks // (x.N if by_clip else 1), x.C, K, group, by_clip)
        if need_gate:
            wrap_triton(gate_kernel)[(x.N * x.T * cdiv(x.C, 256),)](
                dgate, gate_parts, x.C, cut.chunks * passes, BLOCK=256
            )
    if need_x and not (fast and (need_weight or need_gate)):
        convolve(dx, dy, weight, gate, True)
    return results
