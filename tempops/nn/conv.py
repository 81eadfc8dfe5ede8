"""3D convolutions on frames that lie one after the other, as in the other layers."""

import torch
from torch import Tensor, nn

from ..ops import temporal_conv
from ._layer import TemporalLayer


class TemporalConv2d(TemporalLayer, nn.Conv2d):
    r"""A K x kh x kw convolution over the frames of clips, as a 2D convolution to K times the channels.

    .. math::
        y_t = \sum_k W_k * x_{t+k-P}, \quad P = \lfloor K / 2 \rfloor

    The K parts of the 2D convolution's result are shifted by one frame each and added; frames outside the clip count as
    zero. See :func:`tempops.temporal_conv`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding: those of the 2D convolution of each part.
        n_segment: T.
        taps: K, odd.
        bias: whether to add a bias to each output channel.

    Attributes:
        weight: ``[K*Cout, Cin, kh, kw]``, part k for frame t+k-P. Four dimensions, so that a model that has such layers
            can be moved to channels_last. PyTorch's default initial values for that shape.
        offset: the bias, ``[Cout]``, initially 0.

    Note:
        Takes and returns ``[N*T, C, H, W]``; the layout follows that of the 2D convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        n_segment: int,
        stride: int = 1,
        padding: int = 0,
        *,
        taps: int = 3,
        bias: bool = False,
    ) -> None:
        if taps % 2 == 0:
            raise ValueError(f"taps must be odd, got {taps}")
        super().__init__(n_segment, in_channels, taps * out_channels, kernel_size, stride, padding, bias=False)
        self.taps = taps
        self.register_parameter("offset", nn.Parameter(torch.zeros(out_channels)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        parts = super().forward(x)
        shifts = torch.eye(self.taps, dtype=parts.dtype, device=parts.device)
        first, *others = temporal_conv(parts, shifts, self.n_segment).chunk(self.taps, 1)
        y = first if self.offset is None else first + self.offset[:, None, None]
        for other in others:
            y = y + other
        return y

    def from_2d(self, weight: Tensor) -> dict[str, Tensor]:
        """The parameters for an image network's weights: each tap gets a K-th of them (I3D's inflation)."""
        return {"weight": (weight / self.taps).repeat(self.taps, 1, 1, 1)}
