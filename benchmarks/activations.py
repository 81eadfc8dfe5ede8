"""What the ops are timed on: a real video, sampled as TSN does, and what a ResNet-50 makes of it."""

import functools
from pathlib import Path

import torch
from torch import Tensor

from tempops.data import count_frames, normalize, read_frames, sample_segments
from tempops.models import create_model

VIDEO = Path(__file__).parent / "data" / "bigbuckbunny.mp4"
FRAMES = 16
WINDOW = 5  # adjacent frames around each sampled one: the input of TDN's S-TDM

# Sizes by name: the stem and the four stages of ResNet-50 at 224x224, and the frames of the windows as channels.
SIZES = {
    "64x56": (FRAMES, 64, 56, 56),
    "256x56": (FRAMES, 256, 56, 56),
    "512x28": (FRAMES, 512, 28, 28),
    "1024x14": (FRAMES, 1024, 14, 14),
    "2048x7": (FRAMES, 2048, 7, 7),
    "15x224": (FRAMES, 3 * WINDOW, 224, 224),
}


@functools.cache
def activations() -> dict[str, Tensor]:
    """The tensors of `SIZES`: float32, contiguous."""
    windows = sample()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        network = create_model("tsn", 1)  # in training mode: batch statistics keep the scale of a trained network
        stages = [network.stem(windows[:, WINDOW // 2])]
        for stage in network.stages:
            stages.append(stage(stages[-1]))
    return dict(zip(SIZES, [*stages, windows.flatten(1, 2)], strict=True))


def sample() -> Tensor:
    """[FRAMES, WINDOW, 3, 224, 224]: the frames in the middle of each of FRAMES equal segments of the video."""
    return normalize(read_frames(VIDEO, sample_segments(count_frames(VIDEO), FRAMES, WINDOW)))
