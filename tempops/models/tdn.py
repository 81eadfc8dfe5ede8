"""TDN: "Temporal Difference Networks for Action Recognition" (paper 004)."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..nn import LongTermTDM, ShortTermTDM, TemporalInteraction
from ._resnet import ResNet

STAGES = (1, 2, 3, 4, 5)


class TDN(ResNet):
    """S-TDM at the stem and after stage 2, L-TDM and a temporal convolution in every block of stages 3 to 5 ([P]).

    35.6 G multiply-adds (224x224, 8 frames, ResNet-50; published: 36), 24.4 M parameters (174 classes). `forward` takes
    5 consecutive frames a segment, ``[N, T, 15, H, W]``. L-TDM and the temporal convolution, one kernel a channel that
    starts as TIM does, stand between the first and the second convolution of a block [R]. S-TDM's features are enlarged
    and added, see :class:`tempops.nn.ShortTermTDM`; after the stem they go through a copy of stage 2 [R].
    `load_released_weights` loads the authors' checkpoints.

    Args:
        variant: ``"released"`` or ``"paper"``; see :class:`tempops.nn.LongTermTDM`.
        short_stages: the stages, from 1 on, whose output S-TDM is added to (table 5). [D]: each has a copy of its own.
        long_stages: the stages from 2 on whose blocks have L-TDM; these and 3 to 5 have the temporal convolution.
    """

    depths = (50, 101)

    def __init__(
        self,
        num_classes: int,
        n_segment: int = 8,
        *,
        variant: str = "released",
        short_stages: Sequence[int] = (1, 2),
        long_stages: Sequence[int] = (3, 4, 5),
        **backbone,
    ) -> None:
        super().__init__(num_classes, n_segment, **backbone)
        if self.in_channels != 3:
            raise ValueError(f"frames can not be chosen: S-TDM takes 5 a segment, got {self.in_channels // 3}")
        if tuple(short_stages) != STAGES[: len(short_stages)]:
            raise ValueError(f"short_stages must be the first of {STAGES}, got {tuple(short_stages)}")
        if not set(long_stages) <= set(STAGES[1:]):
            raise ValueError(f"long_stages must be of {STAGES[1:]}, got {tuple(long_stages)}")
        self.frames = 5
        self.in_channels = 3 * self.frames
        self.short = ShortTermTDM(self.conv1.out_channels, n_segment, self.frames, variant) if short_stages else None
        self.short_stages = nn.ModuleList(
            self._stage(stage[0].conv1.in_channels, stage[0].planes, len(stage), stage[0].conv2.stride[0])
            for stage in self.stages[: max(len(short_stages) - 1, 0)]
        )
        for stage, _, block in self.blocks():
            channels = block.conv2.in_channels
            if stage in long_stages:
                tdm = LongTermTDM(channels, n_segment, variant=variant)
                block.before_conv2 = nn.Sequential(tdm, TemporalInteraction(channels, n_segment))
            elif stage > 2:
                block.before_conv2 = TemporalInteraction(channels, n_segment)

    def features(self, x: Tensor) -> Tensor:
        y = self.stem(x.unflatten(1, (self.frames, 3))[:, self.frames // 2])
        if self.short is not None:
            motion = self.short(x)
            y = self.short.fuse(y, motion)
        for i, stage in enumerate(self.stages):
            y = stage(y)
            if i < len(self.short_stages):
                motion = self.short_stages[i](motion)
                y = self.short.fuse(y, motion)
        return y

    def from_images(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """S-TDM's stem is the mean of the image network's over its colours, its further layers are copies ([R])."""
        state = super().from_images(weights)
        if self.short is not None:
            kernel = weights["conv1.weight"]
            state["short.conv.weight"] = kernel.mean(1, keepdim=True).expand(-1, self.short.conv.in_channels, -1, -1)
        for i in range(len(self.short_stages)):
            prefix = f"layer{i + 1}."
            own = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
            state |= {f"short_stages.{i}.{name}": x for name, x in own.items()}
        return state

    def from_released(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """This model's parameters for those of the authors' checkpoint, without ``module.`` and ``base_model.``.

        Their convolutions have biases; they go into the running mean of the batch normalisation that follows.
        """
        weights = {name: x for name, x in weights.items() if not name.startswith("conv1_temp")}
        state = {}
        for name, tensor in weights.items():
            mean = weights.get(_followed_by(name))
            if mean is not None and mean.shape == tensor.shape:
                state[_renamed(_followed_by(name))] = mean - tensor
                continue
            renamed = _renamed(name)
            if renamed.endswith("conv.weight") and tensor.dim() == 3:
                renamed, tensor = renamed.replace(".conv.weight", ".weight"), tensor.squeeze(1)
            state.setdefault(renamed, tensor)  # a mean may have got its bias before
        return state


# Prefixes and parts of the authors' names, and ours.
RELEASED = {
    "new_fc.": "fc.",
    "conv1_5.0.": "short.conv.",
    "conv1_5.1.": "short.bn.",
    "resnext_layer1.": "short_stages.0.",
    "layer1_bak.": "layer1.",
    "layer2_bak.": "layer2.",
    "layer3_bak.": "layer3.",
    "layer4_bak.": "layer4.",
    ".mse.conv1.": ".before_conv2.0.squeeze.",
    ".mse.bn1.": ".before_conv2.0.squeeze_bn.",
    ".mse.conv2.": ".before_conv2.0.align.",
    ".mse.conv3.": ".before_conv2.0.expand.",
    ".mse.bn3.": ".before_conv2.0.expand_bn.",
    ".mse.conv3_smallscale2.": ".before_conv2.0.coarse.",
    ".mse.bn3_smallscale2.": ".before_conv2.0.coarse_bn.",
    ".mse.conv3_smallscale4.": ".before_conv2.0.fine.",
    ".mse.bn3_smallscale4.": ".before_conv2.0.fine_bn.",
    ".shift.": ".before_conv2.1.",
}


def _renamed(name: str) -> str:
    for theirs, ours in RELEASED.items():
        if name.startswith(theirs) or (theirs.startswith(".") and theirs in name):
            name = name.replace(theirs, ours, 1)
    return name


def _followed_by(name: str) -> str | None:
    """The running mean that takes a convolution's bias; None for any other parameter."""
    owner, _, leaf = name.rpartition(".")
    before, _, conv = owner.rpartition(".")
    if leaf != "bias" or not (conv.startswith("conv") or owner.endswith("downsample.0")):
        return None
    norm = "1" if conv == "0" else conv.replace("conv", "bn")
    return ".".join(filter(None, (before, norm, "running_mean")))
