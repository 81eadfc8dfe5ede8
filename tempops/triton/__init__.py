"""The Triton kernels, one module an op, as `torch.ops.tempops_triton`. Imported when first asked for."""

from . import cosine_gate, frame_difference, motion_attention, temporal_conv, temporal_shift  # noqa: F401
from ._common import INTERPRETED

__all__ = ["INTERPRETED"]
