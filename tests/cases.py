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
    channel_divisor: int = 1
    benchmark: bool = field(default=True)

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("temporal_shift", tempops.temporal_shift, moves=True, linear=True),
    Case("temporal_shift-reversed", lambda x, t: tempops.temporal_shift(x, t, 4, "reversed"), moves=True, linear=True,
         benchmark=False),
    Case("temporal_shift-causal", lambda x, t: tempops.temporal_shift(x, t, 8, "causal"), moves=True, linear=True,
         benchmark=False),
    Case("frame_difference", lambda x, t: tempops.frame_difference(x, 4), linear=True, ranks=(4,), channel_divisor=4),
    Case("channel_motion_gate", lambda pooled, t, w1, w2, w3: tempops.channel_motion_gate(pooled, w1, w2, w3, t),
         others=lambda s, make: (make(-(-s.C // 8), s.C), make(-(-s.C // 8), s.C), make(s.C, -(-s.C // 8))), ranks=(2,)),
    Case("shift_conv1x1", lambda x, t, weight: tempops.shift_conv1x1(x, weight, None, t),
         others=lambda s, make: (make(max(1, s.C // 4), s.C, 1, 1),)),
    Case("shift_conv1x1-relu", lambda x, t, weight, bias: tempops.shift_conv1x1(x, weight, bias, t, 4, "reversed", "relu"),
         others=lambda s, make: (make(s.C, s.C, 1, 1), make(s.C)), benchmark=False),
]
