"""The Triton kernels, one module an op, as `torch.ops.tempops_triton`. Imported when first asked for."""

from . import temporal_shift  # noqa: F401
from ._common import INTERPRETED

__all__ = ["INTERPRETED"]
