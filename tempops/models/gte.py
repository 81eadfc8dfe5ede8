"""GTE: Liu et al., "Grouped Temporal Enhancement Module for Human Action Recognition" (paper 001)."""

import torch
from torch import Tensor, nn

from ..nn import LearnableTemporalShift
from ..ops._contract import check_choice, check_int
from ._resnet import ResNet

VARIANTS = ("paper", "depthwise")


class GTE(ResNet):
    """Two branches for the 3x3 convolution of every block, each on half of the channels ([P], GTE figure 1d).

    The spatial branch is a 3x3 convolution to (1-t)C channels; the temporal one is LTS and a 3x3 convolution to tC.

    ========= ============================================ =================== =============
    variant   temporal branch                              multiply-adds       parameters
    ========= ============================================ =================== =============
    paper     dense LTS C/2 to tC, then 3x3 tC to tC       25.3 G              17.97 M
    depthwise depthwise LTS on C/2, then 3x3 C/2 to tC     25.3 G              18.2 M
    published                                              25.3 G              18.0 M
    ========= ============================================ =================== =============

    (224x224, 8 frames, ResNet-50, 174 classes.) The published totals are the first's; the paper's own equation 6 would
    give 18.67 M. LTS comes before the stride. [D]: an image network's weights are cut alike.

    Args:
        t: the temporal branch's share of the result's channels; at least one of them.
        variant: ``"paper"`` or ``"depthwise"``.
    """

    depths = (50, 101)

    def __init__(
        self, num_classes: int, n_segment: int = 8, *, t: float = 0.25, variant: str = "paper", **backbone
    ) -> None:
        super().__init__(num_classes, n_segment, **backbone)
        check_choice("variant", variant, VARIANTS)
        check_int("width", width := self.backbone["width"], least=2)
        if not 0 < t < 1:
            raise ValueError(f"t must be between 0 and 1, got {t}")
        if t * width < 1:
            raise ValueError(f"t must give the temporal branch at least one of {width} channels, got {t}")
        for _, _, block in self.blocks():
            conv2 = block.conv2
            block.conv2 = _Grouped(conv2.in_channels, n_segment, conv2.stride[0], int(t * conv2.in_channels), variant)


class _Grouped(nn.Module):
    def __init__(self, channels: int, n_segment: int, stride: int, temporal: int, variant: str) -> None:
        super().__init__()
        self.halves = first, second = channels - channels // 2, channels // 2
        shifted = temporal if variant == "paper" else second
        self.spatial = nn.Conv2d(first, channels - temporal, 3, stride, padding=1, bias=False)
        self.shift = LearnableTemporalShift(second, n_segment, temporal if variant == "paper" else None)
        self.temporal = nn.Conv2d(shifted, temporal, 3, stride, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.split(self.halves, 1)
        return torch.cat((self.spatial(first), self.temporal(self.shift(second))), 1)

    def from_2d(self, weight: Tensor) -> dict[str, Tensor]:
        """The rows of each branch's results, the columns of what it reads; LTS keeps its own initial values."""
        first, _ = self.halves
        rows, columns = self.spatial.out_channels, self.temporal.in_channels
        return {
            "spatial.weight": weight[:rows, :first],
            "temporal.weight": _columns(weight[rows:], first, columns),
        }


def _columns(weight: Tensor, start: int, count: int) -> Tensor:
    """`count` columns from `start` on, then those before: a temporal branch of more than half may need them."""
    return weight.roll(-start, 1)[:, :count]
