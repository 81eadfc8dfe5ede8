"""3D convolutions on frames that lie one after the other, as in the other layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import temporal_conv
from ..ops._contract import is_channels_last
from ._layer import TemporalLayer


class TemporalConv2d(TemporalLayer, nn.Conv2d):
    r"""A K x kh x kw convolution over the frames of clips.

    .. math::
        y_t = \sum_k W_k * x_{t+k-P}, \quad P = \lfloor K / 2 \rfloor

    Frames outside the clip count as zero. A 1x1 kernel is a 2D convolution over time and pixels, one larger than 3x3 a
    3D convolution where T is at least K; in all other cases a 2D convolution gives K parts, which
    :func:`tempops.temporal_conv` shifts.

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
        if torch.compiler.is_compiling():  # Inductor fails on such views of clips where height and width may change
            y = self._by_parts(x)
        elif self.kernel_size == self.stride == (1, 1) and self.padding == (0, 0):
            y = self._as_2d(x)
        elif max(self.kernel_size) > 3 and self.n_segment >= self.taps:
            # For shorter clips oneDNN's gradient of the weight is wrong in bfloat16, and it writes beyond it.
            y = self._as_3d(x)
        else:
            y = self._by_parts(x)
        return y if self.offset is None else y + self.offset[:, None, None]

    def _as_2d(self, x: Tensor) -> Tensor:
        """One convolution whose height is time and whose width are the pixels: in channels_last no frame is copied."""
        clips = self.split(x.flatten(2)).transpose(1, 2)  # [N, C, T, H*W]
        y = F.conv2d(clips, self._kernels().squeeze(-1), padding=(self.taps // 2, 0))
        return self._laid_out(x, y.transpose(1, 2).reshape(x.size(0), y.size(1), *x.shape[2:]))

    def _as_3d(self, x: Tensor) -> Tensor:
        """PyTorch's, which on the CPU is slow for kernels up to 3x3 on a small clip."""
        stride, padding = (1, *self.stride), (self.taps // 2, *self.padding)
        y = F.conv3d(self.split(x).transpose(1, 2), self._kernels(), None, stride, padding)
        return self._laid_out(x, y.transpose(1, 2).flatten(0, 1))

    def _by_parts(self, x: Tensor) -> Tensor:
        """One convolution to K times the channels, whose parts are shifted by a frame each and added."""
        parts = super().forward(x)
        shifts = torch.eye(self.taps, dtype=parts.dtype, device=parts.device)
        y, *others = temporal_conv(parts, shifts, self.n_segment).chunk(self.taps, 1)
        for other in others:
            y = y + other
        return y

    def _laid_out(self, x: Tensor, y: Tensor) -> Tensor:
        """The result y in the layout that a 2D convolution of x has: channels_last where x or the weight is."""
        channels_last = is_channels_last(x) or not self.weight.is_contiguous()
        return y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def _kernels(self) -> Tensor:
        """The weight as ``[Cout, Cin, K, kh, kw]``."""
        return self.weight.unflatten(0, (self.taps, -1)).transpose(0, 1).transpose(1, 2)

    def from_2d(self, weight: Tensor) -> dict[str, Tensor]:
        """The parameters for an image network's weights: each tap gets a K-th of them (I3D's inflation)."""
        return {"weight": (weight / self.taps).repeat(self.taps, 1, 1, 1)}
