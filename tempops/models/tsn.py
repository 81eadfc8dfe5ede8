"""TSN: Wang et al., "Temporal Segment Networks: Towards Good Practices for Deep Action Recognition"."""

from ._resnet import ResNet


class TSN(ResNet):
    """The network of a single frame, its scores averaged over the segments: no layer reads another frame.

    32.7 G multiply-adds (224x224, 8 frames, ResNet-50; published: 33), 23.9 M parameters (174 classes).
    """
