"""TEINet: Liu et al., "TEINet: Towards an Efficient Architecture for Video Recognition"."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import temporal_conv
from ._layer import ChannelGate, SqueezedGate, TemporalLayer


def shifting_taps(channels: int, first: int, second: int) -> Tensor:
    """``[C, 3]``: `first` channels take frame t+1, the `second` ones after them t-1, the others stay."""
    taps = torch.zeros(channels, 3)
    taps[:first, 2] = taps[first : first + second, 0] = taps[first + second :, 1] = 1
    return taps


class TemporalInteraction(TemporalLayer):
    r"""TIM: a temporal convolution of three taps for each channel.

    .. math::
        y_t = w_0 \circ x_{t-1} + w_1 \circ x_t + w_2 \circ x_{t+1}

    ([P], TEINet.) See :func:`tempops.temporal_conv`.

    Args:
        channels: C.
        n_segment: T.

    Attributes:
        weight: ``[C, 3]``; at first a shift: ``C // 8`` channels take t+1, the next t-1, the others stay.

    `forward` takes ``[N*T, C, H, W]`` and, optionally, a `gate` ``[N*T, C]`` that multiplies the frames first.
    """

    def __init__(self, channels: int, n_segment: int) -> None:
        super().__init__(n_segment)
        self.weight = nn.Parameter(shifting_taps(channels, channels // 8, channels // 8))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return temporal_conv(x, self.weight, self.n_segment, gate)


class MotionExcitation(SqueezedGate):
    r"""MEM: channels are weighed by how the pooled frame differs from the next one.

    .. math::
        a_t = \sigma(W_3 (W_1 \bar x_t - W_2 \bar x_{t+1})), \quad u_t = a_t \circ x_t, \quad u_{T-1} = x_{T-1}

    where :math:`\bar x` is the global average pool ([P], TEINet).

    Args:
        channels: C.
        n_segment: T.
        reduction: r; the weights are ``[C/r, C]`` twice and ``[C, C/r]``. Linear layers' default initial values.
    """

    def gate(self, x: Tensor) -> Tensor:
        pooled = self.split(x.mean((2, 3)))
        weights = self.w3(self.w1(pooled[:, :-1]) - self.w2(pooled[:, 1:])).sigmoid()
        return F.pad(weights, (0, 0, 0, 1), value=1.0).flatten(0, 1)


class GatedInteraction(nn.Module):
    """A gate, then TIM: the frames are multiplied with the gate on their way through the taps.

    Args:
        gate: the layer that makes the gate: :class:`MotionExcitation` (TEINet), :class:`ProgressiveEnhancement` (TDRL)
            or :class:`ChannelMotionEnhancement` (CMR).
        channels: C.
    """

    def __init__(self, gate: ChannelGate, channels: int) -> None:
        super().__init__()
        self.gate = gate
        self.interaction = TemporalInteraction(channels, gate.n_segment)

    def forward(self, x: Tensor) -> Tensor:
        return self.interaction(x, self.gate.gate(x))
