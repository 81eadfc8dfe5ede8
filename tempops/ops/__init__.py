"""The ops: one module each, with docstring, eager reference, fake, derivative and public function."""

from .motion_enhance import motion_enhance
from .temporal_conv import temporal_conv
from .temporal_shift import temporal_shift, temporal_shift_

__all__ = [
    "motion_enhance",
    "temporal_conv",
    "temporal_shift",
    "temporal_shift_",
]
