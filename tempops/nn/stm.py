"""STM: Jiang et al., "STM: SpatioTemporal and Motion Encoding for Action Recognition"."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import bidirectional_difference, temporal_conv
from ._layer import TemporalLayer, normalized_conv, reduced


class ChannelwiseSpatioTemporal(TemporalLayer, nn.Conv2d):
    r"""CSTM: a temporal convolution of three taps for each channel, then a 3x3 convolution.

    .. math::
        y_t = K * (w_0 \circ x_{t-1} + w_1 \circ x_t + w_2 \circ x_{t+1})

    ([P], STM.) See :func:`tempops.temporal_conv`.

    Args:
        channels: C, in and out.
        n_segment: T.
        stride: that of the 3x3 convolution.

    Attributes:
        taps: ``[C, 3]``; at first a shift: the first quarter of the channels takes t-1, the last t+1, the others stay.
        weight: ``[C, C, 3, 3]``, without bias.
    """

    def __init__(self, channels: int, n_segment: int, stride: int = 1) -> None:
        super().__init__(n_segment, channels, channels, 3, stride, padding=1, bias=False)
        quarter = channels // 4
        taps = torch.zeros(channels, 3)
        taps[:quarter, 0] = taps[quarter : channels - quarter, 1] = taps[channels - quarter :, 2] = 1
        self.taps = nn.Parameter(taps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(temporal_conv(x, self.taps, self.n_segment))


class ChannelwiseMotion(TemporalLayer):
    r"""CMM: the difference of the convolved next frame and the frame, in C/16 channels.

    .. math::
        z = \text{BN}(W_1 x), \quad d_t = K * z_{t+1} - z_t, \quad d_{T-1} = 0, \quad y = W_2 d

    with a depthwise 3x3 kernel K ([P], STM). See :func:`tempops.bidirectional_difference`. Where the stride is 2, y is
    max-pooled by 2; a last odd row or column is a window of its own.

    Args:
        channels: C, in and out.
        n_segment: T.
        stride: 1 or 2.
        reduction: 16.
    """

    def __init__(self, channels: int, n_segment: int, stride: int = 1, reduction: int = 16) -> None:
        super().__init__(n_segment)
        squeezed = reduced(channels, reduction)
        self.stride = stride
        self.squeeze = nn.Conv2d(channels, squeezed, 1, bias=False)
        self.bn = nn.BatchNorm2d(squeezed)
        self.align = nn.Conv2d(squeezed, squeezed, 3, padding=1, groups=squeezed, bias=False)
        self.expand = nn.Conv2d(squeezed, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = normalized_conv(self.squeeze, self.bn, x)
        difference, _ = bidirectional_difference(z, self.align.weight, self.n_segment, True)
        y = self.expand(difference)
        return y if self.stride == 1 else F.max_pool2d(y, self.stride, ceil_mode=True)
