"""The ops: one module each, with docstring, eager reference, fake, derivative and public function."""

from .channel_motion_gate import channel_motion_gate
from .frame_difference import frame_difference
from .shift_conv1x1 import shift_conv1x1
from .temporal_shift import temporal_shift, temporal_shift_

__all__ = ["channel_motion_gate", "frame_difference", "shift_conv1x1", "temporal_shift", "temporal_shift_"]
