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
    """Sizes of a network's timings on two CPU cores; more cores and GPUs take more steps, see `scaled`."""

    quick: Size
    full: Size


# Eager torch takes about 0.2 to 0.7 s for a quick timing on two cores, 1 to 7 s for a full one. The two widest
# networks do not get their 100,000 chains: one step of cifar takes 75 s there, and the speed per chain is the same from
# some thousand on.
SIZES = {
    "points1d": Sizes(Size(100_000, 24), Size(100_000, 100)),
    "points2d": Sizes(Size(100_000, 8), Size(100_000, 30)),
    "digits": Sizes(Size(8_000, 3), Size(100_000, 3)),
    "deep128": Sizes(Size(16_000, 3), Size(100_000, 6)),
    "mnist": Sizes(Size(1_280, 3), Size(50_000, 2)),
    "cifar": Sizes(Size(288, 1), Size(5_000, 2)),
}
_CPU_CORES = 2
_GPU_SPEED = 200  # a data-centre GPU does the work of about 400 such cores
_GPU_CHAINS = 100_000


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


@dataclass(frozen=True)
class Case:
    """One row of the table of results."""

    network: BenchNetwork
    spec: ModelSpec
    size: Size
    engine: str
    precision: str

    @property
    def chain_steps(self) -> int:
        """Chains x steps of one timing."""
        return self.size.n_chains * self.size.n_steps


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
    threads: int,
    n_chains: int | None = None,
    n_steps: int | None = None,
) -> Size:
    """Chains and steps of a timing: the table's for this kind of device, where nothing else is asked for.

    Args:
        network, spec: the network; a checkpoint takes the sizes of the reference network nearest in work per step.
        quick: the short timings.
        kind: "cpu" or "cuda".
        threads: CPU threads in use.
        n_chains, n_steps: override the table.
    """
    for name, value in (("chains", n_chains), ("steps", n_steps)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}: it must be at least 1")
    base = scaled(_table_size(network, spec, quick), kind, threads)
    return Size(n_chains or base.n_chains, n_steps or base.n_steps)


def _table_size(network: BenchNetwork, spec: ModelSpec, quick: bool) -> Size:
    """The table's entry; for a checkpoint, the nearest network's chains with steps that make up the same work."""
    flops = {name: network_spec(name).flops_per_step for name in SIZES}
    nearest = min(SIZES, key=lambda name: abs(math.log(flops[name] / spec.flops_per_step)))
    name = network.network or nearest
    size = SIZES[name].quick if quick else SIZES[name].full
    return Size(size.n_chains, max(1, round(size.n_steps * flops[name] / spec.flops_per_step)))


def scaled(size: Size, kind: str, threads: int) -> Size:
    """A size for two cores as one for this device: about the same seconds."""
    if kind == "cuda":
        work = size.n_chains * size.n_steps * _GPU_SPEED
        return Size(_GPU_CHAINS, max(2, round(work / _GPU_CHAINS)))
    return Size(size.n_chains, max(1, round(size.n_steps * max(1.0, threads / _CPU_CORES))))
