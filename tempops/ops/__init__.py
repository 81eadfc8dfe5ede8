"""The ops: one module each, with docstring, eager reference, fake, derivative and public function."""

from .frame_difference import frame_difference
from .temporal_shift import temporal_shift, temporal_shift_

__all__ = ["frame_difference", "temporal_shift", "temporal_shift_"]
