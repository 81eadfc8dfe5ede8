"""One case an op: how it is called, what else it takes, whether it computes, and what it must move.

The tests run every property over every case, the benchmarks time every case: a new op is one more entry here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import tempops
from tempops import _backend
from tempops.ops._contract import Shape

Make = Callable[..., Tensor]


def nothing(shape: Shape, make: Make) -> tuple:
    return ()


def two_like_x(shape: Shape, make: Make) -> tuple:
    n, t, c, h, w = shape
    return make(n * t, c, h, w), make(n * t, c, h, w)


def motion_attention(x: Tensor, n_segment: int | None, *logits: Tensor, centered: bool = False) -> Tensor:
    return tempops.motion_attention(x, *logits, centered)


def squeeze_and_expand(shape: Shape, make: Make) -> tuple:
    reduced = -(-shape.C // 8)
    squeeze = (reduced, shape.C)
    return make(*squeeze) / shape.C**0.5, make(*squeeze) / shape.C**0.5, make(shape.C, reduced) / reduced**0.5


def why_not(backend: str, op: str, device: str) -> str | None:
    """Why a back end does not run an op on a device's tensors; None where it does."""
    try:
        with tempops.backend(backend):
            _backend.namespace(torch.device(device).type, op)
    except RuntimeError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Case:
    """`call(x, n_segment, *others)` runs the op.

    `others(shape, make)` gives the further tensor arguments for clips of sizes `shape`; `make(*sizes)` draws one.
    `moves` is True where data only moves, so that results compare bit for bit.
    `linear` is True where the backward does not read x. `rereads` counts further reads of x that no kernel can avoid,
    except on a GPU in channels_last, where what a pixel needs fits on chip.
    `ranks` are those that x may have: 4, 5, or 2 for [N*T, C]. `channel_divisor` divides C.
    `reach` is how many frames away an output frame reads; None for the whole clip.
    `autocasts` is True where the op computes in autocast's dtype, as conv2d does.

    The benchmarks feed `from_activation(a)` for each `a` that `activations` names (benchmarks/activations.py). `matmul`
    is True where the time goes into matrix products, so that a copy of the same bytes is no yardstick; `conv` is
    the convolution alone, called as the op is.
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
    conv: Callable | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def op(self) -> str:
        """The name of the function in `tempops`."""
        return self.name.partition("-")[0]


CASES = [
    Case("temporal_shift", tempops.temporal_shift, moves=True, linear=True),
    Case("temporal_shift-reversed", lambda x, t: tempops.temporal_shift(x, t, 4, "reversed"), moves=True, linear=True,
         benchmark=False),
    Case("temporal_shift-causal", lambda x, t: tempops.temporal_shift(x, t, 8, "causal"), moves=True, linear=True,
         benchmark=False),
    Case("temporal_shift-all", lambda x, t: tempops.temporal_shift(x, t, 1, "causal"), moves=True, linear=True,
         benchmark=False),
    Case("temporal_conv", lambda x, t, w: tempops.temporal_conv(x, w, t), lambda s, make: (make(s.C, 3),)),
    Case("temporal_conv-gate", lambda x, t, w, g: tempops.temporal_conv(x, w, t, g),
         lambda s, make: (make(s.C, 3), make(s.N * s.T, s.C))),
    Case("temporal_conv-clip", lambda x, t, w, g: tempops.temporal_conv(x, w, t, g),
         lambda s, make: (make(s.N, s.C, 5), make(s.N * s.T, s.C)), reach=2, benchmark=False),
    Case("temporal_conv-long", lambda x, t, w: tempops.temporal_conv(x, w, t), lambda s, make: (make(1, 7),),
         reach=3, benchmark=False),
    Case("motion_enhance", tempops.motion_enhance, least_frames=2),
    Case("motion_enhance-wide", lambda x, t: tempops.motion_enhance(x, t, 5), least_frames=2, benchmark=False),
    Case("temporal_cosine_similarity", tempops.temporal_cosine_similarity, least_frames=2),
    Case("cosine_gate", tempops.cosine_gate, rereads=1, least_frames=2),
    Case("bidirectional_difference", lambda x, t, w: tempops.bidirectional_difference(x, w, t),
         lambda s, make: (make(s.C, 1, 3, 3),)),
    Case("bidirectional_difference-neighbor", lambda x, t, w: tempops.bidirectional_difference(x, w, t, True),
         lambda s, make: (make(s.C, 1, 3, 3),), benchmark=False),
    Case("motion_attention", motion_attention, two_like_x),
    Case("motion_attention-centered", partial(motion_attention, centered=True), two_like_x, benchmark=False),
    Case("frame_difference", lambda x, t: tempops.frame_difference(x, 5), linear=True, ranks=(4,), channel_divisor=5,
         reach=0, activations=("15x224",)),
    Case("frame_difference-pool", lambda x, t: tempops.frame_difference(x, 5, 3), linear=True, ranks=(4,),
         channel_divisor=5, reach=0, benchmark=False),
    Case("channel_motion_gate", lambda pooled, t, w1, w2, w3: tempops.channel_motion_gate(pooled, w1, w2, w3, t),
         squeeze_and_expand, ranks=(2,), reach=None, from_activation=lambda a: a.mean((2, 3)), matmul=True),
    Case("shift_conv1x1", lambda x, t, w: tempops.shift_conv1x1(x, w, None, t),
         lambda s, make: (make(max(1, s.C // 4), s.C, 1, 1),), autocasts=True, matmul=True,
         conv=lambda x, t, w: F.conv2d(x, w)),
    Case("shift_conv1x1-relu", lambda x, t, w, b: tempops.shift_conv1x1(x, w, b, t, 4, "reversed", "relu"),
         lambda s, make: (make(s.C, s.C, 1, 1), make(s.C)), reach=2, autocasts=True, benchmark=False, matmul=True),
]  # fmt: skip
