"""TANet: Liu et al., "TAM: Temporal Adaptive Module for Video Recognition"."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import temporal_conv
from ..ops._contract import check_int
from ._layer import TemporalLayer, reduced


class TemporalAdaptive(TemporalLayer):
    r"""TAM: a temporal convolution whose taps each clip makes for itself, after a gate made from adjacent frames.

    .. math::
        \theta = \text{softmax}(L_2\, \text{ReLU}(\text{BN}(L_1 \bar x))), \quad
        m = \sigma(V_2\, \text{ReLU}(\text{BN}(V_1 * \bar x))), \quad y = \theta \otimes (m \circ x)

    ([P], TANet; the normalisation as released, [R].) :math:`\bar x` is the global average pool ``[N, C, T]``. The
    matrices L act on the T frames of a channel, T to 2T to K; the temporal convolutions V have 3 taps, C to C/r, and 1
    tap, C/r to C. No biases. See :func:`tempops.temporal_conv`.

    Args:
        channels: C.
        n_segment: T; it can not be changed, because :math:`L_1` and :math:`L_2` depend on it.
        reduction: r.
        taps: K, odd.
    """

    depends_on_segments = True

    def __init__(self, channels: int, n_segment: int, reduction: int = 4, taps: int = 3) -> None:
        super().__init__(n_segment)
        check_int("taps", taps, least=1)
        if taps % 2 == 0:
            raise ValueError(f"taps must be odd, got {taps}")
        squeezed = reduced(channels, reduction)
        self.kernel = nn.Sequential(
            nn.Linear(n_segment, 2 * n_segment, bias=False),
            nn.BatchNorm1d(2 * n_segment),
            nn.ReLU(inplace=True),
            nn.Linear(2 * n_segment, taps, bias=False),
        )
        self.importance = nn.Sequential(
            nn.Conv1d(channels, squeezed, 3, padding=1, bias=False),
            nn.BatchNorm1d(squeezed),
            nn.ReLU(inplace=True),
            nn.Conv1d(squeezed, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.split(x.mean((2, 3))).transpose(1, 2)  # [N, C, T]
        kernel = F.softmax(self.kernel(pooled.flatten(0, 1)), -1).unflatten(0, pooled.shape[:2])
        gate = self.importance(pooled).sigmoid().transpose(1, 2).flatten(0, 1)
        return temporal_conv(x, kernel, self.n_segment, gate)
