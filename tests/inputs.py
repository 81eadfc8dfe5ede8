"""Inputs for a case: every layout, every shape that has broken a kernel of this kind before."""

import os
from collections.abc import Callable

import pytest
import torch
from cases import Case
from torch import Tensor

from tempops.ops._contract import Shape

GPU = ("cuda", "triton")
on_gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU"))
# The back ends that are compared with eager: without a GPU, Triton's kernels run in its interpreter, and slowly.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = ("triton",) if INTERPRETED else ("cpu", *(pytest.param(name, marks=on_gpu) for name in GPU))
DEVICE = "cpu"  # where `make` puts tensors; tests/conftest.py sets it for a test of a GPU's back end
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
if not INTERPRETED:  # where derivatives are compared in float64
    DTYPES = (*DTYPES, torch.float64)

BASE = Shape(1, 3, 16, 7, 7) if INTERPRETED else Shape(2, 4, 16, 7, 7)
SHAPES = (
    BASE,  # 7x7: 49 pixels, no row is aligned
    Shape(2, 3, 13, 9, 4),  # odd T, C not divisible by 8
    Shape(1, 1, 13, 5, 6),  # one frame
    Shape(1, 5, 3, 14, 15),  # fewer channels than fold_div
    Shape(3, 2, 24, 1, 1),  # one pixel
    Shape(1, 3, 10, 37, 41),  # planes past one tile, nothing a multiple of anything
    Shape(1, 2, 1100, 2, 3),  # more channels than one tile
    Shape(1, 2, 24, 6, 6),  # planes of whole 8-byte accesses, not of 16 bytes in 16-bit dtypes
    Shape(1, 3, 192, 16, 9),  # whole 16-byte accesses everywhere, several tiles
    Shape(1, 2, 16, 3, 152),  # wide rows of few channels: several tiles of one
    Shape(0, 4, 8, 3, 3),  # no clips
    Shape(2, 3, 8, 0, 3),  # no pixels
)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _five(x: Tensor, n: int, t: int) -> Tensor:
    return x.unflatten(0, (n, t)).transpose(1, 2)


def _wide(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, 0, 3, 2), value=torch.nan)


def _offset(x: Tensor) -> Tensor:
    """x in storage that starts one element late, so that no row is aligned."""
    return torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)


def _crop(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (1, 1, 1, 1), value=torch.nan)[:, :, 1 : 1 + x.size(2), 1 : 1 + x.size(3)]


# The first six are read in place, the others at the price of a copy.
LAYOUTS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "contiguous": lambda x, n, t: x,
    "channels_last": lambda x, n, t: _channels_last(x),
    "slice": lambda x, n, t: _wide(x)[:, 3:-2],
    "channels_last_slice": lambda x, n, t: _channels_last(_wide(x))[:, 3:-2],
    "five": lambda x, n, t: _five(x, n, t).contiguous(),
    "five_channels_last": lambda x, n, t: _five(x, n, t).contiguous(memory_format=torch.channels_last_3d),
    "five_view": lambda x, n, t: _five(x, n, t),
    "offset": lambda x, n, t: _offset(x),
    "permuted": lambda x, n, t: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "cropped": lambda x, n, t: _crop(x),
}
NATIVE = ("contiguous", "channels_last", "slice", "channels_last_slice", "five", "five_channels_last")
FLAT_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "slice": lambda x: torch.cat([x, x], 1)[:, : x.size(1)],
    "permuted": lambda x: x.t().contiguous().t(),
}


def layouts(case: Case) -> list[str]:
    if case.ranks == (2,):
        return list(FLAT_LAYOUTS)
    return [name for name in LAYOUTS if (5 if name.startswith("five") else 4) in case.ranks]


def fits(case: Case, shape: Shape) -> bool:
    return shape.T >= case.least_frames


def make(
    case: Case,
    shape: Shape,
    layout: str,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
    device: str | None = None,
):
    """(x, n_segment, *others) for a case, leaves that require gradients, values exact in `dtype`."""
    device = device or DEVICE
    shape = shape._replace(C=shape.C - shape.C % case.channel_divisor or case.channel_divisor)

    def draw(*sizes: int) -> Tensor:
        return (torch.randn(sizes, dtype=torch.float64, device=device) * scale).to(dtype)

    n, t, c, h, w = shape
    if case.ranks == (2,):
        x = FLAT_LAYOUTS[layout](draw(n * t, c))
    else:
        x = LAYOUTS[layout](draw(n * t, c, h, w), n, t)
    others = [
        (LAYOUTS[layout](other, n, t) if other.shape == (n * t, c, h, w) else other).requires_grad_()
        for other in case.others(shape, draw)
    ]
    return x.requires_grad_(), None if layout.startswith("five") else t, *others


def as_tuple(out: Tensor | tuple) -> tuple:
    return out if isinstance(out, tuple) else (out,)
