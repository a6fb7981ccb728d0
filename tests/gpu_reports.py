"""Reports of a GPU of seconds: tiny networks, in the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kaleido_fast.benchmarking.gpu import checks, contestants, report
from kaleido_fast.benchmarking.gpu.report import ReportRequest, make_report
from kaleido_fast.benchmarking.gpu.workers import HereWorker

NETS = ("points2d",)


def request(out: Path, **options) -> ReportRequest:
    return ReportRequest("cpu", **{"networks": NETS, "quick": True, "out": out, "interpreter": True, **options})


def make_faulty_report(folder: Path) -> report.Report:
    """A report of a network, made in this process; one kernel and one peer fail."""
    if torch.cuda.is_available():
        pytest.skip("for Triton's interpreter: kernels are compiled here")
    patch = pytest.MonkeyPatch()
    build, check = contestants.build_peer, checks.check_contestant

    def broken_peer(peer, setting):
        if peer.name == "chunked":
            raise RuntimeError("out of luck\nand a long traceback")
        return build(peer, setting)

    def broken_check(contestant, z0, expected, n_layers):
        if getattr(contestant.run, "options", {}).get("kernel") == "stream":
            expected = [*expected[:-1], expected[-1] + torch.tensor([0.0, 3.0])]
        return check(contestant, z0, expected, n_layers)

    patch.setattr(contestants, "build_peer", broken_peer)
    patch.setattr(checks, "check_contestant", broken_check)
    try:
        return make_report(request(folder), HereWorker)
    finally:
        patch.undo()
