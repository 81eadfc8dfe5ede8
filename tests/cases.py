"""One case an op: how it is called, what else it takes, whether it computes, and what it must move.

The tests run every property over every case, the benchmarks time every case: a new op is one more entry here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

import tempops
from tempops.ops._contract import Shape

Make = Callable[..., Tensor]


def nothing(shape: Shape, make: Make) -> tuple:
    return ()


def kernels_3x3(shape: Shape, make: Make) -> tuple:
    return (make(shape.C, 1, 3, 3),)


@dataclass(frozen=True)
class Case:
    """`call(x, n_segment, *others)` runs the op; x is a tensor of clips unless `make_x` says otherwise.

    `others(shape, make)` gives the further tensor arguments for clips of sizes `shape`; `make(*sizes)` draws one.
    `moves` is True where data only moves, so that results compare bit for bit.
    `linear` is True where the backward does not read x. `rereads` counts further reads of x that no kernel can avoid.
    """

    name: str
    call: Callable
    others: Callable[[Shape, Make], tuple] = nothing
    moves: bool = False
    linear: bool = False
    rereads: int = 0
    least_frames: int = 1
    ranks: tuple[int, ...] = (4, 5)
    least_channels: int = 1
    benchmark: bool = field(default=True)

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("temporal_shift", tempops.temporal_shift, moves=True, linear=True),
    Case("temporal_shift-reversed", lambda x, t: tempops.temporal_shift(x, t, 4, "reversed"), moves=True, linear=True,
         benchmark=False),
    Case("temporal_shift-causal", lambda x, t: tempops.temporal_shift(x, t, 8, "causal"), moves=True, linear=True,
         benchmark=False),
    Case("motion_enhance", tempops.motion_enhance, least_frames=2),
    Case("motion_enhance-5", lambda x, t: tempops.motion_enhance(x, t, 5), least_frames=2, benchmark=False),
    Case("bidirectional_difference", lambda x, t, weight: tempops.bidirectional_difference(x, weight, t),
         others=kernels_3x3),
    Case("bidirectional_difference-neighbor_first",
         lambda x, t, weight: tempops.bidirectional_difference(x, weight, t, True), others=kernels_3x3,
         benchmark=False),
]
