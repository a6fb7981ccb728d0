"""The weights that a training starts from."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from kaleido_fast.evaluating.diagnostics import evenly
from kaleido_fast.model import KaleidoMLP

_EXAMPLES, _VALUES = 2048, 1 << 23  # at most, in examples whose principal directions are taken
_LEAST_SLOPE = 0.1  # of a pair; weights are divided by it


def initialise(model: KaleidoMLP, init: str, generator: torch.Generator, data: Tensor) -> None:
    """Draw all weights on the CPU, the same ones for every device; principal directions agree to rounding.

    Args:
        model: gets the weights.
        init: "kaiming", "default" or "principal", as `kaleido_fast.presets.TrainingRecipe` has them.
        generator: of the weights.
        data: training examples (n, D); only "principal" looks at them.
    """
    hidden: Literal["relu", "tanh"] = "tanh" if model.spec.activation == "tanh" else "relu"
    for i, layer in enumerate(model.linears):
        weight = torch.empty(layer.weight.shape)
        bias_limit = 0.0
        if init == "default":  # torch's own: uniform within 1 / sqrt(inputs), weights and biases alike
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
            bias_limit = 1 / math.sqrt(weight.shape[1])
        else:
            last = i == len(model.linears) - 1
            nn.init.kaiming_normal_(weight, nonlinearity="linear" if last else hidden, generator=generator)
        with torch.no_grad():
            layer.weight.copy_(weight)
            if layer.bias is not None:
                layer.bias.copy_((torch.rand(layer.bias.shape, generator=generator) * 2 - 1) * bias_limit)
    if init == "principal":
        n = min(_EXAMPLES, max(2, _VALUES // data.shape[1]))
        look_linear(model, evenly(data, n).cpu(), generator)


@torch.no_grad()
def look_linear(model: KaleidoMLP, data: Tensor, generator: torch.Generator) -> None:
    """Set weights so that the network, before its bound, projects its input onto principal directions of the data.

    Hidden units are pairs (z, -z). For ReLU, SiLU and GELU alike a(z) - a(-z) = z, so that what the next layer takes
    from a pair is linear however deep the network is (looks-linear initialisation: Balduzzi et al. 2017, "The shattered
    gradients problem"). Each layer but the first has a random rotation. As many directions go through as the narrowest
    hidden layer has pairs, all D if it has so many. The last unit of an odd width keeps its weights, unheard at the
    start; a network without hidden layers, with one of a single unit, or with an even activation (leaky_relu of slope
    -1) keeps all of its weights.

    Args:
        model: its weights are changed. Hidden tanh is linear near 0 only.
        data: examples (n, D).
        generator: of the rotations.
    """
    pairs = [width // 2 for width in model.spec.widths[1:-1]]
    small = torch.tensor(0.01)
    slope = float((model.activate(small) - model.activate(-small)) / small)
    if not pairs or min(pairs) == 0 or abs(slope) < _LEAST_SLOPE:
        return
    kept = min(*pairs, model.spec.dim)
    spreads = [orthogonal(n, kept, generator) for n in pairs]  # of the kept values over the pairs of a layer
    if pairs[0] == kept:
        spreads[0] = torch.eye(kept)
    first, *middle, last = model.linears
    known = directions(data, kept, generator)
    into = spreads[0] @ known
    _write(first.weight, torch.cat([into, -into]))
    for layer, (before, after) in zip(middle, pairwise(spreads), strict=True):
        turn = after @ before.T / slope
        turn = torch.cat([turn, -turn], dim=1)
        _write(layer.weight, torch.cat([turn, -turn]))
    back = known.T @ spreads[-1].T / slope
    _write(last.weight, torch.cat([back, -back], dim=1))


def _write(weight: Tensor, block: Tensor) -> None:
    """Put a block at the top left; the unit without a partner is not heard by it."""
    weight[: block.shape[0]] = 0
    weight[:, block.shape[1] :] = 0
    weight[: block.shape[0], : block.shape[1]] = block


def directions(data: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """(n, D): the n <= D principal directions of examples (m, D), orthonormal; random ones where they have fewer."""
    dim = data.shape[1]
    rows = data.double()
    rows = rows - rows.mean(0)
    if len(rows) > dim:
        values, vectors = torch.linalg.eigh(rows.T @ rows)
    else:
        values, inner = torch.linalg.eigh(rows @ rows.T)
        vectors = rows.T @ inner
    found = vectors[:, values > 1e-9 * values[-1]].flip(1)[:, :n]  # eigh has the largest last
    spare = torch.randn(dim, n, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([found, spare], dim=1)).Q.T[:n]
    return (basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()).float()


def orthogonal(n: int, m: int, generator: torch.Generator) -> Tensor:
    """(n, m) random, n >= m, with orthonormal columns."""
    return torch.linalg.qr(torch.randn(n, m, generator=generator, dtype=torch.float64)).Q.float()
