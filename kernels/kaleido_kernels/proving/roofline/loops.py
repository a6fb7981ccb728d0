"""What a program does one after another in a step: loops that load, multiply and compute, and bytes used again."""

from __future__ import annotations

from dataclasses import dataclass

from kaleido_kernels.proving.roofline.gpu import Gpu

L2_LOST = 1.5
"""Reuse over this many times the capacity of L2 finds nothing there. Read off the same curves as the capacities."""


@dataclass(frozen=True)
class Overlap:
    """What hides a copy of a loop of products.

    Args:
        ahead: rounds from the issue of a copy to its use; with 1 the next round waits for it, with 0 the same does.
        products: share of a round's products between the issue and the end of the round (0: all done before).
        other: the same share of its other instructions.
    """

    ahead: int = 0
    products: float = 0.0
    other: float = 0.0


@dataclass(frozen=True)
class Loop:
    """A loop that loads, multiplies and computes, as one program runs it in one step of its tile.

    Args:
        rounds: of a step.
        starts: how often in a step it begins without anything loaded, at most ``rounds``.
        fma: multiply-adds of a round on tensor cores, each counted at the fp16 rate.
        other: cycles of a round's other instructions, which do not run beside the round's own products.
        loaded: bytes that a round loads.
        stored: bytes that leave meanwhile, of what was computed before.
        overlap: what hides the loads.
    """

    rounds: float
    starts: float = 0.0
    fma: float = 0.0
    other: float = 0.0
    loaded: float = 0.0
    stored: float = 0.0
    overlap: Overlap = Overlap()

    def work(self, gpu: Gpu) -> float:
        """Cycles of a round's products and other instructions."""
        return self.fma / gpu.tensor_fma + self.other

    def load(self, gpu: Gpu) -> float:
        """Cycles from the issue of a round's copy to its use."""
        return gpu.latency + self.loaded / gpu.l2_per_cycle if self.loaded else 0.0

    def round_cycles(self, gpu: Gpu) -> float:
        """Cycles of a round in the middle of the loop.

        A buffer is taken from the issue of its copy until the next issue for it: a load, and a round's work up to where
        copies are issued. There are `Overlap.ahead` of them besides the one in use.
        """
        work, load = self.work(gpu), self.load(gpu)
        behind = self.overlap.products * self.fma / gpu.tensor_fma + self.overlap.other * self.other
        held = load + work - behind if self.overlap.ahead else load + work
        waiting = held / max(1, self.overlap.ahead) if self.loaded else 0.0
        return max(work, waiting, (self.loaded + self.stored) / gpu.l2_per_cycle)

    def cycles(self, gpu: Gpu) -> float:
        """Cycles of all rounds; a start adds the load that nothing hides."""
        one = self.round_cycles(gpu)
        return self.rounds * one + self.starts * max(0.0, self.load(gpu) + self.work(gpu) - one)


@dataclass(frozen=True)
class Reuse:
    """Bytes that are used again in a step.

    Args:
        own: bytes that each program uses again, in a step of its tile.
        between: other bytes that each program has touched in between.
        common: bytes that all programs use again together, once a step: weights.
        beside: bytes common to all programs that were touched in between.
    """

    own: float = 0.0
    between: float = 0.0
    common: float = 0.0
    beside: float = 0.0

    def missed(self, gpu: Gpu) -> float:
        """Bytes of one program that come from main memory: none within the capacity, all from `L2_LOST` times it."""
        distance = self.between * gpu.n_sm + self.beside
        share = min(1.0, max(0.0, (distance / gpu.l2_capacity - 1) / (L2_LOST - 1)))
        return share * (self.own + self.common / gpu.n_sm)
