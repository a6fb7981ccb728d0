"""Chains of a run, block by block: the loop that all runs share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kaleido_fast.planning.plan import SamplePlan
from kaleido_fast.planning.request import SampleRequest
from kaleido_fast.progress import Meter
from kaleido_fast.running.freezing import run_block
from kaleido_fast.running.phases import Phase
from kaleido_fast.running.result import (
    ChainArrays,
    find_outcomes,
)
from kaleido_fast.running.subject import Subject


@dataclass(frozen=True)
class Run:
    """What is sampled, what is asked for, and how and where it is computed.

    Results lie on ``device``; the devices ``others`` compute a part.
    """

    subject: Subject
    request: SampleRequest
    plan: SamplePlan
    device: torch.device
    others: tuple[torch.device, ...] = ()


@dataclass(frozen=True)
class Block:
    """Chains of a run at their end: ``rows`` are their places in the run (chain id less ``first_chain``)."""

    rows: slice
    chains: ChainArrays
    chain_steps: int


def split(n_chains: int, size: int) -> Iterator[slice]:
    """0 .. n_chains in slices of ``size``, the last one shorter."""
    return (slice(first, min(first + size, n_chains)) for first in range(0, n_chains, size))


def run_blocks(
    run: Run,
    phases: list[Phase],
    spans: Iterable[slice],
    meter: Meter,
    *,
    whole: ChainArrays | None = None,
    z0: Tensor | None = None,
) -> Iterator[Block]:
    """Compute chains span by span, each as one `Block` when it is done; any split gives the same bits.

    Args:
        run: what to compute.
        phases: its engines, see `build_phases`.
        spans: places of chains in the run, taken one at a time, so that another thread may take others.
        meter: counts progress.
        whole: arrays of the whole run to be filled, of which the blocks are views; None makes new ones for each span.
        z0: (n_chains, D) start states of the whole run, None for start noise.
    """
    request, device = run.request, run.device
    for span in spans:
        made = (
            ChainArrays.empty(span.stop - span.start, request, run.subject.dim, device)
            if whole is None
            else whole[span]
        )
        chain_steps = 0
        for part in split(span.stop - span.start, run.plan.block_chains):
            into = made[part]
            first = span.start + part.start
            chain_ids = torch.arange(first, first + len(into), device=device) + request.first_chain
            start = None if z0 is None else z0[first : first + len(into)].to(device)
            end = run_block(phases, request, chain_ids, start, into.draws, meter.add)
            into.residual[:], into.steps[:] = end.residual, end.steps
            into.outcome[:], into.period[:] = find_outcomes(into.draws[:, -1], end.residual, end.period, request.tol)
            chain_steps += end.chain_steps
            meter.finish(len(into))
        yield Block(span, made, chain_steps)
