"""TSM: Lin et al., "TSM: Temporal Shift Module for Efficient Video Understanding"."""

from torch import Tensor, nn

from ..ops import shift_conv1x1, temporal_shift
from ._layer import TemporalLayer


class TemporalShift(TemporalLayer):
    """Moves a part of the channels to the next frame and a part to the previous one, at no arithmetic ([R], TSM).

    See :func:`tempops.temporal_shift`.

    Args:
        n_segment: T.
        fold_div: each of the groups that move is ``C // fold_div`` channels.
        mode: ``"bidirectional"``, ``"reversed"`` (MENet) or ``"causal"`` (TSM's online model).
    """

    def __init__(self, n_segment: int, fold_div: int = 8, mode: str = "bidirectional") -> None:
        super().__init__(n_segment)
        self.fold_div, self.mode = fold_div, mode

    def forward(self, x: Tensor) -> Tensor:
        return temporal_shift(x, self.n_segment, self.fold_div, self.mode)


class ShiftConv1x1(TemporalLayer, nn.Conv2d):
    """A 1x1 convolution of the shifted frames, without a tensor of shifted frames where that is faster.

    See :func:`tempops.shift_conv1x1`. The parameters are those of ``nn.Conv2d(in_channels, out_channels, 1)``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        n_segment: int,
        *,
        fold_div: int = 8,
        mode: str = "bidirectional",
        bias: bool = False,
    ) -> None:
        super().__init__(n_segment, in_channels, out_channels, 1, bias=bias)
        self.fold_div, self.mode = fold_div, mode

    def forward(self, x: Tensor) -> Tensor:
        return shift_conv1x1(x, self.weight, self.bias, self.n_segment, self.fold_div, self.mode)
