"""tempops: fused temporal operations of efficient video networks for PyTorch."""

from . import data, models, nn
from ._backend import backend
from ._backend import choose_from_environment as _choose_from_environment
from .ops import *  # noqa: F403
from .ops import __all__ as _ops

_choose_from_environment()

__all__ = ["backend", "data", "models", "nn", *_ops]
__version__ = "0.1.0"
