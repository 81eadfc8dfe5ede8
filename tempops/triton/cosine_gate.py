"""temporal_cosine_similarity and cosine_gate in Triton.

All sums are over the channels of one pixel, so a program takes a tile of pixels of one clip and walks its frames, a
block of channels at a time. A frame's tile comes from memory once, for the sums of the pair that it ends; it comes
from a cache where it begins the next pair and where it is written. The second-level cache holds the tiles of all
programs if these have few pixels, which is why they have eight warps.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    Clips,
    cdiv,
    check_like,
    clips,
    empty_like,
    entry,
    planes,
    power_of_two,
    wide,
    within,
    wrap_triton,
)

PROGRAMS = 792  # clips are cut into segments of frames until there are that many


@triton.jit
def norm(square, EPS: tl.constexpr):
    """|frame| at a pixel; infinite, so that its inverse is 0, where it counts as zero."""
    root = tl.sqrt_rn(square) if square.dtype == tl.float32 else tl.sqrt(square)
    return tl.where(root <= tl.full(root.shape, EPS, root.dtype), float("inf"), root)


@triton.jit
def sums(here, there, there_c, grad, grad_c, C, inside, present, WITH_GRAD: tl.constexpr, CHANNELS: tl.constexpr):
    """<here, there>, |there|^2 and, WITH_GRAD, <grad, there>, per pixel; zero where there is no such frame."""
    zero = wide(tl.zeros([CHANNELS, inside.shape[1]], here.dtype.element_ty))
    dot = zero
    square = zero
    product = zero
    for block in range(tl.cdiv(C, CHANNELS)):
        c = block * CHANNELS + tl.arange(0, CHANNELS)
        mask = within(c, C, present)[:, None] & inside
        at = c.to(tl.int64)[:, None]
        b = wide(tl.load(there + at * there_c, mask=mask, other=0))
        dot += wide(tl.load(here + at * there_c, mask=mask, other=0)) * b
        square += b * b
        if WITH_GRAD:
            product += wide(tl.load(grad + at * grad_c, mask=mask, other=0)) * b
    return tl.sum(dot, 0), tl.sum(square, 0), tl.sum(product, 0)


@triton.jit
def segment_of(P, length, segments, PIXELS: tl.constexpr):
    """What a program has: clip, first frame, and pixels."""
    chunks = tl.cdiv(P, PIXELS)
    rest = tl.program_id(0) // chunks
    p = tl.program_id(0) % chunks * PIXELS + tl.arange(0, PIXELS)
    return (rest // segments).to(tl.int64), rest % segments * length, p


@triton.jit
def cosine_kernel(
    y, y_n, y_t, y_c, y_p, x, x_n, x_t, x_c, x_p, T, C, parts, length, segments,
    UNIT: tl.constexpr, PLANES: tl.constexpr, EPS: tl.constexpr, GATE: tl.constexpr, CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):  # fmt: skip
    """Writes the gated frames, or the similarity: y is then a map, [N, T, P].

    P is parts * UNIT. PLANES: a channel's pixels are followed by the next one's, in all tensors.
    """
    P = parts * UNIT
    x_c, y_c = P if PLANES else x_c, P if PLANES else y_c
    n, first, p = segment_of(P, length, segments, PIXELS)
    inside = (p < P)[None, :]
    x += n * x_n + p.to(tl.int64)[None, :] * x_p
    _, square, _ = sums(x + first.to(tl.int64) * x_t, x + first.to(tl.int64) * x_t, x_c, x, x_c, C, inside, T > 0,
                        False, CHANNELS)  # fmt: skip
    size = norm(square, EPS)
    for t in range(first, tl.minimum(first + length, T - 1)):
        here = x + tl.cast(t, tl.int64) * x_t
        dot, next_square, _ = sums(here, here + x_t, x_c, x, x_c, C, inside, T > 0, False, CHANNELS)
        next_size = norm(next_square, EPS)
        s = dot / (size * next_size)
        size = next_size
        for frame in range(t, t + tl.where(T == t + 2, 2, 1)):  # the last frame has the similarity of the one before
            if GATE:
                gate = (1 - s)[None, :]
                from_ = x + tl.cast(frame, tl.int64) * x_t
                to = y + n * y_n + tl.cast(frame, tl.int64) * y_t + p.to(tl.int64)[None, :] * y_p
                for block in range(tl.cdiv(C, CHANNELS)):
                    c = block * CHANNELS + tl.arange(0, CHANNELS)
                    mask = (c < C)[:, None] & inside
                    value = wide(tl.load(from_ + c.to(tl.int64)[:, None] * x_c, mask=mask, other=0))
                    tl.store(to + c.to(tl.int64)[:, None] * y_c, value * gate, mask=mask)
            else:
                tl.store(y + (n * T + frame) * P + p, s, mask=p < P)


@triton.jit
def cosine_backward_kernel(
    dx, dx_n, dx_t, dx_c, dx_p, grad, grad_n, grad_t, grad_c, grad_p, x, x_n, x_t, x_c, x_p,
    T, C, parts, length, segments,
    UNIT: tl.constexpr, PLANES: tl.constexpr, EPS: tl.constexpr, GATE: tl.constexpr, CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):  # fmt: skip
    """With s = cos of (a, b) and h its gradient, da = h (b / |a||b| - s a / |a|^2), and db likewise.

    The similarity's h is its grad, a map [N, T, P]; the gate's is -<grad, x>. The last frame's s is a copy, so its
    gradient adds to the last pair's h.
    """
    P = parts * UNIT
    x_c, dx_c, grad_c = P if PLANES else x_c, P if PLANES else dx_c, P if PLANES else grad_c
    n, begin, p = segment_of(P, length, segments, PIXELS)
    inside = (p < P)[None, :]
    x += n * x_n + p.to(tl.int64)[None, :] * x_p
    dx += n * dx_n + p.to(tl.int64)[None, :] * dx_p
    dy = grad + n * grad_n + p.to(tl.int64)[None, :] * grad_p if GATE else x
    first = tl.maximum(begin - 1, 0)  # the pair of the frame before is needed too
    here = x + first.to(tl.int64) * x_t
    of_here = dy + first.to(tl.int64) * grad_t
    _, square, product = sums(here, here, x_c, of_here, grad_c, C, inside, T > 0, GATE, CHANNELS)
    size = norm(square, EPS)
    across = tl.zeros([PIXELS], size.dtype)  # h / |a||b| and h s of the pair (t, t+1)
    along = across
    by_grad = across
    for t in range(first, tl.minimum(begin + length, T)):
        across_before = across
        along_before = along
        here = x + tl.cast(t, tl.int64) * x_t
        of_here = dy + tl.cast(t, tl.int64) * grad_t
        paired = T > t + 1
        dot, next_square, next_product = sums(here, here + x_t, x_c, of_here + grad_t, grad_c, C, inside, paired, GATE,
                                              CHANNELS)  # fmt: skip
        next_size = norm(next_square, EPS)
        inverse = 1 / (size * next_size)
        s = dot * inverse
        if GATE:
            h = -product - tl.where(T == t + 2, next_product, 0)
            by_grad = tl.where(paired, 1 - s, by_grad)  # the last frame's gate is the one before
        else:
            ds = grad + (n * T + t) * P + p
            h = wide(tl.load(ds, mask=within(p, P, paired), other=0))
            h += wide(tl.load(ds + P, mask=within(p, P, T == t + 2), other=0))
        across = tl.where(paired, h * inverse, 0)
        along = tl.where(paired, h * s, 0)
        to_here = (-(along_before + along) / (size * size))[None, :]
        to_before = across_before[None, :]
        to_next = across[None, :]
        to_grad = by_grad[None, :]
        if t >= begin:
            for block in range(tl.cdiv(C, CHANNELS)):
                c = block * CHANNELS + tl.arange(0, CHANNELS)
                at = here + c.to(tl.int64)[:, None] * x_c
                mask = (c < C)[:, None] & inside
                total = to_here * wide(tl.load(at, mask=mask, other=0))
                if GATE:
                    total += to_grad * wide(tl.load(of_here + c.to(tl.int64)[:, None] * grad_c, mask=mask, other=0))
                with_before = within(c, C, T * 0 + t > 0)[:, None] & inside
                total += to_before * wide(tl.load(at - x_t, mask=with_before, other=0))
                with_next = within(c, C, paired)[:, None] & inside
                total += to_next * wide(tl.load(at + x_t, mask=with_next, other=0))
                tl.store(dx + tl.cast(t, tl.int64) * dx_t + c.to(tl.int64)[:, None] * dx_c, total, mask=mask)
        size = next_size
        product = next_product


def cut(x: Clips, frames: int, *others: Clips) -> tuple[tuple[int], tuple, dict]:
    """The grid, the pixels in parts, the size of segments, and the constants for kernels that walk so many frames or
    pairs of a clip.
    """
    channels = power_of_two(x.C, 256) if x.channels_last else 64
    pixels = 2048 // channels
    programs = x.N * cdiv(x.P, pixels)
    length = cdiv(frames, max(1, PROGRAMS // programs))
    segments = cdiv(frames, length)
    constants = {**planes(x, *others), "CHANNELS": channels, "PIXELS": pixels, "num_warps": 8}
    return (programs * segments,), (x.P // constants["UNIT"], length, segments), constants


def forward(y: Clips | Tensor, x: Clips, eps: float, gate: bool) -> None:
    grid, sizes, constants = cut(x, x.T - 1, *((y,) if gate else ()))
    to = y.strides if gate else (y, 0, 0, 0, 0)
    wrap_triton(cosine_kernel)[grid](*to, *x.strides, x.T, x.C, *sizes, EPS=float(eps), GATE=gate, **constants)


def backward(dx: Clips, grad: Clips | Tensor, x: Clips, eps: float, gate: bool) -> None:
    grid, sizes, constants = cut(x, x.T, dx, *((grad,) if gate else ()))
    dy = grad.strides if gate else (grad, 0, 0, 0, 0)
    wrap_triton(cosine_backward_kernel)[grid](
        *dx.strides, *dy, *x.strides, x.T, x.C, *sizes, EPS=float(eps), GATE=gate, **constants
    )


@entry
def temporal_cosine_similarity(x: Tensor, n_segment: int | None, eps: float) -> Tensor:
    x = clips(x, n_segment)
    s = empty_like(x, n_segment, C=1)
    if x.C == 0:
        return s.tensor.zero_()
    if x.tensor.numel() > 0:
        forward(s.tensor, x, eps, False)
    return s.tensor


@entry
def temporal_cosine_similarity_backward(grad: Tensor, x: Tensor, n_segment: int | None, eps: float) -> Tensor:
    shape = (x.size(0), 1, *x.shape[2:])
    check_like(grad, x, "grad", shape)
    x = clips(x, n_segment)
    dx = empty_like(x, n_segment)
    if x.tensor.numel() > 0:
        backward(dx, grad.contiguous(), x, eps, False)
    return dx.tensor


@entry
def cosine_gate(x: Tensor, n_segment: int | None, eps: float) -> Tensor:
    x = clips(x, n_segment)
    y = empty_like(x, n_segment)
    if x.tensor.numel() > 0:
        forward(y, x, eps, True)
    return y.tensor


@entry
def cosine_gate_backward(grad: Tensor, x: Tensor, n_segment: int | None, eps: float) -> Tensor:
    x = clips(x, n_segment)
    dy = clips(grad, n_segment, x)
    dx = empty_like(x, n_segment)
    if x.tensor.numel() > 0:
        backward(dx, dy, x, eps, True)
    return dx.tensor
