"""The ops: one module each, with docstring, eager reference, fake, derivative and public function."""

from .bidirectional_difference import bidirectional_difference
from .motion_enhance import motion_enhance
from .temporal_shift import temporal_shift, temporal_shift_

__all__ = ["bidirectional_difference", "motion_enhance", "temporal_shift", "temporal_shift_"]
