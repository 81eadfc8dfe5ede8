"""tempops: fused temporal operations of efficient video networks for PyTorch."""

from . import data, models, nn
from ._backend import backend
from .ops import *  # noqa: F403
from .ops import __all__ as _ops

__all__ = ["backend", "data", "models", "nn", *_ops]
__version__ = "0.1.0"
