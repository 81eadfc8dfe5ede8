"""CMR: Wu et al., "Learning Comprehensive Motion Representation for Action Recognition" (paper 002)."""

from ..nn import ChannelMotionEnhancement, GatedInteraction, SpatialMotionEnhancement, TemporalInteraction
from ..ops._contract import check_choice
from ._resnet import ResNet

PLACES = ("all", "first", "none")


class CMR(ResNet):
    """CME, then TIM, at the input of every block; SME at the end of each stage's first block ([P], CMR figure 4).

    32.8 G multiply-adds (224x224, 8 frames, ResNet-50; published: 33), 29.9 M parameters (174 classes); 39.3 G with a
    dense convolution in SME. The paper leaves open: "the input" is that of the residual branch [D]; SME comes after the
    block's last ReLU [D] and its 1x1 convolution is depthwise [D], as the published multiply-adds need. T at least 2,
    where there is SME.

    Args:
        reduction: CME's r.
        dense: whether SME's convolution mixes the channels.
        cme, sme: the blocks that have them: ``"all"``, each stage's ``"first"``, or ``"none"`` (tables 5 to 7).
    """

    def __init__(
        self,
        num_classes: int,
        n_segment: int = 8,
        *,
        reduction: int = 8,
        dense: bool = False,
        cme: str = "all",
        sme: str = "first",
        **backbone,
    ) -> None:
        super().__init__(num_classes, n_segment, **backbone)
        check_choice("cme", cme, PLACES)
        check_choice("sme", sme, PLACES)
        for _, place, block in self.blocks():
            channels = block.conv1.in_channels
            if cme == "all" or (cme == "first" and place == 0):
                gate = ChannelMotionEnhancement(channels, n_segment, reduction)
                block.before_conv1 = GatedInteraction(gate, channels)
            else:
                block.before_conv1 = TemporalInteraction(channels, n_segment)
            if sme == "all" or (sme == "first" and place == 0):
                block.after_block = SpatialMotionEnhancement(self.block.expansion * block.planes, n_segment, dense)
