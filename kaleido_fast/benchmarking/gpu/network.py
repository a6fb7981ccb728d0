"""One network of the report: its tiles tuned, then all contestants built, checked and timed in turns."""

from __future__ import annotations

import time
from typing import Any

import torch

from kaleido_fast.benchmarking.gpu.contestants import builders
from kaleido_fast.benchmarking.gpu.jobs import Emit, NetworkJob
from kaleido_fast.benchmarking.gpu.subjects import report_network
from kaleido_fast.benchmarking.gpu.tiles import tune
from kaleido_fast.benchmarking.gpu.turns import TIMING, time_group
from kaleido_fast.benchmarking.gpu.work import Work, release
from kaleido_fast.benchmarking.machine import gpu_state
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.running.packed import forget_packed
from kaleido_fast.system.devices import device_facts

BUILDING_SHARE = 0.75  # of a network's time, until when contestants are built
TIMING_SHARE = 0.25  # of it, which timing has in any case, if it must at the cost of the next networks


def measure_network(job: NetworkJob, emit: Emit) -> None:
    """Tune and time one network: ours and the quick peers first, in turns; then those that take long to build.

    Raises:
        DeviceLostError: the same job with the record as ``known`` goes on in another process.
    """
    device = torch.device(job["device"])
    forget_packed()  # what an earlier network left
    release(device)
    model = report_network(job["network"], job["tiny"]).to(device)
    record = {**_new_record(job, model), **job["known"]}
    record["states"].append(gpu_state(device))
    work = Work(job, model, device, device_facts(device), time.monotonic(), record, emit)
    if job["tune"]:
        tune(work)
    if job["time"]:
        quick, slow = builders(work)
        if not record["contestants"] and TIMING not in record["failed"]:
            time_group(work, quick, BUILDING_SHARE, TIMING_SHARE)
        for name, builder in slow.items():  # one by one, and each written before the next: any may be lost
            if name not in record["contestants"]:
                time_group(work, {name: builder}, 1.0, 0.0)
    record["states"].append(gpu_state(device))
    work.begin("")


def _new_record(job: NetworkJob, model: KaleidoMLP) -> dict[str, Any]:
    return {
        "network": job["network"],
        "widths": model.spec.widths,
        "n_chains": job["n_chains"],
        "flops_per_step": model.spec.flops_per_step,
        "at_work": "",
        "trials": {},
        "tuning": {},
        "contestants": {},
        "failed": {},
        "states": [],
    }
