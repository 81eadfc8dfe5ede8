"""Every model: its cost, its back ends, layouts, dtypes, numbers of segments, and the weights it can be given."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import tempops
from tempops import models
from tempops.models import ResNet, create_model, load_backbone, load_released_weights

T, CLASSES = 4, 5
LAYERS, WIDTH = (2, 2, 2, 2), 16
names = pytest.mark.parametrize("name", models.list_models())


def small(name: str, n_segment: int = T, **options) -> torch.nn.Module:
    options = {"layers": LAYERS, "width": WIDTH, "dropout": 0.0} | options
    return create_model(name, CLASSES, n_segment=n_segment, **options)


def input_of(name: str, model, clips: int = 2, size: tuple[int, int] = (64, 64), **options) -> tuple[Tensor, ...]:
    t = model.n_segment
    if name == "menet":
        return torch.randn(clips, t, 15, *size, **options), torch.randn(clips, 2 * t, 12, *size, **options)
    return (torch.randn(clips, t, 15 if name == "tdn" else 3, *size, **options),)


# --- cost -------------------------------------------------------------------------------------------------------------


def count(name: str, size: tuple[int, int] = (224, 224), classes: int = 174, **options) -> tuple[float, float]:
    """Multiply-adds of a clip in G, parameters in M."""
    with torch.device("meta"), tempops.backend("eager"), FlopCounterMode(display=False) as counter:
        model = create_model(name, classes, **options).eval()
        model(*input_of(name, model, 1, size))
    return counter.get_total_flops() / 2e9, sum(p.numel() for p in model.parameters()) / 1e6


@pytest.mark.parametrize(
    "name, options, multiply_adds, parameters",
    [
        ("tsn", {}, 32.7, 23.9),
        ("tsm", {}, 32.7, 23.9),
        ("tsm", {"n_segment": 16}, 65.4, 23.9),
        ("stm", {}, 33.1, None),
        ("teinet", {}, 33.0, 29.9),
        ("tdrl", {}, 33.0, None),
        ("gst", {}, 29.0, 21.0),
        ("gst", {"n_segment": 16}, 58.0, 21.0),
        ("gte", {}, 25.3, 17.97),
        ("gte", {"variant": "depthwise"}, 25.3, 18.2),
        ("cmr", {}, 33.0, 29.9),
        ("cmr", {"dense": True}, 39.6, None),
        ("tefe", {}, 79.0, 64.8),
        ("tefe", {"size": (224, 256)}, 90.25, 64.8),
        ("tdn", {}, 35.6, None),
        ("tdn", {"n_segment": 16}, 71.2, None),
        ("i3d", {}, 152.5, None),
        ("menet", {}, 73.4 + 36.5, None),
    ],
)
def test_cost(name, options, multiply_adds, parameters):
    counted, size = count(name, **options)
    assert counted == pytest.approx(multiply_adds, rel=0.01)
    if parameters is not None:
        assert size == pytest.approx(parameters, abs=0.051)


# --- the network ------------------------------------------------------------------------------------------------------


def torchvision_names(layers=(3, 4, 6, 3), convolutions=3) -> set[str]:
    def norm(name: str) -> list[str]:
        return [f"{name}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

    listed = ["conv1.weight", *norm("bn1"), "fc.weight", "fc.bias"]
    for stage, blocks in enumerate(layers, 1):
        for block in range(blocks):
            prefix = f"layer{stage}.{block}"
            for i in range(1, convolutions + 1):
                listed += [f"{prefix}.conv{i}.weight", *norm(f"{prefix}.bn{i}")]
            if block == 0 and (convolutions == 3 or stage > 1):
                listed += [f"{prefix}.downsample.0.weight", *norm(f"{prefix}.downsample.1")]
    return set(listed)


def test_backbone_names_are_torchvision_s():
    with torch.device("meta"):
        assert set(create_model("tsn", 1000).state_dict()) == torchvision_names()
        assert set(create_model("tsn", 1000, depth=34).state_dict()) == torchvision_names(convolutions=2)
        assert torchvision_names((3, 4, 23, 3)) == set(create_model("tsm", 1000, depth=101).state_dict())
        assert torchvision_names() <= set(create_model("stm", 1000).state_dict())


def restated_resnet(state: dict[str, Tensor], x: Tensor, before=lambda name, x: x, shift=lambda x: x) -> Tensor:
    """A ResNet of bottlenecks in evaluation, read from its state dict: `x` after the stem, features before the pool."""
    for stage in range(1, 5):
        for place in range(LAYERS[stage - 1]):
            x = restated_block(state, f"layer{stage}.{place}", x, 2 if stage > 1 and place == 0 else 1, before, shift)
    return x


def restated_block(state, prefix, x, stride, before=lambda name, x: x, shift=lambda x: x):
    y = F.relu(norm(state, f"{prefix}.bn1", conv(state, f"{prefix}.conv1", shift(x))))
    y = before(prefix, y)
    y = F.relu(norm(state, f"{prefix}.bn2", conv(state, f"{prefix}.conv2", y, stride=stride, padding=1)))
    y = norm(state, f"{prefix}.bn3", conv(state, f"{prefix}.conv3", y))
    if f"{prefix}.downsample.0.weight" in state:
        x = norm(state, f"{prefix}.downsample.1", conv(state, f"{prefix}.downsample.0", x, stride=stride))
    return F.relu(x + y)


def conv(state: dict[str, Tensor], name: str, x: Tensor, **options) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)


def norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    values = (state[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *values)


def restated_stem(state: dict[str, Tensor], x: Tensor, conv1="conv1", bn1="bn1") -> Tensor:
    return F.max_pool2d(F.relu(norm(state, bn1, conv(state, conv1, x, stride=2, padding=3))), 3, 2, 1)


def shifted(x: Tensor, t: int = T) -> Tensor:
    x, fold = x.unflatten(0, (-1, t)), x.size(1) // 8
    y = x.clone()
    y[:, :, : 2 * fold] = 0
    y[:, :-1, :fold] = x[:, 1:, :fold]
    y[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
    return y.flatten(0, 1)


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """The model with random statistics and affine parameters of its batch normalisations."""
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            for value in (module.weight, module.running_var):
                torch.nn.init.uniform_(value, 0.5, 1.5)
            for value in (module.bias, module.running_mean):
                torch.nn.init.normal_(value, 0, 0.1)
    return model


@pytest.mark.parametrize("name", ("tsn", "tsm"))
def test_forward_is_the_network(name):
    model = randomised(small(name)).eval()
    (x,) = input_of(name, model)
    state = model.state_dict()
    features = restated_stem(state, x.flatten(0, 1))
    features = restated_resnet(state, features, shift=shifted if name == "tsm" else lambda x: x)
    scores = features.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(model(x), scores.unflatten(0, (2, T)).mean(1), rtol=1e-4, atol=1e-5)


def test_forward_is_i3d():
    """The inflated network, restated with PyTorch's 3D convolutions and pools."""
    model = randomised(small("i3d", 6)).eval()
    (x,) = input_of("i3d", model)
    state = model.state_dict()

    def conv3d(name: str, x: Tensor, taps: int = 1, stride: int = 1, padding: int = 0) -> Tensor:
        kernel = state[f"{name}.weight"].unflatten(0, (taps, -1)).movedim(0, 2)
        return F.conv3d(x, kernel, None, (1, stride, stride), (taps // 2, padding, padding))

    y = F.relu(norm(state, "bn1", conv3d("conv1", x.transpose(1, 2), 5, 2, 3)))
    y = F.max_pool3d(y, (1, 3, 3), (1, 2, 2), (0, 1, 1))
    for stage in range(1, 5):
        for place in range(2):
            name, stride = f"layer{stage}.{place}", 2 if place == 0 and stage in (2, 3) else 1
            z = F.relu(norm(state, f"{name}.bn1", conv3d(f"{name}.conv1", y, 3 if place == 0 else 1)))
            z = F.relu(norm(state, f"{name}.bn2", conv3d(f"{name}.conv2", z, 1, stride, 1)))
            z = norm(state, f"{name}.bn3", conv3d(f"{name}.conv3", z))
            if place == 0:
                y = norm(state, f"{name}.downsample.1", conv3d(f"{name}.downsample.0", y, 1, stride))
            y = F.relu(y + z)
        if stage == 1:
            y = F.max_pool3d(y, (2, 1, 1), (2, 1, 1))
    scores = y.mean((2, 3, 4)) @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(model(x), scores, rtol=1e-4, atol=1e-4)


# What stands where in the blocks of stages 2 to 5 of ResNet-50: the stages' first blocks, then the others.
PLACES = {
    "tsn": ([{}] * 4, [{}] * 4),
    "tsm": ([{"conv1": "ShiftConv1x1"}] * 4,) * 2,
    "teinet": ([{"before_conv1": "GatedInteraction"}] * 4,) * 2,
    "tdrl": ([{"before_conv1": "GatedInteraction"}] * 4,) * 2,
    "stm": ([{"conv2": "_SpatioTemporalAndMotion"}] * 4,) * 2,
    "gst": ([{"conv2": "_Grouped"}] * 4,) * 2,
    "gte": ([{"conv2": "_Grouped"}] * 4,) * 2,
    "cmr": (
        [{"before_conv1": "GatedInteraction", "after_block": "SpatialMotionEnhancement"}] * 4,
        [{"before_conv1": "GatedInteraction"}] * 4,
    ),
    "tefe": ([{"before_conv3": "TemporalExtraction"}] * 4, [{}] + [{"conv2": "FeatureEnhancement"}] * 3),
    "tdn": ([{}] + [{"before_conv2": "Sequential"}] * 3,) * 2,
}


@pytest.mark.parametrize("name", PLACES)
def test_placement(name):
    with torch.device("meta"):
        model = create_model(name, 3)
    slots = ("before_conv1", "conv1", "before_conv2", "conv2", "before_conv3", "conv3", "after_block")
    first, others = PLACES[name]
    for stage, place, block in model.blocks():
        found = {slot: type(getattr(block, slot)).__name__ for slot in slots}
        changed = {slot: kind for slot, kind in found.items() if kind not in ("Identity", "Conv2d")}
        assert changed == (others if place else first)[stage - 2], (stage, place)
    gates = {type(m.gate).__name__ for m in model.modules() if type(m).__name__ == "GatedInteraction"}
    expected = {"teinet": "MotionExcitation", "tdrl": "ProgressiveEnhancement", "cmr": "ChannelMotionEnhancement"}
    assert gates == ({expected[name]} if name in expected else set())


def test_menet_is_two_networks():
    model = randomised(small("menet")).eval()
    appearance, motion = input_of("menet", model)
    state = {key.partition(".")[2]: x for key, x in model.state_dict().items() if key.startswith("motion.")}
    enhanced = model.motion.enhance(motion.flatten(0, 1))
    features = restated_resnet(state, restated_stem(state, enhanced))
    scores = (features.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]).unflatten(0, (2, 2 * T)).mean(1)
    state = {key.partition(".")[2]: x for key, x in model.state_dict().items() if key.startswith("appearance.")}
    features = restated_resnet(state, restated_stem(state, appearance.flatten(0, 1)))
    scores = scores + model.appearance.fc(features)
    torch.testing.assert_close(model(appearance, motion), scores, rtol=1e-4, atol=1e-4)


def conv_of_clips(weight: Tensor, x: Tensor, stride: int = 1) -> Tensor:
    """PyTorch's 3D convolution with the kernel [3*Cout, Cin, k, k] of a TemporalConv2d."""
    kernel, padding = weight.unflatten(0, (3, -1)).movedim(0, 2), weight.size(-1) // 2
    clips = x.unflatten(0, (-1, T)).transpose(1, 2)
    return F.conv3d(clips, kernel, None, (1, stride, stride), (1, padding, padding)).transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("name", ("gst", "gte", "gte-depthwise"))
def test_grouped_convolutions(name):
    """The two branches in the place of a 3x3 convolution with stride 2."""
    name, _, variant = name.partition("-")
    conv2 = small(name, **({"variant": variant} if variant else {})).layer2[0].conv2
    x = torch.randn(2 * T, 32, 9, 9)
    first, second = x[:, :16], x[:, 16:]
    spatial = F.conv2d(first, conv2.spatial.weight, stride=2, padding=1)
    assert spatial.shape[1:] == (24, 5, 5)
    if name == "gst":
        temporal = conv_of_clips(conv2.temporal.weight, second, 2)
    else:
        if variant:
            weight = torch.diag_embed(torch.nn.init.normal_(conv2.shift.weight.data).t()).flatten(0, 1)[..., None, None]
        else:
            weight = torch.nn.init.normal_(conv2.shift.conv.weight.data)
        temporal = F.conv2d(conv_of_clips(weight, second), conv2.temporal.weight, stride=2, padding=1)
    torch.testing.assert_close(conv2(x), torch.cat((spatial, temporal), 1), rtol=1e-4, atol=1e-4)


@names
@pytest.mark.parametrize("training", (True, False))
def test_eager_and_fused_agree_and_every_parameter_learns(name, training):
    model = randomised(small(name)).double().train(training)
    x = input_of(name, model, size=(65, 50), dtype=torch.float64)
    results = {}
    for backend in ("eager", "cpu"):
        with tempops.backend(backend):
            scores = model(*x)
        grads = torch.autograd.grad(scores.log_softmax(1)[:, 0].sum(), list(model.parameters()))
        results[backend] = scores, *grads
    assert results["cpu"][0].shape == (2, CLASSES)
    for mine, eager in zip(results["cpu"], results["eager"]):
        assert (mine - eager).abs().max() <= 1e-8 * eager.abs().max() + 1e-12
    if training:
        return  # L-TDM's inner biases have no gradient there: the last batch normalisation takes them out
    for (key, _), grad in zip(model.named_parameters(), results["cpu"][1:]):
        assert grad.isfinite().all() and grad.abs().max() > 1e-9, key  # 0 would be about 1e-16


@names
def test_segments_can_change(name):
    model = small(name).eval()
    if name == "tefe":
        with pytest.raises(ValueError, match="n_segment=6 does not fit the parameters of TemporalExtraction"):
            model.set_segments(6)
        assert model.n_segment == T
        return
    for t in (6, 3):
        other = small(name, t).eval()
        other.load_state_dict(model.state_dict())
        model.set_segments(t)
        x = input_of(name, model, 1, (32, 48))
        assert torch.equal(model(*x), other(*x))
    with pytest.raises(ValueError, match="n_segment must be at least 1, got 0"):
        model.set_segments(0)


@names
def test_channels_last(name):
    """The result is the same, and no convolution gets a tensor in another layout, but for the frames themselves."""
    model = small(name).eval()
    x = input_of(name, model)
    expected = model(*x)
    model.to(memory_format=torch.channels_last)
    others = []

    def record(module, inputs):
        if module.in_channels > 5 and module.in_channels % 3 and inputs[0].numel() > len(inputs[0]):
            others.extend([module] * (not _is_dense_or_slice(inputs[0])))

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(record)
    torch.testing.assert_close(model(*x), expected, rtol=1e-3, atol=1e-4)
    assert others == []


def _is_dense_or_slice(x: Tensor) -> bool:
    """Whether a pixel's channels are adjacent."""
    return x.stride(1) == 1 and x.stride(3) >= x.size(1)


@names
def test_autocast(name):
    model = small(name)
    x = input_of(name, model)
    expected = model(*x)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(*x)
    assert scores.dtype == torch.bfloat16
    assert (scores - expected).abs().max() < 0.2 * expected.abs().max()
    grads = torch.autograd.grad(scores.float().square().sum(), list(model.parameters()))
    assert all(grad.isfinite().all() and grad.dtype == torch.float32 for grad in grads)


@names
def test_bfloat16(name):
    model = small(name).eval()
    x = input_of(name, model)
    expected = model(*x)
    scores = model.bfloat16()(*(frames.bfloat16() for frames in x))
    assert scores.dtype == torch.bfloat16
    assert (scores - expected).abs().max() < 0.1 * expected.abs().max()


@names
def test_compile(name):
    """A training step without a break in the graph, equal to the one that is not compiled."""
    torch._dynamo.reset()
    model = small(name, layers=(1, 2, 1, 1)).double()
    x = input_of(name, model, 1, (32, 32), dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for call in (model, compiled):
        scores = call(*x)
        results.append((scores, *torch.autograd.grad(scores.square().sum(), list(model.parameters()))))
    for plain, mine in zip(*results):
        torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-6)


@names
def test_no_clips(name):
    model = small(name).eval()
    assert model(*input_of(name, model, 0)).shape == (0, CLASSES)


def test_other_depths():
    for depth in (18, 34, 101):
        with torch.device("meta"):
            assert create_model("tsm", 3, depth=depth)(torch.empty(1, 8, 3, 64, 64)).shape == (1, 3)
    from tempops.nn import ShiftConv1x1, TemporalShift

    with torch.device("meta"):
        shifts = [type(block.conv1) is ShiftConv1x1 for _, _, block in create_model("tsm", 3, depth=101).blocks()]
        basic = [type(block.before_conv1) for _, _, block in create_model("tsm", 3, depth=18).blocks()]
    assert shifts[:7] == [True, False, True, True, False, True, False] and sum(shifts) == 2 + 2 + 12 + 2
    assert basic == [TemporalShift] * 8


def test_options():
    paper = small("tdn", variant="paper").eval()
    state, (x,) = paper.state_dict(), input_of("tdn", paper)
    other = small("tdn").eval()
    other.load_state_dict(state)
    assert not torch.allclose(paper(x), other(x), rtol=0.01)
    assert small("tdn", short_stages=(), long_stages=())(x).shape == (2, CLASSES)
    three = small("tdn", short_stages=(1, 2, 3), long_stages=(2, 5))
    assert len(three.short_stages) == 2 and three(x).shape == (2, CLASSES)
    sme = [
        [hasattr(block.after_block, "bn") for _, _, block in small("cmr", sme=places, cme="first").blocks()]
        for places in ("all", "first", "none")
    ]
    assert sme == [[True] * 8, [True, False] * 4, [False] * 8]
    small("tefe", te=(2, 1, 0, 1), fe=(0, 0, 2, 1))(torch.randn(1, T, 3, 32, 32))
    menet = small("menet", weights=(1.0, 0.0)).eval()
    x = input_of("menet", menet)
    assert torch.equal(menet(*x), menet.appearance(x[0]))


def test_errors():
    def fails(message: str, call, error: type = ValueError):
        with pytest.raises(error, match=message):
            call()

    model = small("tsn")
    fails(
        r"x must have n_segment=4 segments a clip, got 8; model.set_segments\(8\)",
        lambda: model(torch.randn(1, 8, 3, 32, 32)),
    )
    fails(r"x must be \[N, T, 3, H, W\], got 4-D \[8, 3, 32, 32\]", lambda: model(torch.randn(8, 3, 32, 32)))
    fails(r"x must be \[N, T, 15, H, W\]", lambda: small("tdn")(torch.randn(1, T, 3, 32, 32)))
    fails("x must be float32", lambda: model(torch.zeros(1, T, 3, 32, 32, dtype=torch.uint8)), TypeError)
    frames = torch.randn(1, T, 15, 32, 32), torch.randn(2, 2 * T, 12, 32, 32)
    fails("motion must have as many clips as appearance, 1, got 2", lambda: small("menet")(*frames))
    fails("motion must have n_segment=8", lambda: small("menet")(frames[0], frames[1][:, :T]))
    fails("name must be one of 'cmr', .* got 'resnet'", lambda: create_model("resnet", 3))
    fails("depth must be one of 50, 101, got 18", lambda: create_model("gst", 3, depth=18))
    fails("num_classes must be at least 1, got 0", lambda: create_model("tsn", 0))
    fails("unexpected keyword argument", lambda: create_model("tsn", 3, fold_div=4), TypeError)
    fails("t must be between 0 and 1, got 1", lambda: small("gte", t=1))
    fails("variant must be one of 'paper', 'depthwise'", lambda: small("gte", variant="other"))
    fails("cme must be one of 'all', 'first', 'none'", lambda: small("cmr", cme="some"))
    fails(
        r"te and fe must fit stages of \[2, 2, 2, 2\] blocks", lambda: small("tefe", te=(1, 1, 1, 1), fe=(0, 2, 1, 1))
    )
    fails("short_stages must be the first of", lambda: small("tdn", short_stages=(2,)))
    fails("long_stages must be of", lambda: small("tdn", long_stages=(1, 2)))


# --- weights ----------------------------------------------------------------------------------------------------------


def image_network(**options) -> ResNet:
    options = {"layers": LAYERS, "width": WIDTH, "dropout": 0.0} | options
    return randomised(create_model("tsn", 7, n_segment=1, **options)).eval()


@names
def test_load_backbone(name):
    network = image_network()
    weights = network.state_dict()
    model = small(name).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load_backbone(model, weights)
    after = model.state_dict()
    same = [key for key in after if torch.equal(after[key], before[key]) and not key.endswith("num_batches_tracked")]
    # What an image network does not have keeps its value ...
    new = ("before_", "after_block", "fc.", "enhance", "short.bn", "conv2.taps", "conv2.motion", "conv2.shift",
           "conv2.conv2")  # fmt: skip
    for key in same:
        assert any(part in key for part in new), key
    # ... and what it has arrives everywhere.
    for key, value in weights.items():
        if key in after and after[key].shape == value.shape and not key.startswith("fc."):
            assert torch.equal(after[key], value), key


def test_load_backbone_inflates():
    network = image_network()
    weights = network.state_dict()
    kernel = weights["conv1.weight"]

    i3d = small("i3d")
    load_backbone(i3d, weights)
    torch.testing.assert_close(i3d.conv1.weight.unflatten(0, (5, -1)), (kernel / 5).expand(5, *kernel.shape))
    torch.testing.assert_close(
        i3d.layer2[0].conv1.weight.unflatten(0, (3, -1)).sum(0), weights["layer2.0.conv1.weight"], rtol=1e-5, atol=1e-6
    )

    tdn = small("tdn")
    load_backbone(tdn, weights)
    for channel in tdn.short.conv.weight.unbind(1):
        assert torch.equal(channel, kernel.mean(1))
    assert torch.equal(tdn.short_stages[0][1].conv2.weight, weights["layer1.1.conv2.weight"])
    assert torch.equal(tdn.short_stages[0][0].bn3.running_var, weights["layer1.0.bn3.running_var"])

    menet = small("menet")
    load_backbone(menet, weights)
    for branch in (menet.appearance, menet.motion):
        torch.testing.assert_close(branch.conv1.weight.unflatten(1, (5, 3)).sum(1), kernel)
    torch.nn.init.normal_(menet.motion.conv1.weight)
    load_backbone(menet, menet.motion.state_dict())
    assert torch.equal(menet.appearance.conv1.weight, menet.motion.conv1.weight)
    assert torch.equal(menet.appearance.layer4[1].conv3.weight, menet.motion.layer4[1].conv3.weight)

    conv2 = weights["layer1.0.conv2.weight"]  # 16 channels
    gst, gte, deep = small("gst"), small("gte"), small("gte", variant="depthwise")
    for model in (gst, gte, deep):
        load_backbone(model, weights)
        assert torch.equal(model.layer1[0].conv2.spatial.weight, conv2[:12, :8])
    torch.testing.assert_close(gst.layer1[0].conv2.temporal.weight[4:8], conv2[12:, 8:] / 3)
    assert torch.equal(gte.layer1[0].conv2.temporal.weight, conv2[12:, 8:12])
    assert torch.equal(deep.layer1[0].conv2.temporal.weight, conv2[12:, 8:])


def test_fe_starts_as_the_image_network():
    """With TEFE's initialisation and without TE, the model is TSN until it learns otherwise."""
    network, model = image_network(), small("tefe", te=(0, 0, 0, 0), fe=(0, 2, 2, 2)).eval()
    load_backbone(model, network.state_dict())
    x = torch.randn(1, T, 3, 64, 64)
    features = network.features(x.flatten(0, 1))
    torch.testing.assert_close(model.features(x.flatten(0, 1)), features, rtol=1e-4, atol=1e-4)


def test_load_backbone_says_what_does_not_fit():
    weights = image_network().state_dict()
    for name in ("tsm", "menet"):
        model = small(name)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        for change, message in (
            ({"layer1.0.conv1.weight": None}, "missing: layer1.0.conv1.weight$"),
            ({"layer9.weight": torch.ones(3)}, "unknown: layer9.weight$"),
            ({"bn1.bias": torch.ones(3)}, r"of another shape: bn1.bias \[3\] instead of \[16\]$"),
        ):
            wrong = {key: value for key, value in (weights | change).items() if value is not None}
            with pytest.raises(ValueError, match="these are no weights of a ResNet-50: " + message):
                load_backbone(model, wrong)
        with pytest.raises(ValueError, match=r"missing: .* and \d+ more"):
            load_backbone(model, {"epoch": torch.ones(1)})
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def released_state(layers: int, *, bias: bool, tdn: bool) -> dict[str, Tensor]:
    """A state dict with the names and shapes of the authors' ResNets, random values, without their prefixes."""
    state = {}

    def conv(name: str, out: int, of: int, k: int, bias: bool = bias) -> None:
        state[f"{name}.weight"] = torch.randn(out, of, k, k) * math.sqrt(2 / (of * k * k))
        if bias:
            state[f"{name}.bias"] = torch.randn(out) * 0.3

    def norm(name: str, channels: int) -> None:
        for leaf in ("weight", "running_var"):
            state[f"{name}.{leaf}"] = torch.rand(channels) + 0.5
        for leaf in ("bias", "running_mean"):
            state[f"{name}.{leaf}"] = torch.randn(channels) * 0.3
        state[f"{name}.num_batches_tracked"] = torch.tensor(3)

    def stage(prefix: str, index: int, temporal: bool) -> None:
        planes = WIDTH * 2**index
        for place in range(layers):
            name, of = f"{prefix}.{place}", 4 * planes
            if place == 0:
                of = WIDTH if index == 0 else 2 * planes
                conv(f"{name}.downsample.0", 4 * planes, of, 1)
                norm(f"{name}.downsample.1", 4 * planes)
            conv(f"{name}.conv1" + ("" if tdn else ".net"), planes, of, 1)
            conv(f"{name}.conv2", planes, planes, 3)
            conv(f"{name}.conv3", 4 * planes, planes, 1)
            for i, channels in ((1, planes), (2, planes), (3, 4 * planes)):
                norm(f"{name}.bn{i}", channels)
            if temporal:
                squeezed = planes // 16
                conv(f"{name}.mse.conv1", squeezed, planes, 1, False)
                conv(f"{name}.mse.conv2", squeezed, 1, 3, False)
                conv(f"{name}.mse.conv3", planes, squeezed, 1, False)
                norm(f"{name}.mse.bn1", squeezed)
                norm(f"{name}.mse.bn3", planes)
                for scale in ("smallscale2", "smallscale4"):
                    conv(f"{name}.mse.conv3_{scale}", squeezed, squeezed, 3, False)
                    norm(f"{name}.mse.bn3_{scale}", squeezed)
                state[f"{name}.shift.conv.weight"] = torch.randn(planes, 1, 3)

    conv("conv1", WIDTH, 3, 7)
    norm("bn1", WIDTH)
    if tdn:
        conv("conv1_temp", WIDTH, 3, 7)
        conv("conv1_5.0", WIDTH, 12, 7, False)
        norm("conv1_5.1", WIDTH)
        stage("resnext_layer1", 0, False)
    for index in range(4):
        stage(f"layer{index + 1}" + ("_bak" if tdn else ""), index, tdn and index > 0)
    return state


def released_checkpoint(state: dict[str, Tensor]) -> dict:
    """As the authors save it: the state of a module in DataParallel, in a dictionary with other things."""
    head = {"module.new_fc.weight": torch.randn(CLASSES, 32 * WIDTH), "module.new_fc.bias": torch.randn(CLASSES)}
    return {"epoch": 50, "state_dict": {f"module.base_model.{key}": value for key, value in state.items()} | head}


def scores_of(features: Tensor, checkpoint: dict) -> Tensor:
    head = checkpoint["state_dict"]
    scores = features.mean((2, 3)) @ head["module.new_fc.weight"].T + head["module.new_fc.bias"]
    return scores.unflatten(0, (-1, T)).mean(1)


def test_released_tsm():
    state = released_state(2, bias=False, tdn=False)
    checkpoint = released_checkpoint(state)
    model = small("tsm").eval()
    load_released_weights(model, checkpoint)
    (x,) = input_of("tsm", model)
    plain = {key.replace(".net", ""): value for key, value in state.items()}
    features = restated_resnet(plain, restated_stem(plain, x.flatten(0, 1)), shift=shifted)
    torch.testing.assert_close(model(x), scores_of(features, checkpoint), rtol=1e-3, atol=1e-4)


def released_l_tdm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """The released module and its temporal convolution, restated on whole clips."""
    mse = f"{name}.mse"
    z = norm(state, f"{mse}.bn1", conv(state, f"{mse}.conv1", x))
    moved = conv(state, f"{mse}.conv2", z, padding=1, groups=z.size(1)).unflatten(0, (-1, T))
    z = z.unflatten(0, (-1, T))
    forward, backward = torch.zeros_like(z), torch.zeros_like(z)
    forward[:, :-1], backward[:, 1:] = moved[:, 1:] - z[:, :-1], moved[:, :-1] - z[:, 1:]
    attention = []
    for d in (forward.flatten(0, 1), backward.flatten(0, 1)):
        coarse = norm(
            state, f"{mse}.bn3_smallscale2", conv(state, f"{mse}.conv3_smallscale2", F.avg_pool2d(d, 2), padding=1)
        )
        fine = norm(state, f"{mse}.bn3_smallscale4", conv(state, f"{mse}.conv3_smallscale4", d, padding=1))
        mean = (d + F.interpolate(coarse, d.shape[2:]) + fine) / 3
        attention.append(torch.sigmoid(norm(state, f"{mse}.bn3", conv(state, f"{mse}.conv3", mean))) - 0.5)
    x = x + x * (attention[0] / 2 + attention[1] / 2)
    pixels = x.unflatten(0, (-1, T)).permute(0, 3, 4, 2, 1).flatten(0, 2)  # [N*H*W, C, T]
    weight = state[f"{name}.shift.conv.weight"]
    pixels = F.conv1d(pixels, weight, padding=1, groups=len(weight))
    return pixels.unflatten(0, (-1, *x.shape[2:])).permute(0, 4, 3, 1, 2).flatten(0, 1)


def test_released_tdn():
    state = released_state(2, bias=True, tdn=True)
    checkpoint = released_checkpoint(state)
    model = small("tdn").eval()
    load_released_weights(model, checkpoint)
    (x,) = input_of("tdn", model)

    frames = x.flatten(0, 1).split(3, 1)
    differences = torch.cat([b - a for a, b in itertools.pairwise(frames)], 1)
    motion = restated_stem(state, F.avg_pool2d(differences, 2), "conv1_5.0", "conv1_5.1")
    y = restated_stem(state, frames[2])
    y = 0.75 * y + 0.25 * F.interpolate(motion, y.shape[2:])
    for place in range(2):
        motion = restated_block(state, f"resnext_layer1.{place}", motion, 1)
        y = restated_block(state, f"layer1_bak.{place}", y, 1)
    y = 0.75 * y + 0.25 * F.interpolate(motion, y.shape[2:])
    for stage in (2, 3, 4):
        for place in range(2):
            name, stride = f"layer{stage}_bak.{place}", 2 if place == 0 else 1
            y = restated_block(state, name, y, stride, before=lambda name, y: released_l_tdm(state, name, y))
    torch.testing.assert_close(model(x), scores_of(y, checkpoint), rtol=1e-3, atol=1e-4)


def test_load_released_weights_says_what_does_not_fit():
    tsm, tdn = released_state(2, bias=False, tdn=False), released_state(2, bias=True, tdn=True)
    with pytest.raises(ValueError, match=r"no released weights of this TDN: missing: .*; unknown: .*net"):
        load_released_weights(small("tdn"), released_checkpoint(tsm))
    with pytest.raises(ValueError, match=r"no released weights of this TSM: missing: .*; unknown: conv1.bias"):
        load_released_weights(small("tsm"), released_checkpoint(tdn))
    checkpoint = released_checkpoint(tdn)
    with pytest.raises(ValueError, match=r"of another shape: fc.weight \[5, 512\] instead of \[9, 512\]"):
        model = create_model("tdn", 9, n_segment=T, layers=LAYERS, width=WIDTH)
        load_released_weights(model, checkpoint)
    del checkpoint["state_dict"]["module.base_model.layer2_bak.0.bn1.running_mean"]
    with pytest.raises(ValueError, match=r"missing: layer2.0.bn1.running_mean; unknown: layer2.0.conv1.bias$"):
        load_released_weights(small("tdn"), checkpoint)
    for name in ("convfoo.bias", "layer2_bak.0.conv9.bias"):
        checkpoint = released_checkpoint(tdn)
        checkpoint["state_dict"][f"module.base_model.{name}"] = torch.zeros(1)
        with pytest.raises(ValueError, match=f"unknown: .*{name.rpartition('.')[0].rpartition('.')[2]}.bias"):
            load_released_weights(small("tdn"), checkpoint)
    with pytest.raises(ValueError, match=r"no released weights of this TSN: missing: .*conv1.weight.*; unknown: .*net"):
        load_released_weights(small("tsn"), released_checkpoint(tsm))
    plain = {name.replace(".net.", "."): x for name, x in released_checkpoint(tsm)["state_dict"].items()}
    load_released_weights(small("tsn"), plain)
    with pytest.raises(ValueError, match=r"no released weights of this TSM: missing: .*net.weight"):
        load_released_weights(small("tsm"), plain)
    with pytest.raises(TypeError, match="must be a TSN, TSM or TDN, whose weights are published, got GST"):
        load_released_weights(small("gst"), checkpoint)


@pytest.mark.parametrize("load", (load_backbone, load_released_weights))
def test_loaders_take_mappings_of_names_to_tensors(load):
    for wrong in (None, [1], "file.pth", {"fc.weight": 1.0}, {1: torch.zeros(1)}):
        with pytest.raises(TypeError, match="state_dict must be a mapping of names to tensors"):
            load(small("tsn"), wrong)
    with pytest.raises(TypeError, match="model must be"):
        load(torch.nn.Linear(1, 1), {})


@pytest.mark.parametrize("name", ("tdn", "menet"))
def test_export_takes_any_number_of_clips(name):
    model = small(name).eval()
    x = input_of(name, model)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, x, dynamic_shapes=tuple({0: batch} for _ in x)).module()
    for clips in (1, 3):
        x = input_of(name, model, clips)
        torch.testing.assert_close(program(*x), model(*x))
