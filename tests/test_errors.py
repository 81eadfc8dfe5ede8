"""Bad input: a clear error that names the argument, nothing changed, never a crash."""

import pytest
import torch
from cases import CASES
from inputs import INTERPRETED, layouts, make

import tempops
from tempops import _backend
from tempops.ops._contract import Shape

X = torch.randn(8, 16, 6, 6)
FIVE = torch.randn(2, 16, 4, 6, 6)
W = torch.randn(16, 3)
DW = torch.randn(16, 1, 3, 3)
P = torch.randn(8, 16)
CONV = torch.randn(8, 16, 1, 1)

ON_CLIPS = {  # ops of one tensor of clips: op(x, n_segment)
    "temporal_shift": tempops.temporal_shift,
    "temporal_shift_": tempops.temporal_shift_,
    "temporal_conv": lambda x, t=None: tempops.temporal_conv(x, W, t),
    "motion_enhance": tempops.motion_enhance,
    "temporal_cosine_similarity": tempops.temporal_cosine_similarity,
    "cosine_gate": tempops.cosine_gate,
    "bidirectional_difference": lambda x, t=None: tempops.bidirectional_difference(x, DW, t),
    "shift_conv1x1": lambda x, t=None: tempops.shift_conv1x1(x, CONV, None, t),
}
on_clips = pytest.mark.parametrize("name", ON_CLIPS)
devices = pytest.mark.parametrize("device", ("cpu", "meta"))


def fails(error, message, call):
    """`call` raises on the CPU, through the fake path's checks, and on every back end alike."""
    for backend in ("cpu", "eager", "triton") if INTERPRETED else ("cpu", "eager"):
        with tempops.backend(backend), pytest.raises(error, match=message):
            call()


def test_no_memory():
    """The error says so, in the words that training loops look for."""
    x = torch.zeros(1, 100, 100, 100).expand(10**8, -1, -1, -1)
    with (
        tempops.backend("cpu"),
        pytest.raises(RuntimeError, match=r"out of memory: .* shape \[100000000, 100, 100, 100\]"),
    ):
        tempops.temporal_shift(x, 4)


@on_clips
@devices
def test_segments(name, device):
    op, x, five = ON_CLIPS[name], X.to(device), FIVE.to(device)
    fails(ValueError, r"n_segment=3 does not divide 8 frames", lambda: op(x, 3))
    fails(ValueError, "n_segment is required for a 4-D x", lambda: op(x))
    fails(ValueError, "n_segment must be at least 1, got 0", lambda: op(x, 0))
    fails(ValueError, "n_segment must be at least 1, got -4", lambda: op(x, -4))
    fails(TypeError, "n_segment must be an int, got float", lambda: op(x, 4.0))
    fails(TypeError, "n_segment must be an int, got bool", lambda: op(x, True))
    fails(ValueError, "n_segment must be None for a 5-D x", lambda: op(five, 4))
    fails(ValueError, "T = 0", lambda: op(five[:, :, :0]))


@on_clips
@devices
def test_tensors(name, device):
    op, x = ON_CLIPS[name], X.to(device)
    fails(ValueError, r"x must be \[N\*T, C, H, W\] or \[N, C, T, H, W\], got 3-D", lambda: op(x[0], 4))
    fails(ValueError, "got 2-D", lambda: op(x[0, 0], 4))
    fails(TypeError, "x must be float32, float16, bfloat16 or float64, got torch.int64", lambda: op(x.long(), 4))
    fails(TypeError, "got torch.complex64", lambda: op(x.to(torch.complex64), 4))
    fails(TypeError, "x must be a torch.Tensor, got list", lambda: op([1.0], 4))
    fails(TypeError, "x must be a torch.Tensor, got NoneType", lambda: op(None, 4))
    if device == "cpu":
        fails(TypeError, r"dense \(strided\) tensor, got layout torch.sparse_coo", lambda: op(x.to_sparse(), 4))


@pytest.mark.parametrize("name", ("motion_enhance", "temporal_cosine_similarity", "cosine_gate"))
def test_two_frames(name):
    fails(ValueError, "x must have at least 2 frames a clip, got T = 1", lambda: ON_CLIPS[name](X, 1))
    fails(ValueError, "x must have at least 2 frames a clip, got T = 1", lambda: ON_CLIPS[name](FIVE[:, :, :1]))


ARGUMENTS = {
    "fold_div 0": (ValueError, "fold_div must be at least 2, got 0", lambda: tempops.temporal_shift(X, 4, 0)),
    "fold_div 1": (ValueError, "fold_div must be at least 2, got 1", lambda: tempops.temporal_shift(X, 4, 1)),
    "fold_div negative": (ValueError, "fold_div .*-8", lambda: tempops.temporal_shift(X, 4, -8)),
    "fold_div float": (TypeError, "fold_div must be an int", lambda: tempops.temporal_shift(X, 4, 8.0)),
    "mode": (ValueError, "mode must be one of .*'sideways'", lambda: tempops.temporal_shift(X, 4, 8, "sideways")),
    "in place, negative": (ValueError, "fold_div", lambda: tempops.temporal_shift_(X, 4, -8)),
    "in place, overlap": (ValueError, "overlap", lambda: tempops.temporal_shift_(X[:1].expand(8, 16, 6, 6), 4)),
    "in place, windows": (ValueError, "overlap",
                          lambda: tempops.temporal_shift_(torch.randn(32).unfold(0, 16, 2)[:8, :, None, None], 4)),
    "K even": (ValueError, "odd number of taps", lambda: tempops.temporal_conv(X, torch.randn(16, 4), 4)),
    "K zero": (ValueError, "odd number of taps", lambda: tempops.temporal_conv(X, torch.randn(16, 0), 4)),
    "G": (ValueError, "5 kernels, which does not divide 16", lambda: tempops.temporal_conv(X, torch.randn(5, 3), 4)),
    "G zero": (ValueError, "0 kernels", lambda: tempops.temporal_conv(X, torch.randn(0, 3), 4)),
    "weight rank": (ValueError, "weight must be .* 1-D", lambda: tempops.temporal_conv(X, torch.randn(3), 4)),
    "weight clips": (ValueError, "weight must have shape", lambda: tempops.temporal_conv(X, torch.randn(3, 16, 3), 4)),
    "weight dtype": (TypeError, "weight must have x's dtype", lambda: tempops.temporal_conv(X, W.double(), 4)),
    "weight device": (ValueError, "weight must be on x's device", lambda: tempops.temporal_conv(X, W.to("meta"), 4)),
    "weight type": (TypeError, "weight must be a torch.Tensor", lambda: tempops.temporal_conv(X, None, 4)),
    "gate": (ValueError, "gate must have shape", lambda: tempops.temporal_conv(X, W, 4, P[:, :4])),
    "kernel even": (ValueError, "kernel_size.*odd", lambda: tempops.motion_enhance(X, 4, 2)),
    "kernel zero": (ValueError, "kernel_size", lambda: tempops.motion_enhance(X, 4, 0)),
    "kernel type": (TypeError, "kernel_size must be an int", lambda: tempops.motion_enhance(X, 4, 3.0)),
    "eps": (ValueError, "eps", lambda: tempops.cosine_gate(X, 4, -1.0)),
    "eps type": (TypeError, "eps", lambda: tempops.temporal_cosine_similarity(X, 4, "small")),
    "dw": (ValueError, "weight must have shape", lambda: tempops.bidirectional_difference(X, DW[:4], 4)),
    "dw dtype": (TypeError, "weight must have x's dtype", lambda: tempops.bidirectional_difference(X, DW.half(), 4)),
    "attention": (ValueError, "forward must have shape", lambda: tempops.motion_attention(X, X[:4], X)),
    "attention dtype": (TypeError, "backward must have x's", lambda: tempops.motion_attention(X, X, X.double())),
    "frames 5-D": (ValueError, "x must be .*got 5-D", lambda: tempops.frame_difference(FIVE)),
    "frames": (ValueError, "n_frames=5 does not divide 16 channels", lambda: tempops.frame_difference(X, 5)),
    "frames few": (ValueError, "n_frames must be at least 2", lambda: tempops.frame_difference(X, 1)),
    "pool": (ValueError, "pool must be at least 1", lambda: tempops.frame_difference(X, 4, 0)),
    "pooled": (ValueError, "pooled must be", lambda: tempops.channel_motion_gate(X, P[:2], P[:2], P[:2].t(), 4)),
    "pooled segments": (ValueError, "n_segment=3 does not divide 8 frames",
                        lambda: tempops.channel_motion_gate(P, P[:2], P[:2], P[:2].t(), 3)),
    "w1": (ValueError, "w1 must", lambda: tempops.channel_motion_gate(P, P[:2, :4], P[:2], P[:2].t(), 4)),
    "w2": (ValueError, "w2 must have shape", lambda: tempops.channel_motion_gate(P, P[:2], P[:3], P[:2].t(), 4)),
    "w3": (ValueError, "w3 must have shape", lambda: tempops.channel_motion_gate(P, P[:2], P[:2], P[:2], 4)),
    "conv": (ValueError, "weight must", lambda: tempops.shift_conv1x1(X, CONV[:, :8], None, 4)),
    "conv kernel": (ValueError, "weight must", lambda: tempops.shift_conv1x1(X, torch.randn(8, 16, 3, 3), None, 4)),
    "bias": (ValueError, "bias must have shape", lambda: tempops.shift_conv1x1(X, CONV, torch.randn(9), 4)),
    "activation": (ValueError, "activation must", lambda: tempops.shift_conv1x1(X, CONV, n_segment=4, activation="g")),
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name):
    error, message, call = ARGUMENTS[name]
    before = [t.clone() for t in (X, W, P)]
    fails(error, message, call)
    assert all(torch.equal(a, b) for a, b in zip(before, (X, W, P)))


DIRECT = {
    "segments": lambda ops: ops.temporal_shift(X, 3),
    "rank": lambda ops: ops.temporal_shift(X[0], 4),
    "dtype": lambda ops: ops.temporal_shift(X.long(), 4),
    "mode": lambda ops: ops.temporal_shift(X, 4, 8, "sideways"),
    "fold_div": lambda ops: ops.temporal_shift(X, 4, 0),
    "in place": lambda ops: ops.temporal_shift_(X, 4, 0),
    "in place, windows": lambda ops: ops.temporal_shift_(torch.randn(32).unfold(0, 16, 2)[:8, :, None, None], 4),
    "weight": lambda ops: ops.temporal_conv(X, W[:5], 4),
    "weight dtype": lambda ops: ops.temporal_conv(X, W.double(), 4),
    "gate": lambda ops: ops.temporal_conv(X, W, 4, P[:4]),
    "conv gradient": lambda ops: ops.temporal_conv_backward(X[:4], X, W, 4, None, True, True, False),
    "conv gate gradient": lambda ops: ops.temporal_conv_backward(X, X, W, 4, None, True, True, True),
    "kernel": lambda ops: ops.motion_enhance(X, 4, 2),
    "enhance gradient": lambda ops: ops.motion_enhance_backward(X, X, 4, 3),
    "one frame": lambda ops: ops.cosine_gate(X, 1),
    "cosine gradient": lambda ops: ops.cosine_gate_backward(X[:, :4], X, 4, 1e-8),
    "difference": lambda ops: ops.bidirectional_difference(X, DW[:3], 4),
    "difference gradient": lambda ops: ops.bidirectional_difference_backward(X, X[:4], X, DW, 4, False, True, True),
    "gather": lambda ops: ops.motion_enhance_gather(X[:4], X, 4, 3),
    "similarity": lambda ops: ops.temporal_cosine_similarity(X, 1, 1e-8),
    "similarity gradient": lambda ops: ops.temporal_cosine_similarity_backward(X, X, 4, 1e-8),
    "attention": lambda ops: ops.motion_attention(X, X[:4], X),
    "attention gradient": lambda ops: ops.motion_attention_backward(X[:4], X, X, X, False, True, True, True),
    "frames": lambda ops: ops.frame_difference(X, 5),
    "frames gradient": lambda ops: ops.frame_difference_backward(X, 5, 2, 9, 12),
    "gate widths": lambda ops: ops.channel_motion_gate(P, P[:2], P[:3], P[:2].t(), 4),
    "gate features": lambda ops: ops.channel_motion_gate_backward(
        P, P, P[:2], P[:2], P[:2].t(), P, P[:, :3], P[:, :2], 4, *[True] * 4),
    "conv1x1": lambda ops: ops.shift_conv1x1(X, CONV[:, :8], None, 4),
    "conv1x1 gradient": lambda ops: ops.shift_conv1x1_backward(X, X[:4], CONV, 4, 8, "causal", False, False, False),
}  # fmt: skip


@pytest.mark.parametrize("space", ("tempops", "tempops_triton") if INTERPRETED else ("tempops",))
@pytest.mark.parametrize("name", DIRECT)
def test_direct_calls_raise_runtime_errors(name, space):
    assert space == "tempops" or _backend.why_not("triton") is None  # which defines the namespace
    with pytest.raises(RuntimeError):
        DIRECT[name](getattr(torch.ops, space))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_direct_calls_check_devices(case):
    """No back end reads memory of another device: mixed devices raise in the dispatcher or in the op."""
    x, n_segment, *others = make(case, Shape(2, 4, 16, 6, 6), layouts(case)[0], torch.float32)
    if not others:
        pytest.skip(f"{case} takes one tensor")
    with pytest.raises((RuntimeError, ValueError)):
        case.call(x, n_segment, *(o.to("meta") for o in others))


HUGE = {
    "temporal_shift": {"fold_div": 2**70},
    "temporal_shift_": {"fold_div": 2**70},
    "temporal_conv": {"weight": torch.randn(16, 3), "n_segment": 2**70},
    "shift_conv1x1": {"weight": CONV, "fold_div": 2**70},
}


@pytest.mark.parametrize("name", HUGE)
def test_numbers_beyond_64_bits(name):
    with pytest.raises(ValueError, match="must fit 64 bits, got 1180591620717411303424"):
        getattr(tempops, name)(X.clone(), **{"n_segment": 4, **HUGE[name]})
    with pytest.raises(ValueError, match="pool must fit 64 bits"):
        tempops.frame_difference(X, 4, 2**70)
