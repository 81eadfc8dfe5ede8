"""The ops: one module each, with docstring, eager reference, fake, derivative and public function."""

from .temporal_conv import temporal_conv
from .temporal_shift import temporal_shift, temporal_shift_

__all__ = ["temporal_conv", "temporal_shift", "temporal_shift_"]
