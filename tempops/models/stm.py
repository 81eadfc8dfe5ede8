"""STM: Jiang et al., "STM: SpatioTemporal and Motion Encoding for Action Recognition"."""

from torch import Tensor

from ..nn import ChannelwiseMotion, ChannelwiseSpatioTemporal
from ._resnet import ResNet


class STM(ResNet):
    """The sum of CSTM and CMM for the 3x3 convolution of every block ([P]).

    33.0 G multiply-adds (224x224, 8 frames, ResNet-50; published: 33), 24.0 M parameters (174 classes). [D]: the batch
    normalisation and ReLU that follow the 3x3 convolution follow the sum.
    """

    depths = (50, 101)

    def __init__(self, num_classes: int, n_segment: int = 8, **backbone) -> None:
        super().__init__(num_classes, n_segment, **backbone)
        for _, _, block in self.blocks():
            block.conv2 = _SpatioTemporalAndMotion(block.conv2.in_channels, n_segment, block.conv2.stride[0])


class _SpatioTemporalAndMotion(ChannelwiseSpatioTemporal):
    """CSTM, which keeps the convolution's name, plus CMM."""

    def __init__(self, channels: int, n_segment: int, stride: int) -> None:
        super().__init__(channels, n_segment, stride)
        self.motion = ChannelwiseMotion(channels, n_segment, stride)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.motion(x)
