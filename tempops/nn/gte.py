"""GTE: Liu et al., "Grouped Temporal Enhancement Module for Human Action Recognition" (paper 001)."""

import torch
from torch import Tensor, nn

from ..ops import temporal_conv
from ._layer import TemporalLayer
from .conv import TemporalConv2d
from .teinet import shifting_taps


class LearnableTemporalShift(TemporalLayer):
    r"""LTS: a temporal convolution that starts as a shift.

    .. math::
        y_t = W_0 x_{t-1} + W_1 x_t + W_2 x_{t+1}

    ([P], GTE eq. 1-3.) The paper's text reads both ways: with ``out_channels`` the W are matrices, a (3, 1, 1)
    convolution (the published parameters and multiply-adds); without, a number for each channel ("very few extra
    parameters").

    Args:
        channels: C.
        n_segment: T.
        out_channels: the channels of the result; None for one kernel a channel.

    Attributes:
        weight: ``[C, 3]``. Initially [D] an eighth of the channels takes t+1, :math:`W_f = (0, 0, 1)`, the next eighth
            t-1, :math:`W_b = (1, 0, 0)`, the others stay.
        conv: with ``out_channels``, a :class:`TemporalConv2d` with the same taps on its diagonal.
    """

    def __init__(self, channels: int, n_segment: int, out_channels: int | None = None) -> None:
        super().__init__(n_segment)
        if out_channels is None:
            self.conv = None
            self.weight = nn.Parameter(shifting_taps(channels, channels // 8, channels // 8))
            return
        self.conv = TemporalConv2d(channels, out_channels, 1, n_segment)
        taps = shifting_taps(out_channels, out_channels // 8, out_channels // 8)
        matrices = torch.diag_embed(taps.t(), dim1=1, dim2=2)[:, :, :channels]
        with torch.no_grad():
            self.conv.weight.zero_().unflatten(0, (3, -1))[:, :, : matrices.size(2), 0, 0] = matrices

    def forward(self, x: Tensor) -> Tensor:
        return temporal_conv(x, self.weight, self.n_segment) if self.conv is None else self.conv(x)
