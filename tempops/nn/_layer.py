"""What the layers share: T, the number of frames of a clip, which may change after construction."""

import torch
from torch import Tensor, nn

from ..ops._contract import check_int


class TemporalLayer(nn.Module):
    """A layer that reads across the frames of a clip: ``[N*T, C, H, W]``, T of them adjacent, T being `n_segment`.

    Further arguments go to the next class, so that a layer may be a convolution, too.
    """

    least_segments = 1  # the least T
    depends_on_segments = False  # whether a parameter's shape depends on T

    def __init__(self, n_segment: int, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        check_int("n_segment", n_segment, least=self.least_segments)
        self.n_segment = n_segment

    def check_segments(self, n_segment: int) -> None:
        """Raises ValueError where T can not become `n_segment`."""
        check_int("n_segment", n_segment, least=self.least_segments)
        if self.depends_on_segments and n_segment != self.n_segment:
            raise ValueError(
                f"n_segment={n_segment} does not fit the parameters of {type(self).__name__}, "
                f"whose shapes depend on T and were made for n_segment={self.n_segment}"
            )

    def split(self, x: Tensor) -> Tensor:
        """``[N*T, ...]`` as ``[N, T, ...]``."""
        if x.size(0) % self.n_segment != 0:
            raise ValueError(f"n_segment={self.n_segment} does not divide {x.size(0)} frames")
        return x.unflatten(0, (x.size(0) // self.n_segment, self.n_segment))

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), f"n_segment={self.n_segment}")))


class ChannelGate(TemporalLayer):
    """A layer that multiplies each frame's channels with weights made from the clip's pooled frames."""

    def gate(self, x: Tensor) -> Tensor:
        """The weights ``[N*T, C]``, for :func:`tempops.temporal_conv` to multiply in on its way."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)[..., None, None]


class SqueezedGate(ChannelGate):
    """A gate of three linear layers without bias: `w1` and `w2` ``[C/r, C]``, `w3` ``[C, C/r]``, r the `reduction`."""

    def __init__(self, channels: int, n_segment: int, reduction: int = 8) -> None:
        super().__init__(n_segment)
        self.w1 = nn.Linear(channels, reduced(channels, reduction), bias=False)
        self.w2 = nn.Linear(channels, reduced(channels, reduction), bias=False)
        self.w3 = nn.Linear(reduced(channels, reduction), channels, bias=False)


def set_segments(model: nn.Module, n_segment: int) -> None:
    """Gives every temporal layer of a module another T; where one can not have it, ValueError and nothing changes.

    Models of `tempops.models` have a method of this name, which knows the layers whose T is not the clip's.
    """
    check_int("n_segment", n_segment, least=1)
    layers = [module for module in model.modules() if isinstance(module, TemporalLayer)]
    for layer in layers:
        layer.check_segments(n_segment)
    for layer in layers:
        layer.n_segment = n_segment


def reduced(channels: int, reduction: int) -> int:
    """C/r, at least 1."""
    check_int("reduction", reduction, least=1)
    return max(1, channels // reduction)


def factor_and_offset(bn: nn.Module) -> tuple[Tensor, Tensor] | None:
    """What a batch normalisation multiplies each channel with and adds to it, at least in float32.

    None where it does something else: in training, without statistics or parameters, or where it `is_watched`.
    """
    if bn.training or is_watched(bn, nn.BatchNorm2d):
        return None
    tensors = bn.running_mean, bn.running_var, bn.weight, bn.bias
    if any(x is None for x in tensors):
        return None
    mean, var, weight, bias = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)
    factor = weight * (var + bn.eps).rsqrt()
    return factor, bias - mean * factor


def normalized_conv(conv: nn.Module, bn: nn.Module, x: Tensor) -> Tensor:
    """``bn(conv(x))``; in evaluation one convolution with the normalisation in its weights: its result is written once.

    Both are called where somebody watches them, or exchanged them for other modules.
    """
    normalization = factor_and_offset(bn)
    if normalization is None or is_watched(conv, nn.Conv2d) or conv.bias is not None:
        return bn(conv(x))
    factor, offset = normalization
    weight = (conv.weight * factor[:, None, None, None]).to(conv.weight.dtype)
    return conv._conv_forward(x, weight, offset.to(weight.dtype))


def is_watched(module: nn.Module, kind: type) -> bool:
    """Whether to call the module is more than to do what its class `kind` does: it has hooks, or is another's."""
    hooked = any(getattr(module, f"_{name}_hooks") for name in ("forward_pre", "forward", "backward_pre", "backward"))
    return hooked or nn.modules.module._has_any_global_hook() or type(module) is not kind or "forward" in vars(module)
