"""The ResNet that the papers change: torchvision's parameter names, and a place for a layer before each convolution."""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import set_segments
from ..ops._contract import check_choice, check_int, check_tensor


class BasicBlock(nn.Module):
    """ResNet-18's and -34's block; see :class:`Bottleneck`."""

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.planes = planes
        self.before_conv1 = nn.Identity()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.before_conv2 = nn.Identity()
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _projection(inplanes, planes, stride)
        self.after_block = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(self.before_conv1(x))))
        y = self.bn2(self.conv2(self.before_conv2(y)))
        y += x if self.downsample is None else self.downsample(x)
        return self.after_block(self.relu(y))


class Bottleneck(nn.Module):
    """ResNet-50's and -101's block, the stride in the 3x3 convolution.

    A paper's layer goes to `before_conv1` (the input of the residual branch alone), `before_conv2`, `before_conv3` or
    `after_block` (after the sum and its ReLU), or takes the place of a convolution.
    """

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.planes = planes
        self.before_conv1 = nn.Identity()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.before_conv2 = nn.Identity()
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.before_conv3 = nn.Identity()
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _projection(inplanes, 4 * planes, stride)
        self.after_block = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(self.before_conv1(x))))
        y = self.relu(self.bn2(self.conv2(self.before_conv2(y))))
        y = self.bn3(self.conv3(self.before_conv3(y)))
        y += x if self.downsample is None else self.downsample(x)
        return self.after_block(self.relu(y))


def _projection(inplanes: int, outplanes: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inplanes == outplanes:
        return None
    return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes))


ARCHITECTURES = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}


def check_stages(name: str, counts: object, least: int = 0) -> tuple[int, ...]:
    """`counts` as a tuple; raises unless it is one integer for each of the four stages, none below `least`."""
    if not isinstance(counts, Iterable):
        raise TypeError(f"{name} must be 4 ints, one a stage, got {type(counts).__name__}")
    counts = tuple(counts)
    if len(counts) != 4:
        raise ValueError(f"{name} must be 4 ints, one a stage, got {counts}")
    for i, count in enumerate(counts):
        check_int(f"{name}[{i}]", count, least=least)
    return counts


class ResNet(nn.Module):
    """A ResNet that classifies clips: the mean of its segments' scores.

    Args:
        num_classes: the scores of a clip.
        n_segment: T, the segments of a clip; see `set_segments`.
        depth: 50 or 101, or 18 or 34 where the paper's layers fit their blocks.
        layers: the blocks of each stage, for another size than the depth's.
        width: the channels after the first convolution.
        frames: the consecutive frames of a segment, stacked in its channels.
        dropout: before the classifier, in training.

    `forward` takes ``[N, T, 3*frames, H, W]`` of any height and width and returns ``[N, num_classes]``, before softmax.
    """

    depths = (18, 34, 50, 101)  # those whose blocks the paper's layers fit

    def __init__(
        self,
        num_classes: int,
        n_segment: int = 8,
        *,
        depth: int = 50,
        layers: Sequence[int] | None = None,
        width: int = 64,
        frames: int = 1,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        check_int("num_classes", num_classes, least=1)
        check_int("n_segment", n_segment, least=1)
        check_int("width", width, least=1)
        check_int("frames", frames, least=1)
        check_choice("depth", depth, self.depths)
        self.n_segment = n_segment
        self.in_channels = 3 * frames
        self.block, default_layers = ARCHITECTURES[depth]
        layers = default_layers if layers is None else check_stages("layers", layers, least=1)
        self.backbone = {"depth": depth, "layers": layers, "width": width}
        widths = [width * 2**i for i in range(4)]
        inputs = [width, *(self.block.expansion * w for w in widths)]
        self.conv1 = nn.Conv2d(self.in_channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for i, (planes, blocks) in enumerate(zip(widths, layers)):
            setattr(self, f"layer{i + 1}", self._stage(inputs[i], planes, blocks, stride=1 if i == 0 else 2))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(inputs[4], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(self, inplanes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [self.block(self.block.expansion * planes, planes, 1) for _ in range(blocks - 1)]
        return nn.Sequential(self.block(inplanes, planes, stride), *rest)

    @property
    def stages(self) -> list[nn.Sequential]:
        """Stages 2 to 5, as the papers count: the stem is stage 1."""
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def blocks(self) -> Iterator[tuple[int, int, nn.Module]]:
        """(stage, place in the stage, block) for every block; stages from 2 to 5, places from 0."""
        for stage, blocks in enumerate(self.stages, 2):
            for place, block in enumerate(blocks):
                yield stage, place, block

    def set_segments(self, n_segment: int) -> None:
        """Makes clips of `n_segment` segments the input from now on.

        Raises:
            ValueError: shapes of parameters depend on T (TEFE); nothing is changed.
        """
        set_segments(self, n_segment)
        self.n_segment = n_segment

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        return self.head(self.features(x.flatten(0, 1)), x.size(0))

    def check(self, x: Tensor, name: str = "x") -> None:
        check_tensor(name, x)
        if x.dim() != 5 or x.size(2) != self.in_channels:
            expected = f"[N, T, {self.in_channels}, H, W]"
            raise ValueError(f"{name} must be {expected}, got {x.dim()}-D {list(x.shape)}")
        if x.size(1) != self.n_segment:
            raise ValueError(
                f"{name} must have n_segment={self.n_segment} segments a clip, got {x.size(1)}; "
                f"model.set_segments({x.size(1)}) makes that the number"
            )

    def stem(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))

    def features(self, x: Tensor) -> Tensor:
        """The last stage's activations for ``[N*T, 3*frames, H, W]``."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return x

    def head(self, x: Tensor, clips: int) -> Tensor:
        """The scores of the clips whose segments' activations x are."""
        scores = self.fc(self.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1)))
        return scores.unflatten(0, (clips, scores.size(0) // max(clips, 1))).mean(1)

    def plain_state(self) -> dict[str, Tensor]:
        """An image network of this depth without its classifier: names and shapes, on the meta device."""
        with torch.device("meta"):
            network = ResNet(1, 1, **self.backbone)
        return {name: x for name, x in network.state_dict().items() if not name.startswith("fc.")}

    def from_images(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """This model's parameters for those of an image network: each layer says what it makes of a convolution's."""
        state = {}
        for name, tensor in weights.items():
            owner, _, leaf = name.rpartition(".")
            module = self.get_submodule(owner)
            if hasattr(module, "from_2d") and leaf == "weight":
                state |= {f"{owner}.{of}": value for of, value in module.from_2d(tensor).items()}
            elif name == "conv1.weight" and tensor.size(1) != self.conv1.in_channels:
                # The frames of a segment share the image's kernel, as I3D inflates (MENet).
                frames = self.conv1.in_channels // tensor.size(1)
                state[name] = (tensor / frames).repeat(1, frames, 1, 1)
            else:
                state[name] = tensor
        return state
