"""CMR: Wu et al., "Learning Comprehensive Motion Representation for Action Recognition" (paper 002)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import channel_motion_gate, cosine_gate
from ..ops._contract import is_transformed
from ._layer import SqueezedGate, TemporalLayer, factor_and_offset, normalized_conv


class ChannelMotionEnhancement(SqueezedGate):
    r"""CME: channels are weighed by what the frame's clip shows, the frames that differ from it most.

    .. math::
        u_t = x_t \circ a_t

    with the :math:`a` of :func:`tempops.channel_motion_gate` for the global average pool ([P], CMR eq. 1-6).

    Args:
        channels: C.
        n_segment: T.
        reduction: r; the weights are ``[C/r, C]`` twice and ``[C, C/r]``. Linear layers' default initial values [D].
    """

    def gate(self, x: Tensor) -> Tensor:
        weights = self.w1.weight, self.w2.weight, self.w3.weight
        return channel_motion_gate(x.mean((2, 3)), *weights, self.n_segment)


class SpatialMotionEnhancement(TemporalLayer):
    r"""SME: pixels that resemble the next frame's are damped, and the rest is added to the frame.

    .. math::
        v_t = \text{BN}(\text{Conv}(x_t \circ (1 - s_t))) + x_t

    with a 1x1 convolution ([P], CMR eq. 7-8). See :func:`tempops.cosine_gate`.

    Args:
        channels: C.
        n_segment: T, at least 2.
        dense: whether the convolution mixes the channels. The paper does not say; its multiply-adds fit one number for
            each channel [D].

    Attributes:
        conv: the convolution; or None, and
        scale: ``[C]``, the number for each channel, initially 1: PyTorch has no fast 1x1 convolution for C groups.
    """

    least_segments = 2

    def __init__(self, channels: int, n_segment: int, dense: bool = False) -> None:
        super().__init__(n_segment)
        if not isinstance(dense, bool):
            raise TypeError(f"dense must be a bool, got {type(dense).__name__}")
        self.conv = nn.Conv2d(channels, channels, 1, bias=False) if dense else None
        self.scale = None if dense else nn.Parameter(torch.ones(channels))
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self._normalized(cosine_gate(x, self.n_segment))
        y += x
        return y

    def _normalized(self, y: Tensor) -> Tensor:
        """The normalised convolution of y, which nobody else has."""
        if self.scale is None:
            return normalized_conv(self.conv, self.bn, y)
        normalization = factor_and_offset(self.bn)
        if normalization is None:
            return self.bn(y * self.scale.to(y.dtype)[:, None, None])
        # The scale and the normalisation are one factor and one summand for each channel: one pass, and in place where
        # nothing is recorded.
        factor, offset = normalization
        scale = self.scale.to(factor.dtype)
        recorded = torch.is_grad_enabled() or torch.jit.is_tracing() or is_transformed()
        if recorded or y.dtype != factor.dtype:
            var, weight = (x.to(factor.dtype) for x in (self.bn.running_var, self.bn.weight))
            return F.batch_norm(y, torch.zeros_like(var), var, weight * scale, offset, eps=self.bn.eps)
        return torch.addcmul(offset[:, None, None], y, (factor * scale)[:, None, None], out=y)
