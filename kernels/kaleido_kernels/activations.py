"""Hidden activations: names, what torch calls them, and what plans ask of them. Plain Python: no torch, no Triton.

The device form of each is a branch of `kaleido_kernels.steps.hidden_activation`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple


class Activation(NamedTuple):
    """A hidden activation.

    Args:
        function: torch's, as "torch.tanh".
        module: torch's class in ``torch.nn``; empty where another activation's class stands for this one as well.
        options: of the function.
        keeps_one: whether it keeps 1 at 1, so that columns of ones pass it.
        bends: whether it is more than a maximum and a product, and takes registers on the way.
        on_cpu: whether the loops of the CPU engine have it.
    """

    function: str
    module: str
    options: tuple[tuple[str, Any], ...] = ()
    keeps_one: bool = False
    bends: bool = True
    on_cpu: bool = True


ACTIVATIONS = {
    "relu": Activation("torch.nn.functional.relu", "ReLU", keeps_one=True, bends=False),
    "leaky_relu": Activation("torch.nn.functional.leaky_relu", "LeakyReLU", keeps_one=True, bends=False),
    "gelu": Activation("torch.nn.functional.gelu", "GELU"),
    "gelu_tanh": Activation("torch.nn.functional.gelu", "", (("approximate", "tanh"),)),
    "silu": Activation("torch.nn.functional.silu", "SiLU"),
    "tanh": Activation("torch.tanh", "Tanh"),
}


def torch_function(name: str) -> Callable[..., Any]:
    """Torch's function for one of `ACTIVATIONS`; imports torch."""
    import torch

    activation, found = ACTIVATIONS[name], torch
    for part in activation.function.split(".")[1:]:
        found = getattr(found, part)
    function: Callable[..., Any] = found  # type: ignore[assignment]
    return partial(function, **dict(activation.options)) if activation.options else function
