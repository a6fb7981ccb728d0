"""What one process of the report does: plain values in, plain values out, so that jobs can travel and be kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kaleido_fast.benchmarking.acceptance import Deviation, WrongStatesError
from kaleido_fast.benchmarking.cases import Subject, network_spec, randomise
from kaleido_fast.benchmarking.ceiling import ceiling_run, copy_run
from kaleido_fast.benchmarking.contest import (
    Contestant,
    EngineRun,
    check_contestant,
    one_line,
    reference_states,
    start_states,
)
from kaleido_fast.benchmarking.machine import describe_run, gpu_state
from kaleido_fast.benchmarking.timing import spread, stopwatch
from kaleido_fast.benchmarking.tuning import FusedRun, check_fused
from kaleido_fast.errors import InputError
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.system.devices import device_facts, emulates
from kaleido_kernels.packing import device_precision
from kaleido_kernels.proving.trials import trial_tiles
from kaleido_kernels.shapes import KERNELS
from kaleido_kernels.tiles import choose, tile_from_json, tile_to_json

Job = dict[str, Any]
Emit = Callable[[dict[str, Any]], None]
"""Called with what is known so far; each call replaces the one before."""

PRECISIONS = ("fp16", "bf16", "fp32")
JITTER = {"jitter": 0.1, "settle": 0}
CHECKED = 300  # chains: some whole tiles and a ragged one
REPEATED = {"chains": 20_000, "steps": 5, "times": 20}
REPEATED_QUICK = {"chains": 40, "steps": 2, "times": 2}
TINY = 24  # widest layer of the networks that stand for the six in Triton's interpreter


def run_job(job: Job, emit: Emit) -> None:
    """Do one job; ``job["kind"]`` says which function of this module.

    Raises:
        Exception: whatever went wrong; the caller records it.
    """
    from kaleido_fast.benchmarking.gpu.contact import contact, look
    from kaleido_fast.benchmarking.gpu.network import measure_network

    kinds = {"facts": facts_of, "ceilings": ceilings, "check": check, "prove": prove, "network": measure_network}
    kinds |= {"look": look, "contact": contact}
    kinds[job["kind"]](job, emit)


def report_network(name: str, tiny: bool) -> KaleidoMLP:
    """A reference network with seeded random weights; ``tiny`` caps its widths and keeps its depth."""
    if not tiny:
        return Subject(name, network=name).model().requires_grad_(False)
    spec = network_spec(name)
    widths = tuple(min(width, TINY if 0 < place < spec.n_layers else 20) for place, width in enumerate(spec.widths))
    return randomise(KaleidoMLP(replace(spec, widths=widths, sample_shape=()))).requires_grad_(False)


def facts_of(job: Job, emit: Emit) -> None:
    """Machine, versions, clocks, and every check and tile that is to be proved: needs the GPU, so a job of its own."""
    device = torch.device(job["device"])
    facts = device_facts(device)
    networks = {}
    for name in job["networks"]:
        model = report_network(name, job["tiny"])
        forms = {precision: _form(model, precision) for precision in precisions_on(device)}
        tiles = {precision: trial_tiles(model.spec, form, facts.gpu) for precision, form in forms.items()}
        networks[name] = {
            "widths": model.spec.widths,
            "kernels": {precision: _kernels(model, form, facts) for precision, form in forms.items()},
            "tiles": {precision: [tile_to_json(tile) for tile in found] for precision, found in tiles.items()},
        }
    known = {"name": facts.name, "capability": facts.gpu.capability, "multiprocessors": facts.gpu.n_sm}
    known |= {"shared_memory": facts.gpu.shared_memory, "state": gpu_state(device)}
    emit({"about": describe_run(device), "gpu": known, "networks": networks})


def precisions_on(device: torch.device) -> tuple[str, ...]:
    """Precisions to measure; Triton's interpreter multiplies bf16 wrongly, so it is left out there."""
    return PRECISIONS if device.type == "cuda" or emulates() else tuple(name for name in PRECISIONS if name != "bf16")


def _form(model: KaleidoMLP, precision: str) -> str:
    from kaleido_fast.engines.triton import plain_layers

    return device_precision(plain_layers(model), precision)


def _kernels(model: KaleidoMLP, form: str, facts: Any) -> list[str]:
    """Kernels that can run a network."""
    able = []
    for kernel in KERNELS:
        try:
            choose(model.spec, form, facts.gpu, kernel=kernel)
        except ValueError:
            continue
        able.append(kernel)
    return able


def ceilings(job: Job, emit: Emit) -> None:
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


def check(job: Job, emit: Emit) -> None:
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
    """Put the errors that ``compare`` finds into ``found`` and tell them, those of wrong states too."""
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
    """Run the same again and again.

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


def prove(job: Job, emit: Emit) -> None:
    """A tile against the reference, which also puts its compiled code into the cache that all processes share."""
    device, precision = torch.device(job["device"]), job["precision"]
    model = report_network(job["network"], job["tiny"]).to(device)
    n_chains = CHECKED if device.type == "cuda" else 20
    run = FusedRun(model, precision, device, device_facts(device), n_chains, tile_from_json(job["tile"]))
    _compare(partial(check_fused, run, model, precision), {}, "", emit)


def attempt(job: Job, emit: Emit) -> str:
    """Do a job; returns why it failed, in one line, or nothing."""
    try:
        run_job(job, emit)
    except Exception as problem:  # a failing case is a result too
        return one_line(problem)
    return ""
