"""The layers: parameters plus a call into the ops, one file a paper.

Unless said otherwise a layer takes ``[N*T, C, H, W]``, the T frames of a clip adjacent, and returns the same; keeps
contiguous and channels_last; takes every floating dtype and autocast; is deterministic where PyTorch's convolutions and
matrix products are; and raises ValueError where `n_segment` does not divide the frames. `set_segments` changes T.
"""

from ._layer import ChannelGate, TemporalLayer, set_segments
from .cmr import ChannelMotionEnhancement, SpatialMotionEnhancement
from .conv import TemporalConv2d
from .gte import LearnableTemporalShift
from .menet import MotionEnhancement, VideoLevelAggregation
from .stm import ChannelwiseMotion, ChannelwiseSpatioTemporal
from .tanet import TemporalAdaptive
from .tdn import LongTermTDM, ShortTermTDM
from .tdrl import ProgressiveEnhancement
from .tefe import FeatureEnhancement, TemporalExtraction
from .teinet import GatedInteraction, MotionExcitation, TemporalInteraction
from .tsm import ShiftConv1x1, TemporalShift

__all__ = [
    "ChannelGate",
    "ChannelMotionEnhancement",
    "ChannelwiseMotion",
    "ChannelwiseSpatioTemporal",
    "FeatureEnhancement",
    "GatedInteraction",
    "LearnableTemporalShift",
    "LongTermTDM",
    "MotionEnhancement",
    "MotionExcitation",
    "ProgressiveEnhancement",
    "ShiftConv1x1",
    "ShortTermTDM",
    "SpatialMotionEnhancement",
    "TemporalAdaptive",
    "TemporalConv2d",
    "TemporalExtraction",
    "TemporalInteraction",
    "TemporalLayer",
    "TemporalShift",
    "VideoLevelAggregation",
    "set_segments",
]
