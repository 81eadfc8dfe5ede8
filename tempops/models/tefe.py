"""TEFE: Jiang and Zhang, "... With Temporal Extraction and Feature Enhancement" (paper 003)."""

from collections.abc import Sequence

from ..nn import FeatureEnhancement, TemporalExtraction
from ._resnet import ResNet, check_stages


class TEFE(ResNet):
    """TE in each stage's first block, FE in the others of stages 3 to 5 ([P], TEFE table 5's best).

    79.0 G multiply-adds (224x224, 8 frames, ResNet-50), 90.2 G at the paper's 224x256 (published: 90), 64.8 M
    parameters (174 classes). The paper leaves open: TE's blocks come first in their stage [D]; TE stands between the
    3x3 convolution's ReLU and the last 1x1 one [D]; FE takes the 3x3 convolution's place, and the batch normalisation
    and ReLU after it stay [D], so that with an image network's weights the model starts as that network.

    T is fixed at construction: TE's parameters depend on it.

    Args:
        te: the blocks with TE in stages 2 to 5.
        fe: the blocks with FE, after those; None for all of the others but stage 2's.
    """

    depths = (50, 101)

    def __init__(
        self,
        num_classes: int,
        n_segment: int = 8,
        *,
        te: Sequence[int] = (1, 1, 1, 1),
        fe: Sequence[int] | None = None,
        **backbone,
    ) -> None:
        super().__init__(num_classes, n_segment, **backbone)
        sizes = [len(stage) for stage in self.stages]
        te = check_stages("te", te)
        if fe is None:
            fe = (0, *(max(0, size - count) for size, count in zip(sizes[1:], te[1:])))
        fe = check_stages("fe", fe)
        if any(a + b > size for a, b, size in zip(te, fe, sizes)):
            raise ValueError(f"te and fe must fit stages of {sizes} blocks, got {list(te)} and {list(fe)}")
        for stage, place, block in self.blocks():
            channels, stride = block.conv2.in_channels, block.conv2.stride[0]
            if place < te[stage - 2]:
                block.before_conv3 = TemporalExtraction(channels, n_segment)
            elif place < te[stage - 2] + fe[stage - 2]:
                block.conv2 = FeatureEnhancement(channels, n_segment, stride)
