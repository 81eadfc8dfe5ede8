"""Loads weights of image networks and the authors' checkpoints; what does not fit is said before anything changes."""

from collections.abc import Mapping

from torch import Tensor

from ..nn import ShiftConv1x1, TemporalShift
from ._resnet import ResNet
from .menet import MENet
from .tdn import TDN
from .tsm import TSM
from .tsn import TSN


def load_backbone(model: ResNet | MENet, state_dict: Mapping[str, Tensor]) -> None:
    """Initialises a model from an image network of its depth, as its paper does.

    Convolutions that read several frames are inflated (I3D, GST, MENet's stems) or take the weights as their middle
    slice (TEFE's FE); TDN's S-TDM gets the stem averaged over the colours and a copy of stage 2. Layers that an image
    network does not have, and the classifier, keep their values. Where MENet is given the parameters of a trained
    motion branch, ``motion.state_dict()``, they initialise the appearance branch (table 3's transfer).

    Args:
        model: of :func:`create_model`.
        state_dict: with the names of torchvision's ``resnet50``; a classifier is left out.

    Raises:
        TypeError: `model` is none of tempops.models, or `state_dict` no mapping of names to tensors.
        ValueError: parameters are missing, unknown or of another shape; the message names them, nothing is changed.
    """
    _check_state_dict(state_dict)
    if not isinstance(model, (ResNet, MENet)):
        raise TypeError(f"model must be one of tempops.models, got {type(model).__name__}")
    if isinstance(model, MENet):
        trained = {name: x for name, x in state_dict.items() if not name.startswith("enhance.")}
        load_backbone(model.appearance, trained)
        if len(trained) == len(state_dict):
            load_backbone(model.motion, trained)
        return
    expected = model.plain_state()
    weights = {name: x for name, x in state_dict.items() if not name.startswith("fc.")}
    kernel = expected["conv1.weight"]
    stacked = kernel.repeat(1, model.conv1.in_channels // kernel.size(1), 1, 1)  # a stem made for a segment's frames
    if "conv1.weight" in weights and weights["conv1.weight"].shape == stacked.shape:
        expected["conv1.weight"] = stacked
    _check(weights, expected, f"these are no weights of a ResNet-{model.backbone['depth']}")
    model.load_state_dict(model.from_images(weights), strict=False)


def load_released_weights(model: TSN | TSM | TDN, state_dict: Mapping[str, Tensor]) -> None:
    """Loads a checkpoint that the authors of TSM (for TSM and TSN) or TDN published ([R]: their modules' names).

    Args:
        model: built with the checkpoint's depth and number of classes; for another T see `set_segments`.
        state_dict: what ``torch.load`` gives, or its entry ``"state_dict"``.

    Raises:
        TypeError: the authors of the model's paper published no checkpoints, or `state_dict` is none.
        ValueError: parameters are missing, unknown or of another shape; the message names them, nothing is changed.
    """
    _check_state_dict(state_dict)
    if not isinstance(model, (TSN, TSM, TDN)):
        raise TypeError(f"model must be a TSN, TSM or TDN, whose weights are published, got {type(model).__name__}")
    state_dict = state_dict.get("state_dict", state_dict)
    weights = {name.removeprefix("module.").removeprefix("base_model."): x for name, x in state_dict.items()}
    otherwise = f"these are no released weights of this {type(model).__name__}"
    if isinstance(model, TDN):
        state = model.from_released(weights)
        _check(state, model.state_dict(), otherwise)
    else:
        weights = {f"new_{name}" if name.startswith("fc.") else name: x for name, x in weights.items()}
        theirs = {name: _released_name(model, name) for name in model.state_dict()}
        _check(weights, {theirs[name]: x for name, x in model.state_dict().items()}, otherwise)
        state = {name: weights[released] for name, released in theirs.items() if released in weights}
    model.load_state_dict(state, strict=False)


def _released_name(model: TSN | TSM, name: str) -> str:
    """TSM's name of a parameter: a shifted convolution is the `net` of a module of its own."""
    if name.startswith("fc."):
        return f"new_{name}"
    owner, _, leaf = name.rpartition(".")
    block = model.get_submodule(owner.rpartition(".")[0])
    shifts = (ShiftConv1x1, TemporalShift)
    shifted = isinstance(getattr(block, "conv1", None), shifts) or isinstance(
        getattr(block, "before_conv1", None), shifts
    )
    return f"{owner}.net.{leaf}" if shifted and owner.endswith(".conv1") else name


def _check_state_dict(state_dict: object) -> None:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}")
    tensors = state_dict.get("state_dict", state_dict)
    if isinstance(tensors, Mapping) and all(isinstance(name, str) for name in tensors):
        if all(isinstance(x, Tensor) for x in tensors.values()):
            return
    raise TypeError("state_dict must be a mapping of names to tensors: some of its entries are none")


def _check(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], otherwise: str) -> None:
    """Raises ValueError unless both have the same names and shapes, counters of batches aside."""
    missing = [name for name in expected if name not in given and not name.endswith("num_batches_tracked")]
    unknown = [name for name in given if name not in expected]
    shapes = [
        f"{name} {list(x.shape)} instead of {list(expected[name].shape)}"
        for name, x in given.items()
        if name in expected and x.shape != expected[name].shape
    ]
    wrong = {"missing": missing, "unknown": unknown, "of another shape": shapes}
    if any(wrong.values()):
        raise ValueError(
            f"{otherwise}: " + "; ".join(f"{what}: {_few(names)}" for what, names in wrong.items() if names)
        )


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
