"""Small networks of every shape, activation, bound and range, and modules that are no plain MLP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import kaleido_fast as kf

Network = Callable[[], Any]  # makes a module, or gives the name of a checkpoint


def random_network(
    *widths: int, scale: float = 1.5, layer_scales: tuple[float, ...] = (), **spec: Any
) -> kf.KaleidoMLP:
    """Seeded weights, large enough that the recursion moves; ``layer_scales`` multiply those of single layers."""
    generator = torch.Generator().manual_seed(sum(widths))
    model = kf.KaleidoMLP(kf.ModelSpec(widths, **spec))
    with torch.no_grad():
        for layer, more in zip(model.linears, layer_scales or (1.0,) * len(model.linears), strict=True):
            layer.weight.normal_(0, more * scale / layer.in_features**0.5, generator=generator)
            if layer.bias is not None:
                layer.bias.normal_(0, 0.3, generator=generator)
    return model.eval()


def linear_map(*rows: tuple[float, ...]) -> kf.KaleidoMLP:
    """x -> tanh(W x): of permutations with signs the cycles are known."""
    model = kf.KaleidoMLP(kf.ModelSpec((len(rows), len(rows)), bias=(False,)))
    with torch.no_grad():
        model.linears[0].weight.copy_(torch.tensor(rows))
    return model.eval()


class Residual(nn.Module):
    """A block that is no plain MLP, with answers inside [-1, 1]; its source is a part of its hash."""

    def __init__(self, widen: nn.Module, narrow: nn.Module) -> None:
        super().__init__()
        self.widen, self.narrow = widen, narrow

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * x + 1.5 * self.narrow(torch.relu(self.widen(x))))


def residual() -> nn.Module:
    return Residual(*random_network(6, 16, 6, scale=2.0).linears)


def around_mlp() -> nn.Module:
    """A module of the caller with a `KaleidoMLP` inside: its hash tells what that is called and where it lies."""
    return Residual(random_network(6, 16, 6), random_network(6, 6).linears[0])


def sequential() -> nn.Module:
    layers = random_network(6, 11, 6).linears
    return nn.Sequential(layers[0], nn.GELU(), layers[1], nn.Sigmoid())


def normed() -> nn.Module:
    model = random_network(6, 11, 6)
    for layer in model.linears:
        torch.nn.utils.parametrizations.weight_norm(layer)
    return model


def not_finite() -> nn.Module:
    model = random_network(6, 11, 6)
    with torch.no_grad():
        model.linears[0].weight[0, 0] = torch.nan
    return model


SHAPES: dict[str, Network] = {
    "tiny": partial(random_network, 2, 3, 2),
    "small": partial(random_network, 6, 11, 13, 6, sample_shape=(2, 3)),
    "bottleneck": partial(random_network, 12, 32, 4, 32, 12),
    "unequal": partial(random_network, 5, 17, 40, 9, 5),
    "deep": partial(random_network, 4, *[16] * 12, 4),
    "one-layer": partial(random_network, 3, 3),
    "one-value": partial(random_network, 1, 24, 24, 1, scale=3.0),
    "no-bias": partial(random_network, 6, 20, 20, 6, bias=False),
    "some-bias": partial(random_network, 6, 20, 20, 6, bias=(True, False, True)),
    "sigmoid": partial(random_network, 6, 20, 6, bound="sigmoid"),
    "sigmoid-part": partial(random_network, 6, 20, 6, bound="sigmoid", low=0.2, high=0.7),
    "tanh-part": partial(random_network, 6, 20, 6, low=-0.25, high=0.75),
    "steep-leak": partial(random_network, 6, 20, 6, activation="leaky_relu", negative_slope=0.3),
    **{
        name: partial(random_network, 7, 19, 19, 7, activation=name)
        for name in ("relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "tanh")
    },
}
LARGER: dict[str, Network] = {
    "wide300": partial(random_network, 20, 300, 300, 20),
    "even128": partial(random_network, 64, 128, 128, 128, 64),
    "faint-layer": partial(random_network, 64, 128, 128, 128, 64, layer_scales=(1.0, 1e-6, 1.0, 1.0)),
    "past-fp16": partial(random_network, 6, 20, 20, 6, layer_scales=(1.0, 1e6, 1.0)),
    "overflow": partial(random_network, 6, 20, 20, 6, layer_scales=(1e30, 1e30, 1e30)),
}
CYCLING: dict[str, Network] = {
    "flip": partial(linear_map, (-2.0, 0.0), (0.0, -2.0)),
    "turn": partial(linear_map, (0.0, -2.0), (2.0, 0.0)),
    "three": partial(linear_map, (0.0, 2.0, 0.0), (0.0, 0.0, 2.0), (2.0, 0.0, 0.0)),
}
NETWORKS = {**SHAPES, **LARGER, **CYCLING}


def given_states(model: Any, n_chains: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    spec = model.spec
    return torch.rand(n_chains, spec.dim, generator=generator) * (spec.high - spec.low) + spec.low
