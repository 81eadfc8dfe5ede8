"""The networks of the papers, one file a paper, on one ResNet.

Their docstrings count the multiply-adds of convolutions and matrix products, as the papers do; those of the temporal
ops, a few for each value that they read, are not in them.
"""

from torch import nn

from ..ops._contract import check_choice
from ._resnet import ResNet
from ._weights import load_backbone, load_released_weights
from .cmr import CMR
from .gst import GST
from .gte import GTE
from .i3d import I3D
from .menet import MENet
from .stm import STM
from .tdn import TDN
from .tdrl import TDRL
from .tefe import TEFE
from .teinet import TEINet
from .tsm import TSM
from .tsn import TSN

MODELS = {
    model.__name__.lower(): model for model in (CMR, GST, GTE, I3D, MENet, STM, TDN, TDRL, TEFE, TEINet, TSM, TSN)
}

__all__ = [
    *(model.__name__ for model in MODELS.values()),
    "ResNet",
    "create_model",
    "list_models",
    "load_backbone",
    "load_released_weights",
]


def list_models() -> list[str]:
    """The names that :func:`create_model` takes."""
    return sorted(MODELS)


def create_model(name: str, num_classes: int, **options) -> nn.Module:
    """Makes a network by its name, with random weights; :func:`load_backbone` gives it those of an image network.

    Args:
        name: one of :func:`list_models`.
        num_classes: the scores of a clip.
        options: ``n_segment``, by default 8, for ``"i3d"`` 32; ``depth``, ``layers``, ``width`` and ``dropout`` of
            :class:`ResNet`; and what the docstring of the model's class names.

    Returns:
        A module in training mode that takes ``[N, T, 3, H, W]`` (``"tdn"``: ``[N, T, 15, H, W]``; ``"menet"``: two
        tensors, see :class:`MENet`) and returns ``[N, num_classes]``, the mean over the segments, before softmax.

    Raises:
        ValueError: unknown name, or an option out of range.
        TypeError: unknown option.
    """
    check_choice("name", name, list_models())
    return MODELS[name](num_classes, **options)
