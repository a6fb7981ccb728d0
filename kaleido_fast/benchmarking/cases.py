"""What is timed: one table of sizes, from which cases (network x chains x steps x engine x precision) are made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from kaleido_fast.errors import InputError, unknown_name
from kaleido_fast.model import KaleidoMLP, ModelSpec
from kaleido_fast.presets import NETWORKS


@dataclass(frozen=True)
class Size:
    """Chains and steps of one timing."""

    n_chains: int
    n_steps: int


@dataclass(frozen=True)
class Sizes:
    """Sizes of a network's timings.

    Args:
        n_chains: on a CPU; the steps there follow from the machine's speed, see `steps_for`.
        gpu_quick, gpu_full: steps of 100,000 chains on a GPU.
    """

    n_chains: int
    gpu_quick: int
    gpu_full: int


# The three widest networks do not get 100,000 chains on a CPU: one step of cifar would take more than a minute on two
# cores, and the speed per chain is the same from some hundred on.
SIZES = {
    "points1d": Sizes(100_000, 4800, 20_000),
    "points2d": Sizes(100_000, 1600, 6000),
    "digits": Sizes(100_000, 48, 600),
    "deep128": Sizes(20_000, 96, 1200),
    "mnist": Sizes(4096, 8, 200),
    "cifar": Sizes(512, 2, 20),
}
_GPU_CHAINS = 100_000
LEAST_STEPS = {True: 20, False: 60}  # by quick: a timing is of so many steps,
LEAST_SECONDS = {True: 1.0, False: 3.0}  # or of so many seconds, whichever is less,
SHORTEST_SECONDS = 0.1  # and no shorter than that: 20 steps of points1d take as long as a call does besides


@dataclass(frozen=True)
class BenchNetwork:
    """A network to time: one of the six reference shapes, or a checkpoint.

    Args:
        name: as it appears in tables.
        network: name of the reference shape; None for a checkpoint.
        path: of the checkpoint; None for a reference shape.
    """

    name: str
    network: str | None = None
    path: str | None = None

    def model(self) -> KaleidoMLP:
        """The network itself; the six shapes get seeded random weights, on which speed does not depend."""
        if self.path is not None:
            from kaleido_fast.checkpoint import load_checkpoint

            return load_checkpoint(self.path).model.eval()
        return random_network(self.name)


def network_spec(name: str) -> ModelSpec:
    """Specification of a reference network; an unknown name raises `InputError` with the nearest."""
    if name not in NETWORKS:
        raise unknown_name("network", name, NETWORKS)
    shape = NETWORKS[name]
    return ModelSpec(shape.widths, bound=shape.bound, sample_shape=shape.sample_shape)


def random_network(name: str, seed: int = 0) -> KaleidoMLP:
    """A reference network with random weights of a scale that keeps activations near 1 through all layers."""
    return randomise(KaleidoMLP(network_spec(name)), seed)


def randomise(model: KaleidoMLP, seed: int = 0) -> KaleidoMLP:
    """Fill a network with seeded normal weights (variance 2 / inputs, He et al. 2015) and small biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.linears:
            layer.weight.normal_(0, math.sqrt(2 / layer.in_features), generator=generator)
            if layer.bias is not None:
                layer.bias.normal_(0, 0.1, generator=generator)
    return model.eval()


def find_networks(networks: tuple[str, ...], model: str | None) -> list[BenchNetwork]:
    """The networks asked for; all six if none is, and only the checkpoint if just that is named.

    Raises:
        InputError: a network that does not exist, with the nearest name; a checkpoint that cannot be read.
    """
    for name in networks:
        network_spec(name)
    if model is not None:
        BenchNetwork(model, path=model).model()  # a bad file is found out now, not after the networks before it
    chosen = networks or (() if model else tuple(SIZES))
    found = [BenchNetwork(name, network=name) for name in dict.fromkeys(chosen)]
    if model is not None:
        found.append(BenchNetwork(Path(model).stem, path=model))
    return found


def make_size(
    network: BenchNetwork,
    spec: ModelSpec,
    *,
    quick: bool,
    kind: str,
    n_chains: int | None = None,
    n_steps: int | None = None,
) -> tuple[int, int | None]:
    """(chains, steps) of a timing: the table's for this kind of device, where nothing else is asked for.

    Steps are None where `steps_for` is to be asked, once the speed of a step is known.

    Args:
        network, spec: the network; a checkpoint takes the sizes of the reference network nearest in work per step.
        quick: the short timings.
        kind: "cpu" or "cuda".
        n_chains, n_steps: override the table.
    """
    for name, value in (("chains", n_chains), ("steps", n_steps)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}: it must be at least 1")
    flops = {name: network_spec(name).flops_per_step for name in SIZES}
    nearest = min(SIZES, key=lambda name: abs(math.log(flops[name] / spec.flops_per_step)))
    name = network.network or nearest
    if kind == "cpu":
        return n_chains or SIZES[name].n_chains, n_steps
    steps = SIZES[name].gpu_quick if quick else SIZES[name].gpu_full
    return n_chains or _GPU_CHAINS, n_steps or max(2, round(steps * flops[name] / spec.flops_per_step))


def steps_for(step_seconds: float, *, quick: bool) -> int:
    """Steps of a timing on a CPU: the fewest that make up `LEAST_STEPS` or `LEAST_SECONDS` of a step's seconds.

    But no timing is shorter than `SHORTEST_SECONDS`.
    """
    usual, shortest = (
        math.ceil(seconds / max(step_seconds, 1e-9)) for seconds in (LEAST_SECONDS[quick], SHORTEST_SECONDS)
    )
    return max(1, shortest, min(LEAST_STEPS[quick], usual))
