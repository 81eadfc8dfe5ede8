"""TSM: Lin et al., "TSM: Temporal Shift Module for Efficient Video Understanding"."""

from ..nn import ShiftConv1x1, TemporalShift
from ._resnet import Bottleneck, ResNet


class TSM(ResNet):
    """The temporal shift before the first convolution of every residual branch ([R], the released ``blockres``).

    32.7 G multiply-adds (224x224, 8 frames, ResNet-50; published: 33), 23.9 M parameters (174 classes). In ResNet-101
    every other block shifts, from each stage's first [R]. `load_released_weights` loads the authors' checkpoints.

    Args:
        fold_div: each of the two groups that move is ``C // fold_div`` channels.
    """

    def __init__(self, num_classes: int, n_segment: int = 8, *, fold_div: int = 8, **backbone) -> None:
        super().__init__(num_classes, n_segment, **backbone)
        step = 2 if len(self.layer3) >= 23 else 1
        for _, place, block in self.blocks():
            if place % step != 0:
                continue
            if isinstance(block, Bottleneck):
                conv1 = ShiftConv1x1(block.conv1.in_channels, block.conv1.out_channels, n_segment, fold_div=fold_div)
                conv1.weight = block.conv1.weight
                block.conv1 = conv1
            else:
                block.before_conv1 = TemporalShift(n_segment, fold_div)
