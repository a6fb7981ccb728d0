"""What is measured: networks, their precisions, and the sizes of checks."""

from __future__ import annotations

from dataclasses import replace

import torch

from kaleido_fast.benchmarking.cases import BenchNetwork, network_spec, randomise
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.system.devices import emulates

PRECISIONS = ("fp16", "bf16", "fp32")
JITTER = {"jitter": 0.1, "settle": 0}
CHECKED = 300  # chains: some whole tiles and a ragged one
TINY = 24  # widest layer of the networks that stand for the six in Triton's interpreter


def report_network(name: str, tiny: bool) -> KaleidoMLP:
    """A reference network with seeded random weights; ``tiny`` caps its widths and keeps its depth."""
    if not tiny:
        return BenchNetwork(name, network=name).model().requires_grad_(False)
    spec = network_spec(name)
    widths = tuple(min(width, TINY if 0 < place < spec.n_layers else 20) for place, width in enumerate(spec.widths))
    return randomise(KaleidoMLP(replace(spec, widths=widths, sample_shape=()))).requires_grad_(False)


def precisions_on(device: torch.device) -> tuple[str, ...]:
    """Precisions to measure; Triton's interpreter multiplies bf16 wrongly, so it is left out there."""
    return PRECISIONS if device.type == "cuda" or emulates() else tuple(name for name in PRECISIONS if name != "bf16")
