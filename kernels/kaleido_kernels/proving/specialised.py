"""Verdicts on kernels whose warps part into partitions that copy, multiply and wait for each other."""

from __future__ import annotations

from collections.abc import Sequence

from kaleido_kernels.proving.evidence import Evidence, Verdict, first_line
from kaleido_kernels.proving.sass.memory import GLOBAL_PROXY_FENCES, unfenced_arrivals, unfenced_products
from kaleido_kernels.proving.sass.shares import read_shares, wrong_shares
from kaleido_kernels.proving.ttgir.ahead import Ahead
from kaleido_kernels.proving.ttgir.barriers import find_barriers, unpaired_barriers
from kaleido_kernels.proving.ttgir.operations import partitions
from kaleido_kernels.proving.ttgir.scratch import is_fence, unfenced_scratch


def paired_barriers(evidence: Evidence) -> Verdict:
    """Barriers in memory fit together: what is waited for arrives, what arrives is waited for, counts and bytes agree.

    Each is initialised once, before the partitions part, for as many arrivals as partitions arrive at it. It does not
    see a wait or an arrival that is left out on one way of several: that the emulator does.
    """
    found = unpaired_barriers(evidence.module)
    barriers = find_barriers(evidence.module)
    passed = not found and bool(barriers)
    return Verdict("paired barriers", passed, f"{len(barriers)} barriers, {len(found)} faults" + first_line(found))


def fenced_layers(evidence: Evidence) -> Verdict:
    """What threads store in shared memory is fenced before products read it, those of the next layer and step included.

    And before an arrival at a barrier in memory, which may let the copy engine at it. Addresses are not known: a word
    that one partition leaves there for another, and for no product or copy, must be fenced as well.
    """
    found = unfenced_products(evidence.program, next_rounds=True) + unfenced_arrivals(evidence.program)
    return Verdict("fenced layers", not found, f"{len(found)} products and arrivals without" + first_line(found))


def fenced_scratch(evidence: Evidence) -> Verdict:
    """What the kernel stores in global memory for its own copies is fenced, and waited for, before they run.

    Fence, barrier of the partition and arrival are looked for in this order in the IR; in the machine code, whether
    there is a fence for each partition that has any, run by all threads: the compiler may merge those of one partition.
    """
    found = unfenced_scratch(evidence.module)
    fences = [item for item in evidence.program.instructions if item.opcode in GLOBAL_PROXY_FENCES]
    found += [f"{item.text}: by some threads only" for item in fences if item.guard not in ("", "@PT")]
    asked = sum(any(map(is_fence, part.walk())) for part in partitions(evidence.module))
    if len(fences) < asked:
        found.append(f"{len(fences)} fences in the machine code for {asked} partitions that have any")
    return Verdict("fenced scratch", not found, f"{len(fences)} fences, {len(found)} faults" + first_line(found))


def register_shares(evidence: Evidence) -> Verdict:
    """The partitions' shares of the registers fit the multiprocessor and the launch, and their code fits the shares.

    Warps of one group ask alike. Else warps wait for registers that never come, or lose some that they use.
    """
    warps = [part.warps for part in partitions(evidence.module)]
    own = _default_warps(evidence, warps)
    found = wrong_shares(evidence.program, evidence.registers, evidence.warps, [own, *warps[1:]])
    shares = read_shares(evidence.program)
    told = f"shares {'/'.join(map(str, shares.busy))} of {evidence.registers}" if shares else "no shares"
    return Verdict("register shares", not found, f"{told}, {len(found)} faults" + first_line(found))


def _default_warps(evidence: Evidence, warps: list[int]) -> int:
    """Warps of the default partition: the module's own."""
    found = evidence.ttgir.partition('"ttg.num-warps" = ')[2].split(" ")[0]
    return int(found) if found.isdigit() else evidence.warps - sum(warps)


def loads_ahead(loops: Sequence[Ahead], faults: Sequence[str], least: int) -> Verdict:
    """Copies run while products do: in every loop of products that loads, ``least`` rounds' copies may be under way.

    That counts copies, not time: that they were issued while a product ran, or before, and not waited for. Of a ring
    of slots it also says whether products read slots that were waited for, and slots are given back behind them.
    """
    found = list(faults) + [f"{loop.loop}: {loop.ahead} of {least}" for loop in loops if loop.ahead < least]
    if least and not loops:
        found.append("no loop of products loads")
    told = ", ".join(f"{loop.ahead} of {loop.buffers - 1}" for loop in loops)
    return Verdict("loads ahead", not found, f"{len(loops)} loops load ahead: {told or '-'}" + first_line(found))
