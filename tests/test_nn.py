"""Every layer against its equation, restated frame by frame in plain PyTorch, and its initial values and gradients."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

import tempops
from tempops import nn

N, T, C, H, W = 2, 4, 16, 7, 6


def clips(x: Tensor, t: int = T) -> list[Tensor]:
    """The frames of x [N*T, ...]: T tensors [N, ...]."""
    return list(x.unflatten(0, (-1, t)).unbind(1))


def frames(listed: list[Tensor]) -> Tensor:
    """The inverse of `clips`."""
    return torch.stack(listed, 1).flatten(0, 1)


def around(listed: list[Tensor], t: int) -> tuple[Tensor, Tensor, Tensor]:
    """The frames t-1, t and t+1, zeros outside of the clip."""
    nothing = torch.zeros_like(listed[0])
    return (listed[t - 1] if t else nothing), listed[t], (listed[t + 1] if t + 1 < len(listed) else nothing)


def taps(x: Tensor, weight: Tensor, t: int = T) -> Tensor:
    """weight [C, 3] or [N, C, 3]"""
    per_channel = [weight[..., k, None, None] for k in range(3)]
    return frames([sum(w * f for w, f in zip(per_channel, around(clips(x, t), i))) for i in range(t)])


def conv3d(x: Tensor, weight: Tensor, taps: int, bias=None, t: int = T, **options) -> Tensor:
    """weight [taps*Cout, Cin, kh, kw] as PyTorch's 3D convolution."""
    kernel = weight.unflatten(0, (taps, -1)).movedim(0, 2)
    stride, padding = options.get("stride", 1), options.get("padding", 0)
    y = F.conv3d(x.unflatten(0, (-1, t)).transpose(1, 2), kernel, bias, (1, stride, stride),
                 (taps // 2, padding, padding))  # fmt: skip
    return y.transpose(1, 2).flatten(0, 1)


def shift(layer, x):
    listed, fold = clips(x), x.size(1) // 8
    return frames([
        torch.cat((following[:, :fold], before[:, fold : 2 * fold], this[:, 2 * fold :]), 1)
        for before, this, following in (around(listed, t) for t in range(T))
    ])  # fmt: skip


def shift_conv(layer, x):
    return F.conv2d(shift(layer, x), layer.weight)


def pooled(x: Tensor) -> list[Tensor]:
    return [f.mean((2, 3)) for f in clips(x)]


def gated(x: Tensor, gates: list[Tensor]) -> Tensor:
    return frames([f * g[:, :, None, None] for f, g in zip(clips(x), gates)])


def mem(layer, x):
    p = pooled(x)
    gates = [torch.sigmoid((p[t] @ layer.w1.weight.T - p[t + 1] @ layer.w2.weight.T) @ layer.w3.weight.T)
             for t in range(T - 1)]  # fmt: skip
    return gated(x, [*gates, torch.ones_like(p[0])])


def pem(layer, x):
    p = [f @ layer.squeeze.weight.T for f in pooled(x)]
    z, gates = torch.zeros_like(p[0]), []
    for t in range(T):
        o = p[t + 1] - p[t] if t + 1 < T else torch.zeros_like(z)
        alpha = torch.sigmoid(torch.cat((z, o), 1) @ layer.update.weight.T + layer.update.bias)
        z = (1 - alpha) * z + alpha * o
        gates.append(torch.sigmoid(z @ layer.expand.weight.T))
    return gated(x, gates)


def cme(layer, x):
    p = pooled(x)
    z, k = [f @ layer.w1.weight.T for f in p], [f @ layer.w2.weight.T for f in p]
    gates = []
    for t in range(T):
        d = torch.stack([-(k[t] * k[j]).sum(1) for j in range(T)], 1).exp()
        d = d / d.sum(1, keepdim=True)
        gates.append(torch.sigmoid((z[t] + sum(d[:, j, None] * z[j] for j in range(T))) @ layer.w3.weight.T))
    return gated(x, gates)


def sme(layer, x):
    listed = clips(x)
    s = [F.cosine_similarity(listed[t], listed[t + 1], 1)[:, None] for t in range(T - 1)]
    damped = frames([f * (1 - similarity) for f, similarity in zip(listed, [*s, s[-1]])])
    weight = torch.diag(layer.scale)[..., None, None] if layer.conv is None else layer.conv.weight
    return layer.bn(F.conv2d(damped, weight)) + x


def tam(layer, x):
    g = torch.stack(pooled(x), 2)  # [N, C, T]
    first, norm, _, second = layer.kernel
    hidden = F.relu(norm((g @ first.weight.T).flatten(0, 1)))
    kernel = (hidden @ second.weight.T).softmax(-1).view(N, C, 3)
    first, norm, _, second = layer.importance
    hidden = F.relu(norm(F.conv1d(g, first.weight, padding=1)))
    gates = torch.sigmoid(F.conv1d(hidden, second.weight)).unbind(2)
    return taps(gated(x, list(gates)), kernel)


def cstm(layer, x):
    return F.conv2d(taps(x, layer.taps), layer.weight, stride=layer.stride, padding=1)


def cmm(layer, x):
    z = layer.bn(F.conv2d(x, layer.squeeze.weight))
    moved, z = clips(F.conv2d(z, layer.align.weight, padding=1, groups=z.size(1))), clips(z)
    d = frames([*(moved[t + 1] - z[t] for t in range(T - 1)), torch.zeros_like(z[0])])
    y = F.conv2d(d, layer.expand.weight)
    return y if layer.stride == 1 else F.max_pool2d(y, 2, ceil_mode=True)


def me(layer, x):
    listed = [F.conv2d(f, layer.conv.weight, padding=1) for f in x.split(3, 1)]
    larger = [F.max_pool2d(f, 3, 1, 1) for f in listed]
    return torch.cat([larger[j + 1] - listed[j] for j in range(layer.n_frames - 1)], 1)


def vla(layer, x):
    p = pooled(x)
    p = [torch.maximum(p[t], p[t + 1]) for t in range(0, T, 2)]
    fold, scores = C // 8, []
    for t in range(len(p)):
        before, this, following = around(p, t)
        shifted = torch.cat((before[:, :fold], following[:, fold : 2 * fold], this[:, 2 * fold :]), 1)
        scores.append(shifted @ layer.fc.weight.T + layer.fc.bias)
    return sum(scores) / len(scores)


def s_tdm(layer, x):
    parts = x.split(3, 1)
    d = F.avg_pool2d(torch.cat([parts[j + 1] - parts[j] for j in range(4)], 1), 2)
    return F.max_pool2d(F.relu(layer.bn(F.conv2d(d, layer.conv.weight, stride=2, padding=3))), 3, 2, 1)


def l_tdm(layer, x):
    released = layer.variant == "released"
    z = layer.squeeze_bn(F.conv2d(x, layer.squeeze.weight))
    moved, z = clips(F.conv2d(z, layer.align.weight, padding=1, groups=z.size(1))), clips(z)
    nothing = torch.zeros_like(z[0])
    sign = -1 if released else 1
    forward = frames([*(sign * (z[t] - moved[t + 1]) for t in range(T - 1)), nothing])
    backward = frames([nothing, *(sign * (z[t] - moved[t - 1]) for t in range(1, T))])
    attention = 0
    for d in (forward, backward):
        fine = layer.fine_bn(F.conv2d(d, layer.fine.weight, padding=1))
        coarse = layer.coarse_bn(F.conv2d(F.avg_pool2d(d, 2), layer.coarse.weight, padding=1))
        coarse = F.interpolate(coarse, d.shape[2:], mode="nearest" if released else "bilinear")
        scales = (d + fine + coarse) / (3 if released else 1)
        attention = attention + torch.sigmoid(layer.expand_bn(F.conv2d(scales, layer.expand.weight))) / 2
    return x + x * (attention - (0.5 if released else 0))


def fe(layer, x):
    options = {"stride": layer.conv1.stride[0], "padding": 1}
    gate = conv3d(x, layer.conv2.weight, 3, layer.conv2.offset, **options)
    return conv3d(x, layer.conv1.weight, 3, **options) * gate


class Layer(NamedTuple):
    make: Callable
    restate: Callable
    channels: int = C
    per_clip: bool = False  # whether the result is one row a clip
    least: int = 1  # frames


LAYERS = {
    "TemporalShift": Layer(lambda t: nn.TemporalShift(t), shift),
    "ShiftConv1x1": Layer(lambda t: nn.ShiftConv1x1(C, 5, t), shift_conv),
    "TemporalConv2d": Layer(lambda t: nn.TemporalConv2d(C, 5, 3, t, 2, 1, bias=True),
                            lambda m, x: conv3d(x, m.weight, 3, m.offset, stride=2, padding=1)),
    "TemporalConv2d-large": Layer(lambda t: nn.TemporalConv2d(C, 5, 5, t, 2, 2),
                                  lambda m, x: conv3d(x, m.weight, 3, stride=2, padding=2)),
    "TemporalConv2d-five": Layer(lambda t: nn.TemporalConv2d(C, 5, 1, t, taps=5), lambda m, x: conv3d(x, m.weight, 5)),
    "TemporalInteraction": Layer(lambda t: nn.TemporalInteraction(C, t), lambda m, x: taps(x, m.weight)),
    "GatedInteraction": Layer(lambda t: nn.GatedInteraction(nn.MotionExcitation(C, t), C),
                              lambda m, x: taps(mem(m.gate, x), m.interaction.weight)),
    "MotionExcitation": Layer(lambda t: nn.MotionExcitation(C, t), mem),
    "ProgressiveEnhancement": Layer(lambda t: nn.ProgressiveEnhancement(C, t), pem),
    "LearnableTemporalShift": Layer(lambda t: nn.LearnableTemporalShift(C, t), lambda m, x: taps(x, m.weight)),
    "LearnableTemporalShift-dense": Layer(lambda t: nn.LearnableTemporalShift(C, t, 8),
                                          lambda m, x: conv3d(x, m.conv.weight, 3)),
    "ChannelMotionEnhancement": Layer(lambda t: nn.ChannelMotionEnhancement(C, t), cme),
    "SpatialMotionEnhancement": Layer(lambda t: nn.SpatialMotionEnhancement(C, t), sme, least=2),
    "SpatialMotionEnhancement-dense": Layer(lambda t: nn.SpatialMotionEnhancement(C, t, True), sme, least=2),
    "TemporalAdaptive": Layer(lambda t: nn.TemporalAdaptive(C, t), tam),
    "TemporalExtraction": Layer(lambda t: nn.TemporalExtraction(C, t), tam),
    "FeatureEnhancement": Layer(lambda t: nn.FeatureEnhancement(C, t, 2), fe),
    "ChannelwiseSpatioTemporal": Layer(lambda t: nn.ChannelwiseSpatioTemporal(C, t, 2), cstm),
    "ChannelwiseMotion": Layer(lambda t: nn.ChannelwiseMotion(C, t, reduction=8), cmm),
    "ChannelwiseMotion-strided": Layer(lambda t: nn.ChannelwiseMotion(C, t, 2, reduction=8), cmm),
    "MotionEnhancement": Layer(lambda t: nn.MotionEnhancement(4, 5), me, channels=12),
    "VideoLevelAggregation": Layer(lambda t: nn.VideoLevelAggregation(C, 3, t), vla, per_clip=True),
    "ShortTermTDM": Layer(lambda t: nn.ShortTermTDM(8, t), s_tdm, channels=15),
    "LongTermTDM": Layer(lambda t: nn.LongTermTDM(C, t, 8), l_tdm),
    "LongTermTDM-paper": Layer(lambda t: nn.LongTermTDM(C, t, 8, "paper"), l_tdm),
}  # fmt: skip
layers = pytest.mark.parametrize("name", LAYERS)


def made(name: str, t: int = T) -> torch.nn.Module:
    """A layer whose parameters and statistics are all random, in float64."""
    layer = LAYERS[name].make(t).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
        for buffer in layer.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return layer


def input_of(name: str, t: int = T) -> Tensor:
    return torch.randn(N * t, LAYERS[name].channels, H, W, dtype=torch.float64)


def test_all_are_tested():
    tested = {name.partition("-")[0] for name in LAYERS}
    assert tested | {"ChannelGate", "TemporalLayer", "set_segments"} == set(nn.__all__)


@layers
@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("backend", ("eager", "cpu"))
def test_equation(name, training, backend):
    layer, x = made(name).train(training), input_of(name)
    parameters = list(layer.parameters())
    statistics = {key: buffer.clone() for key, buffer in layer.state_dict().items()}
    wanted = LAYERS[name].restate(layer, x.requires_grad_())
    dy = torch.randn_like(wanted)
    wanted_grads = torch.autograd.grad(wanted, (x, *parameters), dy)
    layer.load_state_dict(statistics)
    with tempops.backend(backend):
        y = layer(x)
    torch.testing.assert_close(y, wanted)
    for grad, expected in zip(torch.autograd.grad(y, (x, *parameters), dy), wanted_grads):
        torch.testing.assert_close(grad, expected)
        assert expected.any()
    if not training:
        with torch.no_grad(), tempops.backend(backend):
            torch.testing.assert_close(layer(x), wanted)


@layers
@pytest.mark.parametrize("gradients", (True, False))
def test_bfloat16_in_evaluation(name, gradients):
    layer, x = made(name).eval(), input_of(name)
    expected = layer.bfloat16().double()(x.bfloat16().double())
    with torch.set_grad_enabled(gradients):
        y = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() < 0.05 * expected.norm()


WATCHERS = {
    "forward": lambda module, see: module.register_forward_hook(lambda *_: see()),
    "forward_pre": lambda module, see: module.register_forward_pre_hook(lambda *_: see()),
    "backward": lambda module, see: module.register_full_backward_hook(lambda *_: see()),
    "backward_pre": lambda module, see: module.register_full_backward_pre_hook(lambda *_: see()),
    "global": lambda module, see: register_module_forward_hook(lambda other, *_: see() if other is module else None),
}


@pytest.mark.parametrize("watcher", WATCHERS)
@pytest.mark.parametrize(
    "name, modules",
    (
        ("LongTermTDM", ("squeeze", "squeeze_bn", "fine", "coarse_bn", "expand", "expand_bn")),
        ("ShortTermTDM", ("conv", "bn")),
        ("ChannelwiseMotion", ("squeeze", "bn")),
        ("SpatialMotionEnhancement", ("bn",)),
        ("SpatialMotionEnhancement-dense", ("conv", "bn")),
    ),
)
def test_watched_modules_are_called(name, modules, watcher):
    """In evaluation a normalisation is part of what comes before it, but for who watches it."""
    layer, x = made(name).eval(), input_of(name).requires_grad_()
    expected = layer(x)
    if watcher.startswith("backward") and name != "ChannelwiseMotion":
        modules = [module for module in modules if module != "bn"]
        if not modules:
            pytest.skip("PyTorch has no such hooks before an in-place function")
    for module in modules:
        seen = []
        handle = WATCHERS[watcher](getattr(layer, module), lambda: seen.append(module))  # noqa: B023
        y = layer(x)
        y.sum().backward()
        handle.remove()
        torch.testing.assert_close(y, expected)
        assert seen


def test_exchanged_modules_are_called():
    layer, x = made("LongTermTDM").eval(), input_of("LongTermTDM")
    expected = layer(x)
    layer.fine = torch.nn.Sequential(layer.fine)
    patched = layer.squeeze
    patched.forward = lambda x: torch.nn.Conv2d.forward(patched, x)
    coarse = torch.nn.Conv2d(2, 2, 3, padding=1).double()
    coarse.weight, layer.coarse = layer.coarse.weight, coarse
    coarse.bias.data.fill_(3)
    layer.coarse_bn.running_mean += 3
    torch.testing.assert_close(layer(x), expected)
    sme, x = made("SpatialMotionEnhancement").eval(), input_of("SpatialMotionEnhancement")
    sme.bn.bias.data.zero_()
    expected = sme(x)
    sme.bn.register_parameter("bias", None)
    torch.testing.assert_close(sme(x), expected)


@pytest.mark.parametrize("name", ("SpatialMotionEnhancement", "LongTermTDM"))
def test_transforms_in_evaluation(name):
    """torch.jit.trace compares a graph with one traced without gradients; transforms have no rules for out=."""
    layer, x = made(name).eval(), input_of(name)
    expected, tangent = torch.func.jvp(layer, (x,), (x,))
    torch.testing.assert_close(torch.jit.trace(layer, (x,))(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(layer)(x[None])[0], expected)
        for one, other in zip(torch.func.jvp(layer, (x,), (x,)), (expected, tangent)):
            torch.testing.assert_close(one, other)


@layers
@pytest.mark.parametrize("t", (1, 5, 8))
def test_other_numbers_of_frames(name, t):
    """A layer made for T and changed is the layer made for the other T."""
    case, x = LAYERS[name], input_of(name, t)
    layer = made(name).eval()
    if t < case.least:
        for change in (partial(nn.set_segments, layer), case.make):
            with pytest.raises(ValueError, match="n_segment must be at least 2, got 1"):
                change(t)
        assert layer.n_segment == T
        return
    if getattr(layer, "depends_on_segments", False):
        with pytest.raises(ValueError, match=f"n_segment={t} does not fit the parameters of {type(layer).__name__}"):
            nn.set_segments(layer, t)
        return
    other = case.make(t).double().eval()
    other.load_state_dict(layer.state_dict())
    nn.set_segments(layer, t)
    assert torch.equal(layer(x), other(x))
    assert len(layer(x)) == (N if case.per_clip else N * t)


@layers
def test_channels_last(name):
    """The layout is kept, and moving the layer to channels_last works."""
    layer, x = made(name).eval(), input_of(name)
    expected = layer(x)
    y = layer.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(y, expected)
    if y.dim() == 4 and name != "MotionEnhancement":  # which stacks frames: what is last there is the frames' channels
        assert y.is_contiguous(memory_format=torch.channels_last)


@layers
def test_traced_once_for_all_sizes(name):
    layer = made(name).eval()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        traced = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
        for count, h, w in ((2, 7, 9), (3, 15, 17)):  # as odd where they are halved, on which PyTorch 2.11 guards
            x = torch.randn(count * T, LAYERS[name].channels, h, w, dtype=torch.float64)
            torch.testing.assert_close(traced(x), layer(x))


def test_temporal_convolution_compiles_for_all_sizes():
    layer = nn.TemporalConv2d(C, 5, 1, T)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for h, w in ((7, 9), (8, 6)):
        x = torch.randn(N * T, C, h, w)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)


def test_temporal_convolution_of_short_clips_in_bfloat16():
    layer, x = nn.TemporalConv2d(3, 16, 7, 3, 2, 3, taps=5), torch.randn(2 * 3, 3, 32, 32)
    (expected,) = torch.autograd.grad(layer(x).sum(), [layer.weight])
    layer.bfloat16()
    (grad,) = torch.autograd.grad(layer(x.bfloat16()).sum(), [layer.weight])
    assert (grad - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize(
    "name", sorted(set(LAYERS) - {"MotionEnhancement", "ShortTermTDM"})
)  # these read no other segment
def test_wrong_number_of_frames(name):
    layer, x = made(name).eval(), input_of(name)
    with pytest.raises(ValueError, match="n_segment=4 does not divide 7 frames"):
        layer(x[:7])


def test_initial_values():
    x = torch.randn(N * T, C, H, W)
    shifted = tempops.temporal_shift(x, T, 8)
    assert torch.equal(nn.TemporalInteraction(C, T)(x), shifted)
    assert torch.equal(nn.LearnableTemporalShift(C, T)(x), shifted)
    dense = nn.LearnableTemporalShift(C, T, 8)
    assert torch.equal(dense(x), tempops.temporal_shift(x[:, :8], T, 8))
    assert nn.LearnableTemporalShift(4, T, 16)(x[:, :4]).shape[1] == 16

    cstm = nn.ChannelwiseSpatioTemporal(C, T)
    listed = clips(x)
    expected = frames([torch.cat((before[:, :4], this[:, 4:12], following[:, 12:]), 1)
                       for before, this, following in (around(listed, t) for t in range(T))])  # fmt: skip
    torch.testing.assert_close(cstm(x), F.conv2d(expected, cstm.weight, padding=1))

    enhancement, image = nn.FeatureEnhancement(C, T), torch.randn(C, C, 3, 3)
    enhancement.load_state_dict(enhancement.from_2d(image), strict=False)
    torch.testing.assert_close(enhancement(x), F.conv2d(x, image, padding=1), rtol=1e-4, atol=1e-4)

    inflated = nn.TemporalConv2d(C, C, 3, T, padding=1)
    inflated.load_state_dict(inflated.from_2d(image))
    still = frames([listed[0]] * T)
    inside = clips(inflated(still))[1]
    torch.testing.assert_close(inside, F.conv2d(listed[0], image, padding=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ("released", "paper"))
def test_short_term_fusion(variant):
    x, motion = torch.randn(N * T, 8, 8, 8), torch.randn(N * T, 8, 4, 4)
    enlarged = motion.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for t, (a, b) in {8: (0.5, 0.5), 16: (0.75, 0.25), 4: (0.75, 0.25)}.items():
        a, b = (a, b) if variant == "released" else (1, 1)
        layer = nn.ShortTermTDM(8, t, variant=variant)
        torch.testing.assert_close(layer.fuse(x, motion), a * x + b * enlarged)


def test_sides_of_one_pixel():
    layer = nn.LongTermTDM(C, T).eval()
    assert layer(torch.randn(T, C, 1, 3)).shape == (T, C, 1, 3)
    assert nn.ShortTermTDM(8, T)(torch.randn(T, 15, 7, 1)).shape == (T, 8, 2, 1)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="n_segment must be at least 1, got 0"):
        nn.TemporalShift(0)
    with pytest.raises(TypeError, match="n_segment must be an int, got float"):
        nn.TemporalInteraction(C, 2.0)
    with pytest.raises(ValueError, match="taps must be odd, got 4"):
        nn.TemporalConv2d(3, 3, 1, T, taps=4)
    with pytest.raises(ValueError, match="variant must be one of 'released', 'paper', got 'other'"):
        nn.LongTermTDM(C, T, variant="other")
    with pytest.raises(ValueError, match="n_segment must be at least 1, got 0"):
        nn.set_segments(nn.TemporalShift(4), 0)
