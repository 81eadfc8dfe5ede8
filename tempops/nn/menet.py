"""MENet: Wu et al., "Long-Short Temporal Modeling for Efficient Action Recognition" (paper 000)."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import motion_enhance, temporal_shift
from ..ops._contract import check_int
from ._layer import TemporalLayer


class MotionEnhancement(nn.Module):
    r"""ME: what changes between consecutive frames, at the edges of what moves.

    .. math::
        R_j = \text{maxpool}_{3 \times 3}(F_{j+1}) - F_j

    for the convolved frames F ([P], MENet eq. 4-5). See :func:`tempops.motion_enhance`. [D]: the convolution is 3x3
    with stride 1, on each frame, without the bias that the difference would take out; C = 5 channels, so that
    :math:`C\,T_m = 3\,T_a` for the paper's T_m = 3, T_a = 5.

    Args:
        n_frames: the consecutive frames of a segment, :math:`T_m + 1`; at least 2.
        channels: C.

    `forward` takes ``[M, n_frames*3, H, W]``, the frames stacked in the channels, and returns
    ``[M, (n_frames-1)*C, H, W]``.
    """

    def __init__(self, n_frames: int = 4, channels: int = 5) -> None:
        super().__init__()
        check_int("n_frames", n_frames, least=2)
        self.n_frames = n_frames
        self.conv = nn.Conv2d(3, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.conv(x.unflatten(1, (self.n_frames, 3)).flatten(0, 1))
        motion = motion_enhance(frames, self.n_frames)
        return motion.unflatten(0, (x.size(0), self.n_frames - 1)).flatten(1, 2)


class VideoLevelAggregation(TemporalLayer):
    r"""VLA: the scores of a clip from the pooled features of its segments, shifted along time.

    .. math::
        F_i^{0:c} = X_{i-1}^{0:c}, \quad F_i^{c:2c} = X_{i+1}^{c:2c}, \quad F_i^{2c:} = X_i^{2c:}, \quad
        Y = \omega F

    ([P], MENet eq. 6-7.) X is pooled over space, then its maximum over each two segments is taken; :math:`\omega` is a
    fully connected layer. See :func:`tempops.temporal_shift`. [D]: the pool over space is ResNet's global average, c is
    an eighth of the channels, a last odd segment is alone, and Y is the mean over what is left of T.

    Args:
        channels: C.
        num_classes: the scores.
        n_segment: T.
        dropout: before the fully connected layer.

    `forward` takes ``[N*T, C, H, W]`` and returns ``[N, num_classes]``.
    """

    def __init__(self, channels: int, num_classes: int, n_segment: int, dropout: float = 0.0) -> None:
        super().__init__(n_segment)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.split(x.mean((2, 3))).transpose(1, 2)
        pooled = F.max_pool1d(pooled, 2, ceil_mode=True).transpose(1, 2)  # [N, T/2, C]
        shifted = temporal_shift(pooled.flatten(0, 1)[..., None, None], pooled.size(1), 8, "reversed")
        scores = self.fc(self.dropout(shifted.flatten(1)))
        return scores.unflatten(0, pooled.shape[:2]).mean(1)
