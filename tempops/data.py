"""From a video file to a model's input: which frames are taken, read and normalised. Reading needs PyAV."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import MENet, ResNet
from .ops._contract import check_choice, check_int

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
SPAN = 64  # frames that dense sampling takes its segments from

__all__ = ["count_frames", "load_clip", "model_input", "normalize", "read_frames", "sample_segments"]


def sample_segments(
    frames: int,
    n_segment: int,
    window: int = 1,
    *,
    method: str = "uniform",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Chooses the frames of a clip: some consecutive ones from each of its segments.

    ``uniform`` cuts the video into equal segments; ``dense`` takes every (64/T)-th frame of 64 consecutive ones and
    starts again at the first frame where the video is shorter ([R], TSM; with windows [R], TDN). The first frame of a
    window is the middle of its segment, or the 64 frames those of the video's middle; with a `generator`, drawn anew.

    Args:
        frames: the frames of the video.
        n_segment: T.
        window: the consecutive frames of a segment: 1, 5 for TDN, 5 and 4 for MENet.
        method: ``"uniform"`` or ``"dense"``.
        generator: draws the frames, for training.

    Returns:
        The numbers of the frames, from 0, ``[n_segment, window]``.

    Raises:
        ValueError: a video too short for a frame of its own for each segment, or an argument out of range.
        TypeError: a number that is no integer.
    """
    check_int("frames", frames)
    check_int("n_segment", n_segment, least=1)
    check_int("window", window, least=1)
    check_choice("method", method, ("uniform", "dense"))
    starts = frames - window + 1
    if starts < n_segment:
        least = n_segment + window - 1
        raise ValueError(f"{n_segment} segments of {window} need at least {least} frames, got {frames}")
    segments = torch.arange(n_segment)
    if method == "dense":
        free = max(1, starts - SPAN + 1)
        first = (free - 1) // 2 if generator is None else int(torch.randint(free, (), generator=generator))
        first = (first + segments * max(1, SPAN // n_segment)) % starts
    elif generator is None:
        first = ((segments + 0.5) * (starts / n_segment)).long()
    else:
        length = starts // n_segment
        first = segments * length + torch.randint(length, (n_segment,), generator=generator)
    return first[:, None] + torch.arange(window)


def count_frames(path: str | Path) -> int:
    """The frames of a video, counted without decoding them, and without those that the file says to discard.

    Fewer may decode where a file is damaged, or begins between key frames; :func:`load_clip` sees to it.

    Raises:
        ValueError: the file is no video that can be read, or has no pictures.
        ImportError: there is no PyAV.
    """
    with _Video(path) as video:
        return sum(packet.size > 0 and not packet.is_discard for packet in video.packets())


def read_frames(path: str | Path, indices: Tensor | Sequence[int]) -> Tensor:
    """Decodes the frames with these numbers: ``uint8 [*indices.shape, H, W, 3]``, red, green, blue.

    `indices` is a tensor of integers of any shape, or a list of them; at least one.

    Raises:
        ValueError: the file is no video that can be read, has no pictures, or breaks off before a frame; or there are
            no indices, or negative ones.
        TypeError: `indices` are no integers.
        ImportError: there is no PyAV.
    """
    try:
        indices = torch.as_tensor(indices)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"indices must be a tensor or a list of integers, got {indices!r}") from None
    if indices.numel() == 0:
        raise ValueError(f"indices must name at least one frame, got shape {list(indices.shape)}")
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(f"indices must be integers, got {indices.dtype}")
    if (least := int(indices.min())) < 0:
        raise ValueError(f"indices must be at least 0, got {least}")
    pictures, _ = _decode(path, indices)
    if missing := sorted(set(indices.flatten().tolist()) - set(pictures)):
        raise ValueError(f"{path} breaks off: there is no frame {missing[0]}")
    return _arrange(pictures, indices)


def _decode(path: str | Path, indices: Tensor) -> tuple[dict[int, Tensor], int]:
    """The frames with these numbers, as far as there are any, and how many were decoded on the way."""
    wanted, pictures, count = set(indices.flatten().tolist()), {}, 0
    with _Video(path) as video:
        for count, frame in enumerate(video.frames(), 1):
            if count - 1 in wanted:
                pictures[count - 1] = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                if len(pictures) == len(wanted):
                    break
    return pictures, count


def _arrange(pictures: dict[int, Tensor], indices: Tensor) -> Tensor:
    frames = torch.stack([pictures[number] for number in indices.flatten().tolist()])
    return frames.view(*indices.shape, *frames.shape[1:])


def normalize(frames: Tensor, size: int = 224) -> Tensor:
    """``uint8 [..., H, W, 3]`` to ``float32 [..., 3, size, size]``, as ImageNet's networks expect it.

    The shorter side is made ``size * 8 / 7`` (256 for 224), the middle is cut out, ImageNet's mean and deviation are
    taken out.

    Raises:
        ValueError: frames of another shape or without pixels, or a `size` below 1.
        TypeError: frames that are no uint8 tensor.
    """
    check_int("size", size, least=1)
    if not isinstance(frames, Tensor) or frames.dtype != torch.uint8:
        raise TypeError(f"frames must be a uint8 tensor, got {getattr(frames, 'dtype', type(frames).__name__)}")
    if frames.dim() < 3 or frames.size(-1) != 3 or 0 in frames.shape:
        raise ValueError(f"frames must be [..., H, W, 3], of at least one pixel, got {list(frames.shape)}")
    pictures = frames[None].flatten(0, -4).permute(0, 3, 1, 2).float() / 255
    shorter = min(pictures.shape[2:])
    sides = [max(size, round(side * size * 8 / 7 / shorter)) for side in pictures.shape[2:]]
    pictures = F.interpolate(pictures, sides, mode="bilinear", antialias=True)
    top, left = ((side - size) // 2 for side in sides)
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    pictures = (pictures[:, :, top : top + size, left : left + size] - mean) / deviation
    return pictures.contiguous().view(*frames.shape[:-3], 3, size, size)


def load_clip(
    path: str | Path,
    n_segment: int = 8,
    window: int = 1,
    *,
    size: int = 224,
    method: str = "uniform",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Reads a clip from a video file: ``float32 [n_segment, 3*window, size, size]``.

    See :func:`sample_segments` for the arguments and :func:`normalize` for the values. Where fewer frames decode than
    the file has by :func:`count_frames`, and one that was chosen is missing, all are chosen anew from those that do.

    Raises:
        ValueError: the file is no video that can be read, has no pictures, or too few; or an argument is out of range.
        TypeError: a number that is no integer.
        ImportError: there is no PyAV.
    """

    def choose(count: int) -> Tensor:
        try:
            return sample_segments(count, n_segment, window, method=method, generator=generator)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    indices = choose(count_frames(path))
    pictures, count = _decode(path, indices)
    if count <= int(indices.max()):
        indices = choose(count)
        pictures, _ = _decode(path, indices)
    return normalize(_arrange(pictures, indices), size).flatten(1, 2)


def model_input(model: nn.Module, path: str | Path, **options) -> tuple[Tensor, ...]:
    """Reads a video file as the input of a model of `tempops.models`: ``model(*model_input(model, path))``.

    Segments and windows are the model's: 5 frames for TDN, 5 and 4 for the branches of MENet. `options` are those of
    :func:`load_clip`; all inputs come with a first dimension of one clip.

    Raises:
        TypeError: the model is none of `tempops.models`; and as :func:`load_clip` does.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    if not isinstance(model, (MENet, ResNet)):
        raise TypeError(f"model must be one of tempops.models, got {type(model).__name__}")
    branches = [model.appearance, model.motion] if isinstance(model, MENet) else [model]
    clips = [load_clip(path, branch.n_segment, branch.in_channels // 3, **options) for branch in branches]
    return tuple(clip[None] for clip in clips)


class _Video:
    """The pictures of a video file; PyAV's errors become ValueErrors that name the file."""

    def __init__(self, path: str | Path) -> None:
        try:
            import av
        except ImportError:
            raise ImportError("tempops.data reads videos with PyAV; install it with: pip install av") from None
        self.path, self.av = path, av

    def __enter__(self) -> "_Video":
        try:
            self.container = self.av.open(str(self.path))
        except self.av.FileNotFoundError:
            raise
        except self.av.FFmpegError as error:
            raise self._unreadable(error) from None
        if not self.container.streams.video:
            kinds = " and ".join(sorted({stream.type for stream in self.container.streams})) or "nothing"
            self.container.close()
            raise ValueError(f"{self.path} has no pictures, only {kinds}")
        self.stream = self.container.streams.video[0]
        return self

    def __exit__(self, *error) -> None:
        self.container.close()

    def packets(self):
        try:
            yield from self.container.demux(self.stream)
        except self.av.FFmpegError as error:
            raise self._unreadable(error) from None

    def frames(self):
        try:
            yield from self.container.decode(self.stream)
        except self.av.FFmpegError as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> ValueError:
        return ValueError(f"{self.path} can not be read as a video: {error}")
