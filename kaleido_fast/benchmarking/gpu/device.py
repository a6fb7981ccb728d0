"""The GPU itself: what it is, what can run on it, and how fast it multiplies and copies at best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kaleido_fast.benchmarking.ceiling import ceiling_run, copy_run
from kaleido_fast.benchmarking.gpu.jobs import CeilingsJob, Emit, FactsJob
from kaleido_fast.benchmarking.gpu.subjects import precisions_on, report_network
from kaleido_fast.benchmarking.machine import describe_run, gpu_state
from kaleido_fast.benchmarking.timing import spread, stopwatch
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.planning.facts import DeviceFacts
from kaleido_fast.planning.plan import plan_kernel
from kaleido_fast.system.devices import device_facts
from kaleido_kernels.packing import weights_range
from kaleido_kernels.precision import WeightsRange, device_precision
from kaleido_kernels.proving.trials import trial_tiles
from kaleido_kernels.shapes import KERNELS
from kaleido_kernels.tuned import tile_to_json


def facts_of(job: FactsJob, emit: Emit) -> None:
    """Machine, versions, clocks, and every check and tile that is to be proved: needs the GPU, so a job of its own."""
    device = torch.device(job["device"])
    facts = device_facts(device)
    networks = {}
    for name in job["networks"]:
        model = report_network(name, job["tiny"])
        weights = _weights(model)
        on_gpu = {precision: device_precision(precision, weights) for precision in precisions_on(device)}
        tiles = {precision: trial_tiles(model.spec, used, facts.gpu) for precision, used in on_gpu.items()}
        networks[name] = {
            "widths": model.spec.widths,
            "kernels": {precision: _kernels(model, precision, facts, weights) for precision in on_gpu},
            "tiles": {precision: [tile_to_json(tile) for tile in found] for precision, found in tiles.items()},
        }
    known = {"name": facts.name, "capability": facts.gpu.capability, "multiprocessors": facts.gpu.n_sm}
    known |= {"shared_memory": facts.gpu.shared_memory, "state": gpu_state(device)}
    emit({"about": describe_run(device), "gpu": known, "networks": networks})


def _weights(model: KaleidoMLP) -> WeightsRange:
    from kaleido_fast.engines.triton import plain_layers

    return weights_range(plain_layers(model))


def _kernels(model: KaleidoMLP, precision: str, facts: DeviceFacts, weights: WeightsRange) -> list[str]:
    """Kernels by which a plan can run a network in a precision."""
    able = []
    for kernel in KERNELS:
        try:
            plan_kernel(model.spec, precision, facts, weights, kernel=kernel)
        except ValueError:
            continue
        able.append(kernel)
    return able


def ceilings(job: CeilingsJob, emit: Emit) -> None:
    """Large matrix products by precision, and copies in the GPU's main memory and in its second-level cache."""
    device, quick = torch.device(job["device"]), job["quick"]
    gpu = device.type == "cuda"
    side, products = (8192, 2 if quick else 10) if gpu else (128, 1)
    sizes = {"memory": (2**31, 4), "cache": (2**23, 200)} if gpu else {"memory": (2**20, 2)}
    found: dict[str, Any] = {"matrix": {}, "copy": {}, "side": side}
    for precision in ("fp16", "bf16", "tf32", "fp32") if gpu else ("fp32",):
        repeats = products if precision != "fp32" else max(1, products // 5)
        seconds = _timed(ceiling_run(precision, device, side, repeats), device, job["rounds"])
        rate = 2 * side**3 * repeats / spread(seconds).median
        found["matrix"][precision] = {"seconds": seconds, "products": repeats, "flops_per_second": rate}
        emit(found)
    for place, (n_bytes, copies) in sizes.items():
        seconds = _timed(copy_run(n_bytes, device, copies), device, job["rounds"])
        rate = 2 * n_bytes * copies / spread(seconds).median
        found["copy"][place] = {"seconds": seconds, "bytes": n_bytes, "copies": copies, "bytes_per_second": rate}
        emit(found)
    emit({**found, "state": gpu_state(device)})


def _timed(run: Callable[[], float], device: torch.device, rounds: int) -> list[float]:
    watch = stopwatch(device)
    for _ in range(3):
        run()
    return [watch(run) for _ in range(rounds)]
