"""What the Triton kernels share: how an entry is registered, how tensors are read, how a launch is cut into programs.

Glossary: N clips, T frames a clip, C channels, H rows, W columns, P = H * W pixels. A frame's elements are numbered
in the order of the layout: element i is number i % length of run i // length, where a run is a channel's P pixels or
a pixel's C channels (channels_last). Programs walk T, so that a frame is read from memory once.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._contract import DTYPES, checked, clip_shape, empty_clips, is_channels_last, register_in

INTERPRETED = bool(triton.knobs.runtime.interpret)

BLOCK = 1024  # elements of a program: 8 a thread, which is one access of 16 bytes in 16 bits and four in 64


# --- entries ----------------------------------------------------------------------------------------------------------


def wrap_triton(kernel):
    """The kernel as PyTorch's tracers see it; the interpreter's kernels are none that they take."""
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


def registers(x: Tensor, most: int) -> dict:
    """The option that leaves a thread so many registers, for more of them; tracers do not know it, and go without."""
    return {} if INTERPRETED or is_traced(x) else {"maxnreg": most}


def is_traced(x: Tensor) -> bool:
    """Whether the tensor is a tracer's, which has no memory."""
    return type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__


def entry(implementation: Callable) -> Callable:
    """Registers a function as the entry of its name, with the schema, check, fake and derivative of the C++ one.

    torch.compile sees the kernels inside, except those of the interpreter; torch.export keeps the entry.
    """
    name = implementation.__name__
    runs = checked(name, _on_its_device(implementation))
    runs.__signature__ = _signature(name)
    if INTERPRETED:
        torch.library.custom_op(f"tempops_triton::{name}", runs, mutates_args=())
    else:
        torch.library.triton_op(f"tempops_triton::{name}", runs, mutates_args=())
    register_in("tempops_triton", name)
    entries[name] = checked(name, implementation)
    return implementation


entries: dict[str, Callable] = {}  # for tools that run them on tensors without memory


def inplace_entry(implementation: Callable) -> Callable:
    """Registers an entry that changes its first argument. No tracer meets one: compilers have no in-place."""
    name = implementation.__name__
    schema = str(_schema(name))
    _library.define(name + schema[schema.index("(") :])
    _library.impl(name, checked(name, _on_its_device(implementation)), "CompositeExplicitAutograd")
    register_in("tempops_triton", name)
    return implementation


_library = torch.library.Library("tempops_triton", "FRAGMENT")  # a registration lasts as long as its Library


def _schema(name: str) -> torch.FunctionSchema:
    return getattr(torch.ops.tempops, name).default._schema


def _signature(name: str) -> inspect.Signature:
    """The schema of an entry as triton_op reads it, from annotations."""
    kinds = {"Tensor": Tensor, "int": int, "float": float, "bool": bool, "str": str}

    def annotation(kind: str) -> object:
        optional = kind.startswith("Optional[")
        return Optional[kinds[kind[9:-1]]] if optional else kinds[kind]  # noqa: UP045, the form that torch 2.11 reads

    parameters = []
    for argument in _schema(name).arguments:
        default = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        parameters.append(
            inspect.Parameter(
                argument.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=default,
                annotation=annotation(str(argument.type)),
            )
        )
    results = (Tensor,) * len(_schema(name).returns)
    return inspect.Signature(parameters, return_annotation=Tensor if len(results) == 1 else tuple[results])


def _on_its_device(implementation: Callable) -> Callable:
    @functools.wraps(implementation)
    def wrapper(x: Tensor, *args):
        if x.device.type == "cuda" and not is_traced(x):
            with torch.cuda.device(x.device):
                return implementation(x, *args)
        if x.device.type == "cpu" and not INTERPRETED:
            raise RuntimeError("Triton kernels take CPU tensors only in the interpreter: set TRITON_INTERPRET=1")
        return implementation(x, *args)

    return wrapper


# --- tensors ----------------------------------------------------------------------------------------------------------


class Clips(NamedTuple):
    """A tensor as kernels read it: channel c of pixel p of frame t of clip n is at n*sn + t*st + c*sc + p*sp.

    Either sp is 1 (planar), or sc is 1 (channels_last): the rule that csrc/common.h follows too.
    """

    tensor: Tensor
    N: int
    T: int
    C: int
    H: int
    W: int
    sn: int
    st: int
    sc: int
    sp: int
    channels_last: bool

    @property
    def P(self) -> int:
        return self.H * self.W

    @property
    def size(self) -> int:
        """The elements of a frame."""
        return self.C * self.H * self.W

    @property
    def length(self) -> int:
        """The elements of a run."""
        return self.C if self.channels_last else self.H * self.W

    @property
    def pitch(self) -> int:
        """From a run to the next."""
        return self.sp if self.channels_last else self.sc

    @property
    def dense(self) -> bool:
        """Whether a frame is one piece of memory."""
        return self.pitch == self.length or self.size == self.length

    @property
    def address(self) -> tuple:
        """What a kernel gets of a tensor that it reads by frames: pointer, strides of clips and frames, pitch."""
        return self.tensor, self.sn, self.st, self.pitch

    @property
    def strides(self) -> tuple:
        """What a kernel gets of a tensor that it reads by channel and pixel: pointer and strides."""
        return self.tensor, self.sn, self.st, self.sc, self.sp


def clips(
    x: Tensor,
    n_segment: int | None,
    like: Clips | None = None,
    name: str = "grad",
    *,
    channels_last: bool | None = None,
) -> Clips:
    """Reads a tensor, in place where its strides allow; `like` asks for that one's layout, shape, dtype and device."""
    if like is not None:
        check_like(x, like.tensor, name)
        channels_last = like.channels_last
    if channels_last is None:
        channels_last = is_channels_last(x)
    if not _readable(x, channels_last):
        x = x.contiguous(memory_format=format_of(x, channels_last))
    return view(x, n_segment, channels_last)


def empty_like(x: Clips, n_segment: int | None, **sizes: int) -> Clips:
    """An uninitialised tensor in the layout of x, with the named sizes (T, C, H, W) replaced."""
    y = empty_clips(x.tensor, n_segment, **sizes)
    return view(y, sizes.get("T", n_segment) if y.dim() == 4 else None, x.channels_last)


def nothing(x: Tensor) -> Tensor:
    """What an entry returns in place of a gradient that nobody asked for."""
    return x.new_empty(0)


def check_like(x: Tensor, like: Tensor, name: str, shape: tuple | None = None) -> None:
    """Raises unless x has a shape (that of `like` where none is given), and dtype and device of `like`."""
    shape = like.shape if shape is None else shape
    if tuple(x.shape) != tuple(shape):
        raise RuntimeError(f"{name} must have shape {list(shape)}, got {list(x.shape)}")
    if x.dtype != like.dtype or x.device != like.device:
        raise RuntimeError(f"{name} must have dtype {like.dtype} on {like.device}, got {x.dtype} on {x.device}")
    if x.dtype not in DTYPES:
        raise RuntimeError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")


def format_of(x: Tensor, channels_last: bool) -> torch.memory_format:
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last_3d if x.dim() == 5 else torch.channels_last


def _readable(x: Tensor, channels_last: bool) -> bool:
    h, w = x.dim() - 2, x.dim() - 1

    def step(d: int, expected: int) -> bool:
        return x.size(d) <= 1 or x.stride(d) == expected

    if not channels_last:
        return step(w, 1) and step(h, x.size(w))
    return step(1, 1) and (x.size(w) <= 1 or step(h, x.size(w) * x.stride(w)))


def view(x: Tensor, n_segment: int | None, channels_last: bool) -> Clips:
    n, t, c, h, w = clip_shape(x, n_segment)
    if c * h * w > 2**31 - 4096:  # numbers of elements are rounded up to whole blocks
        raise RuntimeError("frames of more than 2^31 - 4096 elements are not supported")
    if x.dim() == 5:
        sn, st = x.stride(0), x.stride(2)
    else:
        sn, st = x.stride(0) * t, x.stride(0)
    sc, sp = x.stride(1), x.stride(-1) if w > 1 else x.stride(-2)
    # The stride of a dimension of size 1 says nothing; kernels may rely on these.
    if channels_last:
        sc, sp = 1, c if h * w == 1 else sp
    else:
        sc, sp = h * w if c == 1 else sc, 1
    return Clips(x, n, t, c, h, w, sn, st, sc, sp, channels_last)


# --- launches ---------------------------------------------------------------------------------------------------------


def frame_cut(*tensors: Clips, block: int = BLOCK) -> dict:
    """The constants with which kernels find a frame's elements in all of these tensors."""
    dense = all(x.dense for x in tensors)
    return {"DENSE": dense, "CHANNELS_LAST": tensors[0].channels_last, "BLOCK": block}


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int, most: int) -> int:
    """The least power of two that is not below n, or `most`."""
    power = 1
    while power < n and power < most:
        power *= 2
    return power


def fitting(n: int, most: int) -> int:
    """The greatest power of two up to `most` of which multiples cover n elements with few to spare."""
    part = most
    while part > 8 and n < 0.85 * part * cdiv(n, part):
        part //= 2
    return part


class Tiles(NamedTuple):
    """How frames are cut where a program adds up pixels: into tiles of some channels by some pixels.

    `channels` by `pixels` elements; `blocks` tiles along the channels, `chunks` along the pixels.
    """

    channels: int
    pixels: int
    blocks: int
    chunks: int

    @property
    def constants(self) -> dict:
        return {"CHANNELS": self.channels, "PIXELS": self.pixels}


def tiles(x: Clips, channels: int = 32, elements: int = BLOCK) -> Tiles:
    """Tiles of `elements`: at least a row of pixels (planar), `channels` where these are adjacent (channels_last)."""
    if x.channels_last:
        channels = power_of_two(x.C, channels)
        pixels = elements // channels
    else:
        pixels = power_of_two(x.P, elements)
        channels = elements // pixels
    return Tiles(channels, pixels, cdiv(x.C, channels), cdiv(x.P, pixels))


def partial_sums(x: Clips, *sizes: int) -> Tensor:
    """Memory for sums, in the type in which x is added up."""
    dtype = torch.float64 if x.tensor.dtype == torch.float64 else torch.float32
    return torch.empty(sizes, dtype=dtype, device=x.tensor.device)


@triton.jit
def wide(value):
    """A value in the type in which it is computed with: float64 for float64, else float32."""
    if value.dtype == tl.float64:
        return value
    else:
        return value.to(tl.float32)


@triton.jit
def place(size, BLOCK: tl.constexpr):
    """What a program has: the row of programs that it is in, and its elements of a frame of `size`."""
    blocks = tl.cdiv(size, BLOCK)
    row = tl.program_id(0) // blocks
    i = (tl.program_id(0) - row * blocks) * BLOCK + tl.arange(0, BLOCK)
    return row.to(tl.int64), i


@triton.jit
def offset(i, length, pitch, DENSE: tl.constexpr):
    """Where element i of a frame is, from the beginning of the frame."""
    if DENSE:
        return i.to(tl.int64)
    else:
        return (i // length).to(tl.int64) * pitch + i % length


@triton.jit
def channel(i, length, CHANNELS_LAST: tl.constexpr):
    """The channel of element i of a frame."""
    if CHANNELS_LAST:
        return i % length
    else:
        return i // length


@triton.jit
def pixel(i, length, CHANNELS_LAST: tl.constexpr):
    """The pixel of element i of a frame."""
    if CHANNELS_LAST:
        return i // length
    else:
        return i % length


@triton.jit
def within(i, size, present):
    """i < size where `present` holds, else False. As one comparison, which a wide load can be masked with."""
    return i < tl.where(present, size, 0)


@triton.jit
def tile(C, P, CHANNELS: tl.constexpr, PIXELS: tl.constexpr):
    """What a program that adds up pixels has: its row of programs, its chunk of the pixels, channels and pixels."""
    blocks, chunks = tl.cdiv(C, CHANNELS), tl.cdiv(P, PIXELS)
    chunk = tl.program_id(0) % chunks
    rest = tl.program_id(0) // chunks
    c = (rest % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    p = chunk * PIXELS + tl.arange(0, PIXELS)
    return (rest // blocks).to(tl.int64), chunk, c, p


@triton.jit
def total_kernel(
    out, parts, kernels, rows, K, C, group,
    PER_CLIP: tl.constexpr, ELEMENTS: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """out [kernels, K] from parts [.., K, C]: kernel i of a clip adds up its `rows` rows and its `group` channels.

    In float64 and in a fixed order.
    """
    e = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    i, k = e % kernels, e // kernels
    first = (i // C).to(tl.int64) * rows if PER_CLIP else tl.zeros([ELEMENTS], tl.int64)
    begin = i % C if PER_CLIP else i * group
    inside = (e < kernels * K)[:, None]
    sums = tl.zeros([ELEMENTS, TERMS], tl.float64)
    terms = rows * group
    for at in range(0, tl.cdiv(terms, TERMS)):
        term = at * TERMS + tl.arange(0, TERMS)
        row = first[:, None] + (term // group)[None, :]
        c = begin[:, None] + (term % group)[None, :]
        mask = inside & (term < terms)[None, :]
        sums += tl.load(parts + (row * K + k[:, None]) * C + c, mask=mask, other=0).to(tl.float64)
    tl.store(out + i * K + k, wide_as(tl.sum(sums, 1), out), mask=e < kernels * K)


def add_up(out: Tensor, parts: Tensor, rows: int, C: int, K: int, group: int = 1, per_clip: bool = False) -> None:
    """Writes to `out`, [.., K], the sums of `rows` rows of parts [.., K, C], by clip where each has kernels."""
    wrap_triton(total_kernel)[(cdiv(out.numel(), 16),)](
        out, parts, out.numel() // K, rows, K, C, group, PER_CLIP=per_clip, ELEMENTS=16, TERMS=64
    )


def planes(*tensors: Clips) -> dict:
    """That the channels of all tensors follow one another, and the factor of P that wide loads are made of."""
    x = tensors[0]
    dense = all(not a.channels_last and a.sc == a.P for a in tensors)
    return {"PLANES": dense, "UNIT": math.gcd(x.P, max(1, 16 // x.tensor.element_size()))}


@triton.jit
def wide_as(value, out):
    """A float64 on its way to `out`: by way of float32 where out is narrower, as there is no shorter one."""
    if out.dtype.element_ty == tl.float64:
        return value
    else:
        return value.to(tl.float32)
