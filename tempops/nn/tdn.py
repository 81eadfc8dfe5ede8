"""TDN: "Temporal Difference Networks for Action Recognition" (paper 004)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import bidirectional_difference, frame_difference, motion_attention
from ..ops._contract import check_choice
from ._layer import TemporalLayer, normalized_conv, reduced

VARIANTS = ("released", "paper")


class ShortTermTDM(TemporalLayer):
    r"""S-TDM: features of the differences of consecutive frames, for the network of the middle frame.

    .. math::
        H = \text{upsample}(\text{CNN}(\text{avgpool}_2(D))), \quad \hat F = a F + b H

    ([P], TDN eq. 1, 3, with a = b = 1; as released, [R], a = b = 0.5 for T = 8, else 0.75 and 0.25.) D are the 4
    differences of 5 frames, see :func:`tempops.frame_difference`; the CNN is a copy of the network's first layers, of
    which this layer is the first: 7x7 convolution with stride 2, batch normalisation, ReLU, maximum pool.

    Args:
        channels: the channels of the network after its first convolution.
        n_segment: T.
        n_frames: the consecutive frames of a segment.
        variant: ``"released"`` or ``"paper"``.

    `forward` takes ``[N*T, n_frames*3, H, W]`` and returns ``[N*T, channels, H/8, W/8]``; `fuse` adds what it, or a
    further layer of the copy, returned to the network's features. Frames with a side of one pixel are not pooled [D].
    """

    def __init__(self, channels: int, n_segment: int, n_frames: int = 5, variant: str = "released") -> None:
        super().__init__(n_segment)
        check_choice("variant", variant, VARIANTS)
        self.n_frames, self.variant = n_frames, variant
        self.conv = nn.Conv2d(3 * (n_frames - 1), channels, 7, stride=2, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        differences = frame_difference(x, self.n_frames, 2 if min(x.shape[2:]) > 1 else 1)
        y = normalized_conv(self.conv, self.bn, differences)
        return F.max_pool2d(F.relu(y, inplace=True), 3, stride=2, padding=1)

    def fuse(self, x: Tensor, motion: Tensor) -> Tensor:
        """:math:`a x + b\\,\\text{motion}`, the latter enlarged to the size of x by nearest neighbour."""
        size, (h, w) = x.shape, motion.shape[2:]
        if size[2:] == (2 * h, 2 * w):  # each pixel of motion meets its four of x
            x, motion = x.unflatten(3, (w, 2)).unflatten(2, (h, 2)), motion[:, :, :, None, :, None]
        else:
            motion = F.interpolate(motion, size[2:])
        if self.variant == "paper":
            return (x + motion).reshape(size)
        return torch.lerp(motion, x, 0.5 if self.n_segment == 8 else 0.75).reshape(size)  # (1 - a) motion + a x


class LongTermTDM(TemporalLayer):
    r"""L-TDM: frames are enhanced where they differ from the next and the previous frame of the clip.

    .. math::
        z = \text{BN}(W_1 x), \quad d = z_t - K * z_{t \pm 1}, \quad
        M = \text{BN}(W_3(d + \text{BN}(E * d) + \text{upsample}(\text{BN}(P * \text{avgpool}_2(d))))), \quad
        y = x + x \circ \tfrac12 (\sigma(M_+) + \sigma(M_-))

    ([P], TDN eq. 2, 4-6.) As released, [R]: d has the opposite sign, the three terms are averaged, not added, the
    enlargement is by nearest neighbour, not bilinear, and 0.5 is subtracted from each sigmoid. The released code's
    first version took E * d of the backward direction from the forward one's result; here it is as later corrected.
    See :func:`tempops.bidirectional_difference` and :func:`tempops.motion_attention`.

    Args:
        channels: C.
        n_segment: T.
        reduction: r; z has C/r channels.
        variant: ``"released"`` or ``"paper"``.

    Note:
        Both directions share the weights. In training each batch normalisation sees them one after the other, in
        evaluation they run as one batch. A side of one pixel is not pooled [D].
    """

    def __init__(self, channels: int, n_segment: int, reduction: int = 16, variant: str = "released") -> None:
        super().__init__(n_segment)
        check_choice("variant", variant, VARIANTS)
        self.variant = variant
        squeezed = reduced(channels, reduction)
        self.squeeze = nn.Conv2d(channels, squeezed, 1, bias=False)
        self.squeeze_bn = nn.BatchNorm2d(squeezed)
        self.align = nn.Conv2d(squeezed, squeezed, 3, padding=1, groups=squeezed, bias=False)
        self.fine = nn.Conv2d(squeezed, squeezed, 3, padding=1, bias=False)
        self.fine_bn = nn.BatchNorm2d(squeezed)
        self.coarse = nn.Conv2d(squeezed, squeezed, 3, padding=1, bias=False)
        self.coarse_bn = nn.BatchNorm2d(squeezed)
        self.expand = nn.Conv2d(squeezed, channels, 1, bias=False)
        self.expand_bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        released = self.variant == "released"
        z = normalized_conv(self.squeeze, self.squeeze_bn, x)
        differences = bidirectional_difference(z, self.align.weight, self.n_segment, released)
        if self.training:
            forward, backward = map(self._logits, differences)
        else:
            forward, backward = self._logits(torch.cat(differences)).unflatten(0, (2, -1)).unbind()
        return motion_attention(x, forward, backward, released)

    def _logits(self, d: Tensor) -> Tensor:
        size = d.shape[2:]
        pooled = F.avg_pool2d(d, [min(2, side) for side in size])
        coarse = normalized_conv(self.coarse, self.coarse_bn, pooled)
        fine = normalized_conv(self.fine, self.fine_bn, d)
        enlarged = F.interpolate(coarse, size, mode="nearest" if self.variant == "released" else "bilinear")
        scales = (d + enlarged).add_(fine)
        if self.variant == "released":
            scales.mul_(1 / 3)
        return normalized_conv(self.expand, self.expand_bn, scales)
