"""TDRL: Weng et al., "Temporal Distinct Representation Learning for Action Recognition"."""

from ..nn import GatedInteraction, ProgressiveEnhancement
from ._resnet import ResNet


class TDRL(ResNet):
    """PEM, then TIM, at the input of every block ([P]; of its residual branch [D]).

    32.7 G multiply-adds (224x224, 8 frames, ResNet-50; published: 33), 28.4 M parameters (174 classes).

    Args:
        reduction: PEM's r.
    """

    def __init__(self, num_classes: int, n_segment: int = 8, *, reduction: int = 8, **backbone) -> None:
        super().__init__(num_classes, n_segment, **backbone)
        for _, _, block in self.blocks():
            channels = block.conv1.in_channels
            block.before_conv1 = GatedInteraction(ProgressiveEnhancement(channels, n_segment, reduction), channels)
