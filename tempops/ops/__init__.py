"""The ops: one module each, with docstring, eager reference, fake, derivative and public function."""

from .bidirectional_difference import bidirectional_difference
from .channel_motion_gate import channel_motion_gate
from .cosine_gate import cosine_gate
from .frame_difference import frame_difference
from .motion_attention import motion_attention
from .motion_enhance import motion_enhance
from .shift_conv1x1 import shift_conv1x1
from .temporal_conv import temporal_conv
from .temporal_cosine_similarity import temporal_cosine_similarity
from .temporal_shift import temporal_shift, temporal_shift_

__all__ = [
    "bidirectional_difference",
    "channel_motion_gate",
    "cosine_gate",
    "frame_difference",
    "motion_attention",
    "motion_enhance",
    "shift_conv1x1",
    "temporal_conv",
    "temporal_cosine_similarity",
    "temporal_shift",
    "temporal_shift_",
]
