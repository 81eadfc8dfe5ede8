"""One case an op: how it is called, what else it takes, whether it computes, and what it must move.

The tests run every property over every case, the benchmarks time every case: a new op is one more entry here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

import tempops
from tempops.ops._contract import Shape

Make = Callable[..., Tensor]


def nothing(shape: Shape, make: Make) -> tuple:
    return ()


def two_like_x(shape: Shape, make: Make) -> tuple:
    n, t, c, h, w = shape
    return make(n * t, c, h, w), make(n * t, c, h, w)


def motion_attention(x: Tensor, n_segment: int | None, *logits: Tensor, centered: bool = False) -> Tensor:
    if x.dim() == 5:
        logits = (a.unflatten(0, (x.size(0), x.size(2))).transpose(1, 2) for a in logits)
    return tempops.motion_attention(x, *logits, centered)


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
    Case("temporal_cosine_similarity", tempops.temporal_cosine_similarity, least_frames=2, least_channels=2),
    Case("cosine_gate", tempops.cosine_gate, rereads=1, least_frames=2, least_channels=2),
    Case("motion_attention", motion_attention, others=two_like_x),
    Case("motion_attention-centered", partial(motion_attention, centered=True), others=two_like_x, benchmark=False),
]
