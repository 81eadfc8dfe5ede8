"""I3D: Carreira and Zisserman, "Quo Vadis, Action Recognition?", as ResNet-50 (Wang et al., "Non-local ...")."""

import torch.nn.functional as F
from torch import Tensor

from ..nn import TemporalConv2d, TemporalLayer
from ._resnet import ResNet


class I3D(ResNet):
    """A ResNet inflated in time: 5x7x7 stem, (3, 1, 1) first convolutions, half of the frames from stage 3 on ([P]).

    Every other block of a stage, from its first, has the inflated convolution. Stage 5 keeps stage 4's height and
    width. 152.5 G multiply-adds for a clip of 32 frames (224x224, ResNet-50; published: 153, or 306 for two clips),
    28.6 M parameters (174 classes).
    """

    depths = (50, 101)

    def __init__(self, num_classes: int, n_segment: int = 32, **backbone) -> None:
        super().__init__(num_classes, n_segment, **backbone)
        conv = self.conv1
        self.conv1 = TemporalConv2d(conv.in_channels, conv.out_channels, 7, n_segment, 2, 3, taps=5)
        for _, place, block in self.blocks():
            if place % 2 == 0:
                block.conv1 = TemporalConv2d(block.conv1.in_channels, block.conv1.out_channels, 1, n_segment)
        self.layer1[-1].after_block = _HalfOfTheFrames(n_segment)
        self.layer4[0].conv2.stride = self.layer4[0].downsample[0].stride = (1, 1)
        self.set_segments(n_segment)

    def set_segments(self, n_segment: int) -> None:
        super().set_segments(n_segment)
        for stage in self.stages[1:]:
            for layer in stage.modules():
                if isinstance(layer, TemporalLayer):
                    layer.n_segment = (n_segment + 1) // 2


class _HalfOfTheFrames(TemporalLayer):
    """The maximum of each two frames; a last odd one is alone [D]."""

    def forward(self, x: Tensor) -> Tensor:
        clips = self.split(x)
        if self.n_segment % 2 != 0:
            clips = F.pad(clips, (0, 0, 0, 0, 0, 0, 0, 1), value=float("-inf"))
        return clips[:, ::2].maximum(clips[:, 1::2]).flatten(0, 1)
