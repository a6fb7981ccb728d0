"""Does one job, whatever its kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kaleido_fast.benchmarking.contest import one_line
from kaleido_fast.benchmarking.gpu.checks import check, prove
from kaleido_fast.benchmarking.gpu.contact import contact, look
from kaleido_fast.benchmarking.gpu.device import ceilings, facts_of
from kaleido_fast.benchmarking.gpu.jobs import Emit, Job
from kaleido_fast.benchmarking.gpu.network import measure_network

KINDS: dict[str, Callable[[Any, Emit], None]] = {
    "facts": facts_of,
    "ceilings": ceilings,
    "check": check,
    "prove": prove,
    "network": measure_network,
    "look": look,
    "contact": contact,
}
"""What does a job, by ``job["kind"]``, which names its type: see `jobs`."""


def run_job(job: Job, emit: Emit) -> None:
    """Do one job.

    Raises:
        Exception: whatever went wrong; the caller records it.
    """
    KINDS[job["kind"]](job, emit)


def attempt(job: Job, emit: Emit) -> str:
    """Do a job; returns why it failed, in one line, or nothing."""
    try:
        run_job(job, emit)
    except Exception as problem:  # a failing case is a result too
        return one_line(problem)
    return ""
