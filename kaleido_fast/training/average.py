"""An average of the weights over the last steps of a training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EVERY = 10  # steps between additions, after as many first ones: at each step it took a tenth of the time of a training


class WeightAverage:
    """Exponential moving average of weights: what is measured, kept and stored in their place.

    The newest weights get a share of (1 - d^k) / (1 - d^t) at step t, k steps after the last addition, which is 1 at
    the first: the random weights of the start have no part in it (the correction of Adam, Kingma and Ba 2015).

    Args:
        model: whose weights are averaged.
        decay: d, from 0 to below 1; about the last 1 / (1 - d) steps count.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}

    def add(self, model: nn.Module, step: int) -> None:
        """Take the weights after step 1, 2, ... in, where it is their turn."""
        since = 1 if step <= EVERY else EVERY
        if step % since:
            return
        share = (1 - self.decay**since) / (1 - self.decay**step)
        newest: list[Tensor] = [parameter.detach() for parameter in model.parameters()]
        torch._foreach_lerp_(list(self.tensors.values()), newest, share)
