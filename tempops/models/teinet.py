"""TEINet: Liu et al., "TEINet: Towards an Efficient Architecture for Video Recognition"."""

from ..nn import GatedInteraction, MotionExcitation
from ._resnet import ResNet


class TEINet(ResNet):
    """MEM, then TIM, at the input of every block ([P]; of its residual branch [D]).

    32.7 G multiply-adds (224x224, 8 frames, ResNet-50; published: 33), 29.9 M parameters (174 classes).

    Args:
        reduction: MEM's r.
    """

    def __init__(self, num_classes: int, n_segment: int = 8, *, reduction: int = 8, **backbone) -> None:
        super().__init__(num_classes, n_segment, **backbone)
        for _, _, block in self.blocks():
            channels = block.conv1.in_channels
            block.before_conv1 = GatedInteraction(MotionExcitation(channels, n_segment, reduction), channels)
