"""What the ops are timed on: a real video, sampled as TSN does, and what a ResNet-50 makes of it."""

import functools
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from resnet import ResNet50
from torch import Tensor

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
    windows = sample(VIDEO)
    network = ResNet50()  # in training mode: batch statistics keep the scale of a trained network
    with torch.no_grad():
        stages = list(network(windows[:, WINDOW // 2].contiguous()))
    return dict(zip(SIZES, [*stages, windows.flatten(1, 2)], strict=True))


def sample(video: Path) -> Tensor:
    """[FRAMES, WINDOW, 3, 224, 224]: the frames around the centre of each of FRAMES equal segments of a video."""
    with av.open(str(video)) as container:
        decoded = list(container.decode(video=0))
    centres = [int((i + 0.5) * len(decoded) / FRAMES) for i in range(FRAMES)]
    around = range(-(WINDOW // 2), WINDOW // 2 + 1)
    chosen = [min(max(centre + i, 0), len(decoded) - 1) for centre in centres for i in around]
    frames = [normalise(torch.from_numpy(decoded[i].to_ndarray(format="rgb24"))) for i in chosen]
    return torch.stack(frames).unflatten(0, (FRAMES, WINDOW))


def normalise(frame: Tensor, size: int = 224) -> Tensor:
    """uint8 [H, W, 3] to [3, size, size]: shorter side to size * 8 / 7, centre crop, ImageNet's mean and deviation."""
    scale = size * 8 / 7 / min(frame.shape[:2])
    frame = frame.permute(2, 0, 1).float()[None] / 255
    frame = F.interpolate(frame, scale_factor=scale, mode="bilinear", antialias=True)[0]
    top, left = ((side - size) // 2 for side in frame.shape[1:])
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return (frame[:, top : top + size, left : left + size] - mean) / deviation
