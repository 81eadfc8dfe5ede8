"""One case an op: how it is called, what else it takes, whether it computes, and what it must move.

The tests run every property over every case, the benchmarks time every case: a new op is one more entry here.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

import tempops
from tempops.ops._contract import Shape

Make = Callable[..., Tensor]


def nothing(shape: Shape, make: Make) -> tuple:
    return ()


@dataclass(frozen=True)
class Case:
    """`call(x, n_segment, *others)` runs the op.

    `others(shape, make)` gives the further tensor arguments for clips of sizes `shape`; `make(*sizes)` draws one.
    `moves` is True where data only moves, so that results compare bit for bit.
    `linear` is True where the backward does not read x. `rereads` counts further reads of x that no kernel can avoid.
    `ranks` are those that x may have: 4, 5, or 2 for [N*T, C]. `channel_divisor` divides C.
    `reach` is how many frames away an output frame reads; None for the whole clip.
    `autocasts` is True where the op computes in autocast's dtype, as conv2d does.

    The benchmarks feed `from_activation(a)` for each `a` that `activations` names (benchmarks/activations.py). `matmul`
    is True where the time goes into matrix products, so that a copy of the same bytes is no yardstick.
    """

    name: str
    call: Callable
    others: Callable[[Shape, Make], tuple] = nothing
    moves: bool = False
    linear: bool = False
    rereads: int = 0
    least_frames: int = 1
    ranks: tuple[int, ...] = (4, 5)
    channel_divisor: int = 1
    reach: int | None = 1
    autocasts: bool = False
    benchmark: bool = True
    activations: tuple[str, ...] = ("64x56", "256x56", "512x28", "1024x14", "2048x7")
    from_activation: Callable[[Tensor], Tensor] = lambda activation: activation
    matmul: bool = False

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("temporal_shift", tempops.temporal_shift, moves=True, linear=True),
    Case("temporal_shift-reversed", lambda x, t: tempops.temporal_shift(x, t, 4, "reversed"), moves=True, linear=True,
         benchmark=False),
    Case("temporal_shift-causal", lambda x, t: tempops.temporal_shift(x, t, 8, "causal"), moves=True, linear=True,
         benchmark=False),
    Case("temporal_conv", lambda x, t, w: tempops.temporal_conv(x, w, t), lambda s, make: (make(s.C, 3),)),
    Case("temporal_conv-gate", lambda x, t, w, g: tempops.temporal_conv(x, w, t, g),
         lambda s, make: (make(s.C, 3), make(s.N * s.T, s.C))),
    Case("temporal_conv-clip", lambda x, t, w, g: tempops.temporal_conv(x, w, t, g),
         lambda s, make: (make(s.N, s.C, 5), make(s.N * s.T, s.C)), reach=2, benchmark=False),
    Case("temporal_conv-long", lambda x, t, w: tempops.temporal_conv(x, w, t), lambda s, make: (make(1, 7),),
         reach=3, benchmark=False),
]  # fmt: skip
