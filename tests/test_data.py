"""Which frames a clip takes, and from a file to a model's input."""

import builtins
import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from tempops import data
from tempops.models import create_model

VIDEO = Path(__file__).parents[1] / "benchmarks" / "data" / "bigbuckbunny.mp4"


@pytest.fixture(scope="module")
def counting(tmp_path_factory) -> Path:
    """A video of 40 frames, the n-th of grey level 5n + 10."""
    path = tmp_path_factory.mktemp("video") / "counting.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 48, 32, "yuv420p", 4_000_000
        for n in range(40):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 5 * n + 10, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut(path: Path, begin: int) -> Path:
    """30 frames, the n-th of grey level 5n + 10, from packet `begin` on, which is no key frame.

    An .mp4 keeps all packets, and has an edit list that starts there; a .ts has lost those before.
    """
    whole = path.with_stem("whole")
    with av.open(str(whole), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 48, 32, "yuv420p", 4_000_000
        edited = path.suffix == ".mp4"
        stream.gop_size, stream.max_b_frames = (30, 0) if edited else (12, 2)
        for n in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 5 * n + 10, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    options = {"avoid_negative_ts": "disabled"} if edited else {}
    with av.open(str(whole)) as source, av.open(str(path), "w", options=options) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(source.streams.video[0])):
            if packet.size == 0 or (number < begin and not edited):
                continue
            earlier = round(begin / 25 / packet.time_base) if edited else 0
            packet.pts, packet.dts = packet.pts - earlier, packet.dts - earlier
            packet.stream = stream
            target.mux(packet)
    return path


def levels(frames: torch.Tensor) -> list[int]:
    """The numbers of the frames of `counting`."""
    return ((frames.float().mean((-1, -2, -3)) - 10) / 5).round().int().tolist()


def test_uniform():
    assert data.sample_segments(40, 8).flatten().tolist() == [2, 7, 12, 17, 22, 27, 32, 37]
    assert data.sample_segments(8, 8).flatten().tolist() == list(range(8))
    windows = data.sample_segments(40, 4, 5)
    assert windows.tolist() == [list(range(first, first + 5)) for first in (4, 13, 22, 31)]
    assert data.sample_segments(12, 8, 5)[-1].tolist() == [7, 8, 9, 10, 11]


def test_uniform_random_covers_its_segments():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([data.sample_segments(42, 4, 3, generator=generator) for _ in range(300)])
    assert drawn.shape == (300, 4, 3) and (drawn.diff(dim=2) == 1).all()
    for segment, first in enumerate(drawn[:, :, 0].unbind(1)):
        assert set(first.tolist()) == set(range(10 * segment, 10 * segment + 10))


def test_dense():
    middle = data.sample_segments(100, 8, method="dense").flatten()
    assert middle.tolist() == [18 + 8 * i for i in range(8)]
    assert data.sample_segments(100, 32, method="dense").flatten().diff().unique().tolist() == [2]
    short = data.sample_segments(20, 8, method="dense").flatten()
    assert short.tolist() == [8 * i % 20 for i in range(8)]
    generator = torch.Generator().manual_seed(0)
    starts = {int(data.sample_segments(70, 8, method="dense", generator=generator)[0]) for _ in range(200)}
    assert starts == set(range(7))
    windows = [data.sample_segments(70, 8, 5, method="dense", generator=generator) for _ in range(200)]
    assert {int(window[0, 0]) for window in windows} == set(range(3))
    assert max(int(window.max()) for window in windows) == 2 + 7 * 8 + 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((7, 8), "8 segments of 1 need at least 8 frames, got 7"),
        ((11, 8, 5), "8 segments of 5 need at least 12 frames, got 11"),
        ((0, 1), "need at least 1 frames, got 0"),
        ((40, 0), "n_segment must be at least 1, got 0"),
        ((40, 8, 0), "window must be at least 1, got 0"),
        ((10.5, 3), "frames must be an int, got float"),
        ((True, 1), "frames must be an int, got bool"),
    ],
)
def test_sampling_errors(arguments, message):
    with pytest.raises(TypeError if "an int" in message else ValueError, match=message):
        data.sample_segments(*arguments)
    with pytest.raises(ValueError, match="method must be one of 'uniform', 'dense', got 'random'"):
        data.sample_segments(40, 8, method="random")


def test_reading(counting):
    assert data.count_frames(counting) == 40
    indices = torch.tensor([[3, 4], [39, 0]])
    frames = data.read_frames(counting, indices)
    assert frames.shape == (2, 2, 32, 48, 3) and frames.dtype == torch.uint8
    assert levels(frames) == indices.tolist()
    with pytest.raises(ValueError, match=r"counting.mp4 breaks off: there is no frame 40"):
        data.read_frames(counting, torch.tensor([39, 40, 41]))


def test_indices(counting):
    one = data.read_frames(counting, torch.tensor(7))
    assert one.shape == (32, 48, 3) and levels(one) == 7
    assert levels(data.read_frames(counting, [[5, 2]])) == [[5, 2]]
    for indices, message in (([], r"got shape \[0\]"), (torch.zeros(0, 2).long(), r"\[0, 2\]"), ([3, -1], "got -1")):
        with pytest.raises(ValueError, match=f"indices must .*{message}"):
            data.read_frames(counting, indices)
    for indices, message in (([0.5], "float32"), (torch.tensor([True]), "bool"), ("first", "first"), (None, "None")):
        with pytest.raises(TypeError, match=f"indices must be .*integers, got .*{message}"):
            data.read_frames(counting, indices)


def test_discarded_by_an_edit_list(tmp_path):
    path = cut(tmp_path / "edited.mp4", 8)
    assert data.count_frames(path) == 22
    assert levels(data.read_frames(path, [0, 21])) == [8, 29]
    clip = data.load_clip(path, 11, size=32)
    torch.testing.assert_close(clip, data.normalize(data.read_frames(path, range(1, 22, 2)), 32))


def test_begun_between_key_frames(tmp_path):
    """The decoder discards what it can not make: the clip is chosen from the rest."""
    path = cut(tmp_path / "begun.ts", 5)
    count = len(data._decode(path, torch.arange(30))[0])
    assert 8 < count < data.count_frames(path)
    clip = data.load_clip(path, count, size=32)
    torch.testing.assert_close(clip, data.normalize(data.read_frames(path, range(count)), 32))
    (clip,) = data.model_input(create_model("tsn", 2, layers=(1, 1, 1, 1), width=8), path, size=32)
    assert clip.shape == (1, 8, 3, 32, 32)
    with pytest.raises(ValueError, match=f"begun.ts: {count + 1} segments .* got {count}"):
        data.load_clip(path, count + 1)


def test_normalize():
    frames = torch.zeros(2, 3, 30, 60, 3, dtype=torch.uint8)
    frames[..., 0] = 255
    frames[:, :, :, 20:40, 1] = 255  # the middle third
    clip = data.normalize(frames, 28)
    assert clip.shape == (2, 3, 3, 28, 28) and clip.is_contiguous()
    for channel, value in enumerate((1, 1, 0)):
        centre = (value - data.MEAN[channel]) / data.DEVIATION[channel]
        torch.testing.assert_close(clip[:, :, channel, 14, 14], torch.full((2, 3), centre))
    # The shorter side is 32 of 28: the middle third of 64 columns is 21.3 wide, in the middle of 28.
    assert ((clip[0, 0, 1, 14] > 0).sum() - 21).abs() <= 1
    assert data.normalize(torch.zeros(1, 500, 20, 3, dtype=torch.uint8), 224).shape == (1, 3, 224, 224)
    torch.testing.assert_close(data.normalize(frames[1, 2], 28), clip[1, 2])


def test_normalize_errors():
    for shape in ((0, 0, 3), (2, 0, 5, 3), (30, 3), (3, 30, 60)):
        with pytest.raises(ValueError, match=r"frames must be \[..., H, W, 3\], .* got " + re.escape(str(list(shape)))):
            data.normalize(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"frames must be a uint8 tensor, got torch\.float32"):
        data.normalize(torch.zeros(4, 4, 3))
    with pytest.raises(TypeError, match="frames must be a uint8 tensor, got list"):
        data.normalize([0])


def test_the_same_clip_as_by_hand(counting):
    clip = data.load_clip(counting, 4, 5, size=16)
    assert clip.shape == (4, 15, 16, 16)
    grey = clip.unflatten(1, (5, 3)) * torch.tensor(data.DEVIATION)[:, None, None]
    grey = (grey + torch.tensor(data.MEAN)[:, None, None]) * 255
    assert levels(grey) == data.sample_segments(40, 4, 5).tolist()


@pytest.mark.parametrize("name", ("tsm", "tdn", "menet", "i3d"))
def test_a_file_becomes_a_model_s_input(name):
    model = create_model(name, 3, n_segment=4, layers=(1, 1, 1, 1), width=8).eval()
    frames = {"tsm": [(4, 1)], "i3d": [(4, 1)], "tdn": [(4, 5)], "menet": [(4, 5), (8, 4)]}[name]
    clips = data.model_input(model, VIDEO, size=32)
    assert [clip.shape for clip in clips] == [(1, t, 3 * window, 32, 32) for t, window in frames]
    assert model(*clips).isfinite().all()


def test_other_modules_have_no_input():
    with pytest.raises(TypeError, match=r"model must be one of tempops\.models, got Conv2d"):
        data.model_input(torch.nn.Conv2d(3, 3, 1), VIDEO)


def broken(kind: str, folder: Path, counting: Path) -> Path:
    path = folder / f"{kind}.mp4"
    if kind == "text":
        path.write_text("this is no video")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(VIDEO.read_bytes()[: VIDEO.stat().st_size // 2])
    elif kind == "audio":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate = 16000
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    "kind, message",
    [
        ("text", "can not be read as a video"),
        ("empty", "can not be read as a video"),
        ("truncated", "can not be read as a video|breaks off"),
        ("audio", "has no pictures, only audio"),
    ],
)
def test_broken_files(kind, message, tmp_path, counting):
    path = broken(kind, tmp_path, counting)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} ({message})"):
        data.load_clip(path)


def test_other_errors(counting, monkeypatch):
    with pytest.raises(ValueError, match=r"counting.mp4: 64 segments of 1 need at least 64 frames, got 40"):
        data.load_clip(counting, 64)
    with pytest.raises(FileNotFoundError):
        data.load_clip("nowhere.mp4")

    def no_av(name, *arguments, original=builtins.__import__):
        if name == "av":
            raise ImportError
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", no_av)
    with pytest.raises(ImportError, match="pip install av"):
        data.count_frames(counting)
