"""Loads weights of image networks and the authors' checkpoints; what does not fit is said before anything changes."""

from collections.abc import Mapping

from torch import Tensor

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
        ValueError: parameters are missing, unknown or of another shape; the message names them, nothing is changed.
    """
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
        TypeError: the authors of the model's paper published no checkpoints.
        ValueError: parameters are missing, unknown or of another shape; the message names them, nothing is changed.
    """
    if not isinstance(model, (TSN, TSM, TDN)):
        raise TypeError(f"model must be a TSN, TSM or TDN, whose weights are published, got {type(model).__name__}")
    state_dict = state_dict.get("state_dict", state_dict)
    weights = {name.removeprefix("module.").removeprefix("base_model."): x for name, x in state_dict.items()}
    if isinstance(model, TDN):
        state = model.from_released(weights)
    else:
        state = {name.replace(".net.", ".").replace("new_fc.", "fc."): x for name, x in weights.items()}
    _check(state, model.state_dict(), f"these are no released weights of this {type(model).__name__}")
    model.load_state_dict(state, strict=False)


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
