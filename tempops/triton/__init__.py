"""The Triton kernels, one module an op, as `torch.ops.tempops_triton`. Imported when first asked for."""

from . import (  # noqa: F401
    bidirectional_difference,
    channel_motion_gate,
    cosine_gate,
    frame_difference,
    motion_attention,
    motion_enhance,
    shift_conv1x1,
    temporal_conv,
    temporal_shift,
)
from ._common import INTERPRETED

__all__ = ["INTERPRETED"]
