"""TEFE: Jiang and Zhang, "... With Temporal Extraction and Feature Enhancement" (paper 003)."""

import torch
from torch import Tensor, nn

from ._layer import TemporalLayer
from .conv import TemporalConv2d
from .tanet import TemporalAdaptive


class TemporalExtraction(TemporalAdaptive):
    r"""TE: a gate made from adjacent frames, then a temporal convolution whose taps each clip makes for itself.

    .. math::
        X^0 = \sigma(V_2 * V_1 * \bar X) \circ X, \quad q = \text{softmax}(F(W_2, F(W_1, \bar X))), \quad
        Y = q \otimes X^0

    ([P], TEFE eq. 1-6, K = 3, r = 4.) Batch normalisation and ReLU between the layers of a branch are [D], as in
    TANet, whose module has the same shape: the equations show none, and without them two layers would be one.

    Args:
        channels: C.
        n_segment: T; it can not be changed.
        reduction: r.
        taps: K.
    """


class FeatureEnhancement(TemporalLayer):
    r"""FE: the product of two 3x3x3 convolutions, an approximation of bilinear pooling.

    .. math::
        Y = U(\text{Conv}_1(X) \circ \text{Conv}_2(X))

    ([P], TEFE eq. 10.) U is the 1x1 convolution that follows in the block, and not part of this layer.

    Args:
        channels: C, in and out.
        n_segment: T.
        stride: that of both convolutions, in space.

    Attributes:
        conv1: :class:`TemporalConv2d` without bias. Loading an image network's 3x3 weights puts them into the tap of
            frame t and zeros into the others.
        conv2: :class:`TemporalConv2d`, weight 0 and bias 1, so that the layer starts as `conv1` alone (eq. 11).
    """

    def __init__(self, channels: int, n_segment: int, stride: int = 1) -> None:
        super().__init__(n_segment)
        self.conv1 = TemporalConv2d(channels, channels, 3, n_segment, stride, 1)
        self.conv2 = TemporalConv2d(channels, channels, 3, n_segment, stride, 1, bias=True)
        nn.init.zeros_(self.conv2.weight)
        nn.init.ones_(self.conv2.offset)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(x) * self.conv2(x)

    def from_2d(self, weight: Tensor) -> dict[str, Tensor]:
        """The parameters for an image network's weights: they are Conv1's middle slice."""
        zeros = torch.zeros_like(weight)
        return {"conv1.weight": torch.cat((zeros, weight, zeros))}
