"""Times the tiles of Triton's shift_conv1x1 on this GPU: `python benchmarks/tune.py [bfloat16] [channels_last]`.

Prints for every stage of a ResNet-50 and direction the fastest tiles with their rate and their time over that of the
convolution alone: what TILES in tempops/triton/shift_conv1x1.py should say.
"""

import itertools
import sys

import torch
import torch.nn.functional as F
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench

import tempops
from tempops.triton import shift_conv1x1 as module

FRAMES, SEGMENTS = 256, 8
STAGES = ((64, 64, 56), (256, 64, 56), (512, 128, 28), (512, 256, 28), (1024, 256, 14), (2048, 512, 7))  # C, Cout, side
TILES = [
    (m, n, k, warps, stages)
    for (m, n), k, stages in itertools.product(
        ((64, 64), (64, 128), (128, 16), (128, 32), (128, 64), (128, 128), (128, 256), (256, 64), (256, 128)),
        (64, 128),  # bytes
        (2, 3, 4),
    )
    for warps in ((4, 8) if m * n <= 128 * 128 else (8,))
]


def seconds(call) -> float:
    return do_bench(call, warmup=10, rep=50, return_mode="median") / 1e3


def rank(call, columns: int) -> list[tuple[float, tuple]]:
    """The tiles that run, no wider than they need be, by the time that a call takes with them."""
    times = []
    for tile in TILES:
        if tile[1] >= 2 * max(columns, 16):
            continue
        module.TILES = {(0, 0, 0): tile}
        try:
            times.append((seconds(call), tile))
        except (OutOfResources, PTXASError, StopIteration):  # too large for this GPU
            continue
    return sorted(times)


def main(dtype: str = "bfloat16", layout: str = "channels_last", device: str = "cuda") -> None:
    form = getattr(torch, "contiguous_format" if layout == "contiguous" else layout)
    print(f"{'direction':10}{'C':>6}{'Cout':>6}{'side':>6}{'TFLOP/s':>9}{'over conv':>11}  tile")
    for C, Cout, side in STAGES:
        x = torch.randn(FRAMES, C, side, side, dtype=getattr(torch, dtype), device=device).to(memory_format=form)
        weight = torch.randn(Cout, C, 1, 1, dtype=x.dtype, device=device) / C**0.5
        x.requires_grad_()

        def forward(x=x, weight=weight):
            with torch.no_grad(), tempops.backend("triton"):
                return tempops.shift_conv1x1(x, weight, None, SEGMENTS)

        dy = torch.randn_like(forward())
        with tempops.backend("triton"):
            y = tempops.shift_conv1x1(x, weight, None, SEGMENTS)
        plain = F.conv2d(x, weight)
        for direction, columns, call, conv in (
            ("forward", Cout, forward, lambda x=x, weight=weight: F.conv2d(x.detach(), weight)),
            ("to x", C, lambda y=y, x=x, dy=dy: torch.autograd.grad(y, x, dy, retain_graph=True),
             lambda y=plain, x=x, dy=dy: torch.autograd.grad(y, x, dy, retain_graph=True)),
        ):  # fmt: skip
            alone = seconds(conv)
            for time, tile in rank(call, columns)[:3]:
                rate = 2 * x.numel() * Cout / time / 1e12
                print(f"{direction:10}{C:6}{Cout:6}{side:6}{rate:9.0f}{time / alone:11.2f}  {tile}", flush=True)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU")
    main(*sys.argv[1:])
