"""MENet: Wu et al., "Long-Short Temporal Modeling for Efficient Action Recognition" (paper 000)."""

from torch import Tensor, nn

from ..nn import MotionEnhancement, VideoLevelAggregation
from ._resnet import ResNet


class MENet(nn.Module):
    """A motion branch, ME before a ResNet, and an appearance branch, VLA after one; their scores are added ([P]).

    73.4 G multiply-adds for the motion branch, 36.5 G for the appearance branch (224x224, ResNet-50), 47.8 M
    parameters (174 classes).
    `forward` takes T segments of 5 consecutive frames, ``appearance [N, T, 15, H, W]``, and 2T segments of 4,
    ``motion [N, 2T, 12, H, W]``. ME makes 15 channels of the 4 frames, as many as 5 frames have, so that the branches'
    ResNets are of one shape; `load_backbone` with the parameters of a trained motion branch
    (``model.motion.state_dict()``) initialises the appearance branch from it, the transfer of table 3.

    Args:
        n_segment: T, of the appearance branch.
        weights: those of the appearance and the motion scores.
        depth, layers, width, dropout: the branches' ResNet.
    """

    def __init__(
        self, num_classes: int, n_segment: int = 8, *, weights: tuple[float, float] = (1.0, 1.0), **backbone
    ) -> None:
        super().__init__()
        self.weights = weights
        self.appearance = _Appearance(num_classes, n_segment, frames=5, **backbone)
        self.motion = _Motion(num_classes, 2 * n_segment, frames=5, **backbone)

    @property
    def n_segment(self) -> int:
        return self.appearance.n_segment

    def set_segments(self, n_segment: int) -> None:
        """Makes clips of `n_segment` segments, twice as many for the motion branch, the input from now on."""
        self.appearance.set_segments(n_segment)
        self.motion.set_segments(2 * n_segment)

    def forward(self, appearance: Tensor, motion: Tensor) -> Tensor:
        self.appearance.check(appearance, "appearance")
        self.motion.check(motion, "motion")
        clips = appearance.size(0)
        if clips != motion.size(0):
            raise ValueError(f"motion must have as many clips as appearance, {clips}, got {motion.size(0)}")
        first, second = self.weights
        return first * self.appearance(appearance) + second * self.motion(motion)


class _Appearance(ResNet):
    def __init__(self, num_classes: int, n_segment: int, **backbone) -> None:
        super().__init__(num_classes, n_segment, **backbone)
        self.fc = VideoLevelAggregation(self.fc.in_features, num_classes, n_segment, self.dropout.p)

    def head(self, x: Tensor, clips: int) -> Tensor:
        return self.fc(x)


class _Motion(ResNet):
    def __init__(self, num_classes: int, n_segment: int, **backbone) -> None:
        super().__init__(num_classes, n_segment, **backbone)
        self.enhance = MotionEnhancement(n_frames=4, channels=5)
        self.in_channels = 3 * self.enhance.n_frames

    def features(self, x: Tensor) -> Tensor:
        return super().features(self.enhance(x))
