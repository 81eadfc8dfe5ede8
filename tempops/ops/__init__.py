"""The ops: one module each, with docstring, eager reference, fake, derivative and public function."""

from .cosine_gate import cosine_gate
from .motion_attention import motion_attention
from .motion_enhance import motion_enhance
from .temporal_conv import temporal_conv
from .temporal_cosine_similarity import temporal_cosine_similarity
from .temporal_shift import temporal_shift, temporal_shift_

__all__ = [
    "cosine_gate",
    "motion_attention",
    "motion_enhance",
    "temporal_conv",
    "temporal_cosine_similarity",
    "temporal_shift",
    "temporal_shift_",
]
