"""Which kernels are compiled: all that the plan can choose for the reference networks. Plain Python, no Triton."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kaleido_kernels.choice import choose
from kaleido_kernels.proving.architectures import FACTS
from kaleido_kernels.shapes import NETWORKS, RESTART, NetShape
from kaleido_kernels.tile import AnyTile

FORMS = ("fp16x3", "fp16", "bf16")
FORM_NAMES = {"fp32": "fp16x3", **{form: form for form in (*FORMS, "tf32", "ieee")}}
"""Precisions as the command takes them: fp32 is computed as split fp16 for all weights of usual size."""
VARIANTS = ("none", "normal", "flow", "checks")


@dataclass(frozen=True)
class Job:
    """One configuration to compile.

    ``variant`` is the kernel's JITTER, "flow" for steps by parts, or "checks" for chains that halt inside.
    """

    net: str
    shape: NetShape
    tile: AnyTile
    precision: str
    variant: str

    @property
    def jitter(self) -> str:
        return {"checks": "none", "flow": RESTART}.get(self.variant, self.variant)

    @property
    def kernel(self) -> str:
        return self.tile.kernel


def planned_jobs(
    nets: Sequence[str], precisions: Sequence[str] = FORMS, variants: Sequence[str] = VARIANTS, arch: str = "sm_90"
) -> Iterator[Job]:
    """The configurations that the plan can choose for the named networks on ``arch``."""
    for net in nets:
        shape = NETWORKS[net]
        for precision in precisions:
            for tile in planned_tiles(shape, precision, arch):
                for variant in variants:
                    yield Job(net, shape, tile, precision, variant)


def planned_tiles(shape: NetShape, precision: str, arch: str) -> Sequence[AnyTile]:
    """The tiles that the plan can choose: without a tuned table it is one, and never the graph path's."""
    return [choose(shape, precision, FACTS[arch]).tile]
