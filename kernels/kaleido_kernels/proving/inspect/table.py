"""Reports as text for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kaleido_kernels.proving.inspect.estimating import N_CHAINS, N_STEPS
from kaleido_kernels.proving.inspect.report import Report
from kaleido_kernels.proving.roofline.gpu import FAST, NOTE, SLOW, Gpu
from kaleido_kernels.proving.roofline.model import Estimate

TABLE_KINDS = ("HGMMA", "HMMA", "FFMA", "MUFU", "LDG", "STG", "LDS", "STS", "LDL", "STL", "LDGSTS", "UTMALDG", "BAR")


def table(reports: Sequence[Report]) -> str:
    """The reports as text: one line each, counts in and outside of the loop of products, then the failed verdicts."""
    lines = [
        f"{'net':9}{'kernel':7}{'tile':31}{'prec':8}{'variant':8}{'regs':>5}{'stack':>6}{'shared':>8}{'loop':>6}"
        f"  {'verdicts':10}{'ms':>13}  {'limit':13}{'peak':>7}  in the loop of products | outside of it"
    ]
    for report in reports:
        job, guess = report.job, report.estimate
        inside = " ".join(f"{kind}:{report.loop[kind]}" for kind in TABLE_KINDS if report.loop.get(kind))
        rest = {kind: report.total.get(kind, 0) - report.loop.get(kind, 0) for kind in TABLE_KINDS}
        outside = " ".join(f"{kind}:{number}" for kind, number in rest.items() if number)
        verdict = "-" if not report.verdicts else "ok" if not report.failed else f"{len(report.failed)} FAILED"
        tail = f"{range_text(guess):>13}  {guess.limit:13}{share_text(guess):>7}" if guess else " " * 35
        lines.append(
            f"{job.net:9}{job.kernel:7}{job.tile.short_name:31}{job.precision:8}{job.variant:8}{report.registers:5}"
            f"{report.stack:6}{report.shared:8}{report.loop.get('all', 0):6}  {verdict:10}{tail}  {inside} | {outside}"
        )
        lines += [f"    FAILED {verdict.name}: {verdict.detail}" for verdict in report.failed]
    lines.append(f"ms: {N_CHAINS:,} chains x {N_STEPS} steps in one launch on an H100 or H200, {NOTE}; from")
    lines += [f"    {assumptions_text(gpu)}" for gpu in (FAST, SLOW)]
    return "\n".join(lines)


def range_text(guess: Estimate) -> str:
    """Both ends in milliseconds, in three figures."""
    return f"{three_figures(guess.low.milliseconds)}-{three_figures(guess.high.milliseconds)}"


def three_figures(value: float) -> str:
    """A positive number to read: 0.351, 58.2, 1240."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value < 100 else f"{float(f'{value:.3g}'):.0f}"


def share_text(guess: Estimate) -> str:
    """Share of the fp16 matrix peak, the slow end first."""
    return f"{100 * guess.high.peak_share:.0f}-{guess.low.peak_share:.0%}"


def assumptions_text(gpu: Gpu) -> str:
    """The rates of one end of the ranges."""
    return (
        f"{gpu.name}: {gpu.tensor_flops / 1e12:.0f} TFLOP/s of large products, {gpu.clock / 1e9:.3g} GHz; L2 "
        f"{gpu.l2_bandwidth / 1e12:.1f} TB/s ({gpu.l2_per_cycle:.0f} bytes a clock and multiprocessor), holds "
        f"{gpu.l2_capacity / 1e6:.0f} MB; memory {gpu.hbm_bandwidth / 1e12:.1f} TB/s; a load waits {gpu.latency:.0f} "
        f"cycles; a launch takes Python {1e6 * gpu.launch_seconds:.0f} us"
    )
