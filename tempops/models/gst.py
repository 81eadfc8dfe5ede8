"""GST: Luo and Yuille, "Grouped Spatial-Temporal Aggregation for Efficient Action Recognition"."""

import torch
from torch import Tensor, nn

from ..nn import TemporalConv2d
from ..ops._contract import check_int
from ._resnet import ResNet


class GST(ResNet):
    """Two convolutions for the 3x3 one of every block: 1x3x3 for the first half of the channels, 3x3x3 for the second.

    The first gives three quarters of the result's channels, the second the last quarter ([P]). 29.0 G multiply-adds
    (224x224, 8 frames, ResNet-50; published: 29.5), 21.0 M parameters (174 classes). [D]: an image network's weights
    are cut alike, and the 3x3x3 part is inflated as I3D does. ``width`` at least 4.
    """

    depths = (50, 101)

    def __init__(self, num_classes: int, n_segment: int = 8, **backbone) -> None:
        super().__init__(num_classes, n_segment, **backbone)
        check_int("width", self.backbone["width"], least=4)
        for _, _, block in self.blocks():
            block.conv2 = _Grouped(block.conv2.in_channels, n_segment, block.conv2.stride[0])


class _Grouped(nn.Module):
    def __init__(self, channels: int, n_segment: int, stride: int) -> None:
        super().__init__()
        self.halves = (channels - channels // 2, channels // 2)
        quarter = channels // 4
        self.spatial = nn.Conv2d(self.halves[0], channels - quarter, 3, stride, padding=1, bias=False)
        self.temporal = TemporalConv2d(self.halves[1], quarter, 3, n_segment, stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.split(self.halves, 1)
        return torch.cat((self.spatial(first), self.temporal(second)), 1)

    def from_2d(self, weight: Tensor) -> dict[str, Tensor]:
        first, second = self.halves
        spatial = weight[: self.spatial.out_channels, :first]
        temporal = self.temporal.from_2d(weight[self.spatial.out_channels :, -second:])
        return {"spatial.weight": spatial, "temporal.weight": temporal["weight"]}
