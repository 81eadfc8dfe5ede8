"""TDRL: Weng et al., "Temporal Distinct Representation Learning for Action Recognition"."""

import torch
from torch import Tensor, nn

from ._layer import ChannelGate, reduced


class ProgressiveEnhancement(ChannelGate):
    r"""PEM: channels are weighed by a memory of the differences of the frames so far.

    .. math::
        o_t = S \bar x_{t+1} - S \bar x_t, \quad \alpha_t = \sigma(F [z_{t-1}, o_t]), \quad
        z_t = (1 - \alpha_t) \circ z_{t-1} + \alpha_t \circ o_t, \quad u_t = \sigma(W z_t) \circ x_t

    where :math:`\bar x` is the global average pool ([P], TDRL). The recurrence is serial in t. [D]: one linear layer F
    gives an :math:`\alpha` for each of the C/r channels, :math:`o_{T-1} = 0`, :math:`z_{-1} = 0`, r as in MEM and CME.

    Args:
        channels: C.
        n_segment: T.
        reduction: r.
    """

    def __init__(self, channels: int, n_segment: int, reduction: int = 8) -> None:
        super().__init__(n_segment)
        squeezed = reduced(channels, reduction)
        self.squeeze = nn.Linear(channels, squeezed, bias=False)
        self.update = nn.Linear(2 * squeezed, squeezed)
        self.expand = nn.Linear(squeezed, channels, bias=False)

    def gate(self, x: Tensor) -> Tensor:
        frames = self.squeeze(self.split(x.mean((2, 3)))).unbind(1)
        memory = torch.zeros_like(frames[0])
        memories = []
        for this, following in zip(frames, (*frames[1:], frames[-1])):
            difference = following - this
            alpha = self.update(torch.cat((memory, difference), 1)).sigmoid()
            memory = memory + alpha * (difference - memory)
            memories.append(memory)
        return self.expand(torch.stack(memories, 1).flatten(0, 1)).sigmoid()
