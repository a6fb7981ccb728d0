"""The cases of a first contact with a GPU, and what a process does for one of them; `first_contact` hands them out."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kaleido_fast.benchmarking.acceptance import Deviation, measure_deviation, refuse_wrong
from kaleido_fast.benchmarking.contest import EngineRun, start_states
from kaleido_fast.benchmarking.gpu.jobs import ContactJob, Emit, LookJob
from kaleido_fast.benchmarking.gpu.subjects import JITTER, report_network
from kaleido_fast.benchmarking.machine import gpu_state
from kaleido_fast.benchmarking.timing import spread, stopwatch
from kaleido_fast.benchmarking.tuning import MAX_STEPS, FusedRun, launch_microseconds, steps_within
from kaleido_fast.errors import InputError
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.system.devices import device_facts
from kaleido_fast.system.versions import library_versions

NETS = ("mnist", "digits", "deep128", "points2d", "points1d", "cifar")
"""The most important first: what a run of 15 minutes must not miss."""
OTHERS = (
    *(("mnist", "fp16", "graph"), ("cifar", "fp16", "graph"), ("digits", "fp16", "graph")),
    *(("digits", "fp16", "stream"), ("deep128", "fp16", "stream"), ("mnist", "fp16", "wide")),
    *(("digits", "fp16", "wide"), ("deep128", "fp16", "wide"), ("points2d", "fp16", "stream")),
    *(("points1d", "fp32", "wide"), ("points2d", "fp32", "stream")),
)
STEPS = (1, 3)
TABLE_CHAINS = 100_000
TIMINGS, TIMING_SECONDS = 7, 0.05
BUSY_BYTES, BUSY_PERCENT = 2**30, 20
"""Memory and use of a GPU from which on others are taken to work on it; one that is idle has less than half of that."""


@dataclass(frozen=True)
class Case:
    """One network in one precision and kernel ("auto": the plan's own)."""

    network: str
    precision: str
    kernel: str = "auto"

    @property
    def name(self) -> str:
        return f"{self.network} {self.precision} {self.kernel}"


def cases(networks: Sequence[str] = NETS) -> list[Case]:
    """What is checked, in order: the plan's kernels in fp16, fp32 and bf16, then the other kernels."""
    own = [Case(net, precision) for precision in ("fp16", "fp32", "bf16") for net in NETS if net in networks]
    return own + [Case(*other) for other in OTHERS if other[0] in networks]


def timed_cases(networks: Sequence[str] = NETS) -> list[Case]:
    """What is timed: the plan's kernels in fp16, the library's products and the kernels that come next, fp32."""
    own = [Case(net, precision) for precision in ("fp16", "fp32") for net in NETS if net in networks]
    return own[: len(own) // 2] + [Case(*other) for other in OTHERS[:6] if other[0] in networks] + own[len(own) // 2 :]


def look(job: LookJob, emit: Emit) -> None:
    """What the GPU is, and why it cannot be used for this: "refused" is empty if it can."""
    device = torch.device(job["device"])
    state = gpu_state(device)  # before this process takes memory of its own
    facts = device_facts(device)
    found = {"name": facts.name, "capability": facts.gpu.capability, "multiprocessors": facts.gpu.n_sm}
    found |= {"shared_memory": facts.gpu.shared_memory, "state": state, "versions": library_versions("triton")}
    emit(found | {"refused": why_not(facts.name, facts.gpu.capability, {} if job["busy"] else state)})


def why_not(name: str, capability: tuple[int, int], state: Mapping[str, str]) -> str:
    """Why a GPU is no use for a first contact; nothing if it is. ``state``: as `gpu_state` has it."""
    if capability < (9, 0):
        return (
            f"{name} has compute capability {capability[0]}.{capability[1]}: an H100 or H200 (9.0) or newer is needed"
        )
    used, busy = (_number(state.get(key, "")) for key in ("memory.used", "utilization.gpu"))
    if used * 2**20 > BUSY_BYTES or busy > BUSY_PERCENT:
        return f"{name} is in use by others ({used:,.0f} MiB taken, {busy:.0f} % busy): wait, or pass --busy"
    return ""


def _number(text: str) -> float:
    """A number that nvidia-smi printed; 0 for what it does not know."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def contact(job: ContactJob, emit: Emit) -> None:
    """One case: how right it is, or with "timed" how fast."""
    device = torch.device(job["device"])
    model = report_network(job["network"], False).to(device)
    n_chains = job["timed_chains"] if job["timed"] else job["chains"]
    run = FusedRun(model, job["precision"], device, device_facts(device), n_chains, kernel=job["kernel"])
    (_time if job["timed"] else _check)(job, model, run, emit)


def _check(job: ContactJob, model: KaleidoMLP, run: FusedRun, emit: Emit) -> None:
    """Errors against the reference with and without jitter, and whether repeats have the same bits."""
    device, precision, kernel = torch.device(job["device"]), job["precision"], run.engine.plan.choice.kernel
    n_layers, last = model.spec.n_layers, max(STEPS)
    z0 = start_states(model, job["chains"], device)
    want = EngineRun(model, "reference", precision, device).sample(z0, 0, last).draws
    began = time.perf_counter()
    deviations = [measure_deviation(run(z0, step), want[:, step - 1], step) for step in STEPS]
    found: dict[str, Any] = {"runs": kernel, "first_s": round(time.perf_counter() - began, 2)}
    found |= largest(deviations).record()
    emit(found)
    refuse = (lambda *args: None) if job["compile_only"] else refuse_wrong
    for deviation in deviations:
        refuse(deviation, precision, n_layers)
    jittered = EngineRun(model, "triton", precision, device, kernel=kernel, **JITTER).sample(z0, 0, last).draws
    expected = EngineRun(model, "reference", precision, device, **JITTER).sample(z0, 0, last).draws
    deviation = measure_deviation(jittered[:, -1], expected[:, -1], last)
    found["jitter_error"] = deviation.error
    emit(found)
    refuse(deviation, precision, n_layers)
    first = run(z0, last).clone()
    found["same_bits"] = all(torch.equal(run(z0, last), first) for _ in range(job["repeats"]))
    emit(found)
    if not found["same_bits"]:
        raise InputError("the same work gave other bits")


def largest(deviations: Sequence[Deviation]) -> Deviation:
    """The one with the largest error; NaN is the largest of all."""
    return max(deviations, key=lambda deviation: (math.isnan(deviation.error), deviation.error))


def _time(job: ContactJob, model: KaleidoMLP, run: FusedRun, emit: Emit) -> None:
    """Milliseconds of 100,000 chains x 300 steps, from fewer steps where they take long."""
    n_steps = steps_within(run.steps, TIMING_SECONDS, torch.device(job["device"]))
    watch = stopwatch(torch.device(job["device"]))
    times = spread([watch(lambda: run.steps(n_steps)) / n_steps for _ in range(TIMINGS)])
    scale = 1e3 * MAX_STEPS * TABLE_CHAINS / job["timed_chains"]
    found: dict[str, Any] = {"runs": run.engine.plan.choice.kernel, "ms_100k_300": times.median * scale}
    found |= {"p20": times.p20 * scale, "p80": times.p80 * scale, "steps_timed": n_steps}
    found["launch_us"] = launch_microseconds(run)
    found["tflops"] = job["timed_chains"] * model.spec.flops_per_step / times.median / 1e12
    emit(found)
