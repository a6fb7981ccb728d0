"""Kernels and tiles against the reference, and against themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kaleido_fast.benchmarking.acceptance import Deviation, WrongStatesError
from kaleido_fast.benchmarking.contest import Contestant, EngineRun, check_contestant, reference_states, start_states
from kaleido_fast.benchmarking.gpu.jobs import CheckJob, Emit, ProveJob
from kaleido_fast.benchmarking.gpu.subjects import CHECKED, JITTER, report_network
from kaleido_fast.benchmarking.tuning import FusedRun, check_fused
from kaleido_fast.errors import InputError
from kaleido_fast.system.devices import device_facts
from kaleido_kernels.tuned import tile_from_json

REPEATED = {"chains": 20_000, "steps": 5, "times": 20}
REPEATED_QUICK = {"chains": 40, "steps": 2, "times": 2}


def check(job: CheckJob, emit: Emit) -> None:
    """A kernel against the reference: states, with and without jitter, and whether repeated runs give the same bits."""
    device, precision = torch.device(job["device"]), job["precision"]
    model = report_network(job["network"], job["tiny"]).to(device)
    z0 = start_states(model, CHECKED if device.type == "cuda" else 20, device)
    found: dict[str, Any] = {}
    for prefix, options in (("", {}), ("jittered_", JITTER)):
        run = EngineRun(model, "triton", precision, device, kernel=job["kernel"], **options)
        expected = reference_states(model, z0, precision, **options)
        contestant = Contestant(run, precision=precision)
        _compare(partial(check_contestant, contestant, z0, expected, model.spec.n_layers), found, prefix, emit)
    size = REPEATED if device.type == "cuda" else REPEATED_QUICK
    again = FusedRun(model, precision, device, device_facts(device), size["chains"], kernel=job["kernel"])
    emit({**found, **repeated(again, start_states(model, size["chains"], device), size["steps"], size["times"])})


def _compare(compare: Callable[[], Deviation], found: dict[str, Any], prefix: str, emit: Emit) -> None:
    """Put the errors that ``compare`` finds into ``found`` and emit them, those of wrong states too."""
    wrong: WrongStatesError | None = None
    try:
        deviation = compare()
    except WrongStatesError as problem:
        wrong, deviation = problem, problem.deviation
    found |= {f"{prefix}{name}": value for name, value in deviation.record().items()}
    emit(found)
    if wrong is not None:
        raise wrong


def repeated(run: Callable[[Tensor, int], Tensor], z0: Tensor, steps: int, times: int) -> dict[str, int]:
    """Run the same work again and again.

    Raises:
        InputError: another result than the first; which chains, how many.
    """
    first = run(z0, steps).clone()
    for time in range(1, times):
        again = run(z0, steps)
        if not torch.equal(again, first):
            wrong = int((again != first).any(dim=1).sum())
            raise InputError(
                f"run {time + 1} of the same work differs from the first in {wrong:,} of {len(z0):,} chains"
            )
    return {"same_bits_times": times}


def prove(job: ProveJob, emit: Emit) -> None:
    """A tile against the reference, which also puts its compiled code into the cache that all processes share."""
    device, precision = torch.device(job["device"]), job["precision"]
    model = report_network(job["network"], job["tiny"]).to(device)
    n_chains = CHECKED if device.type == "cuda" else 20
    run = FusedRun(model, precision, device, device_facts(device), n_chains, tile_from_json(job["tile"]))
    _compare(partial(check_fused, run, model, precision), {}, "", emit)
