"""Ours and the peers on one network: built, and checked against the reference's states."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kaleido_fast.benchmarking.acceptance import Deviation
from kaleido_fast.benchmarking.contest import Contestant, check_contestant, reference_states, start_states
from kaleido_fast.benchmarking.gpu.subjects import precisions_on
from kaleido_fast.benchmarking.gpu.work import NO_TIME, Work, release
from kaleido_fast.benchmarking.peers import PEERS, Peer, Setting, build_peer, forget_compiled
from kaleido_fast.benchmarking.timing import Timed, stopwatch
from kaleido_fast.benchmarking.tuning import FusedRun, steps_within

ANY_ROWS = 4096  # chains of the checks and the first timing of a contestant that takes any number
LATEST_BUILD = 25.0  # seconds in which a peer may look for its best variant

Builder = Callable[[], tuple[Contestant, str]]
"""Makes a contestant and a few words about it."""


@dataclass
class Entry:
    """A contestant that may be timed: on ``z0``, for ``n_steps``, about ``seconds`` each time."""

    contestant: Contestant
    kind: str
    about: str
    z0: Tensor
    deviation: Deviation
    build_seconds: float
    n_steps: int = 1
    seconds: float = 0.0


def builders(work: Work) -> tuple[dict[str, Builder], dict[str, Builder]]:
    """Builders of (ours and the quick peers, peers that take long to build) by name."""
    quick: dict[str, Builder] = {f"triton-{name}": partial(_fused, work, name) for name in precisions_on(work.device)}
    quick["fast_sample-fp16"] = partial(_public, work, "fp16")
    slow: dict[str, Builder] = {}
    for name in work.job["peers"]:
        (quick if PEERS[name].in_quick else slow)[name] = partial(_peer, work, PEERS[name])
    return quick, slow


def _kind(name: str) -> str:
    return "peer" if name in PEERS else "public" if name.startswith("fast_sample") else "kernel"


def _fused(work: Work, precision: str) -> tuple[Contestant, str]:
    run = FusedRun(work.model, precision, work.device, work.facts, work.n_chains)
    return Contestant(run, precision=precision), run.engine.plan.choice.tile.name


def _public(work: Work, precision: str) -> tuple[Contestant, str]:
    from kaleido_fast.sampling import fast_sample

    def run(z0: Tensor, n_steps: int) -> Tensor:
        return fast_sample(
            work.model,
            n_chains=len(z0),
            burn_in=n_steps - 1,
            jitter=0.0,
            tol=None,
            precision=precision,
            engine="triton",
            device=work.device,
            init="uniform",
            seed=0,
        ).final

    return Contestant(run, precision=precision), "fast_sample() as a program calls it"


def _peer(work: Work, peer: Peer) -> tuple[Contestant, str]:
    seconds = max(1.0, min(LATEST_BUILD, work.left()))
    threads = torch.get_num_threads()
    setting = Setting(work.model, work.n_chains, work.device, threads, work.job["quick"], seconds=seconds)
    contestant = build_peer(peer, setting)
    return contestant, ": ".join(filter(None, (peer.about, contestant.about)))


def checked_entries(work: Work, builders: Mapping[str, Builder], share: float) -> dict[str, Entry]:
    """Contestants that reproduce the reference's states, with the work of one timing; the others' reasons are kept."""
    forget_compiled([PEERS[name] for name in builders if name in PEERS])
    all_z0 = start_states(work.model, work.n_chains, work.device)
    expected: dict[str, list[Tensor]] = {}
    entries: dict[str, Entry] = {}
    for name, build in builders.items():
        if name in work.record["failed"]:
            continue
        if work.left(share) < 0:
            work.record["failed"][name] = NO_TIME
            continue
        work.begin(name)
        try:
            entries[name] = _entry(work, name, build, all_z0, expected)
        except Exception as problem:  # of another library, or of a kernel that is wrong: a result too
            work.fail(name, problem)
        release(work.device)
    return entries


def _entry(work: Work, name: str, build: Builder, all_z0: Tensor, expected: dict[str, list[Tensor]]) -> Entry:
    began = time.perf_counter()
    contestant, about = build()
    built = time.perf_counter() - began
    any_rows = name in PEERS and PEERS[name].any_rows
    z0 = all_z0[:ANY_ROWS] if any_rows else all_z0
    key = f"{contestant.precision} {sorted(contestant.proof_request.items())} {len(z0)}"
    if key not in expected:
        expected[key] = reference_states(work.model, z0, contestant.precision, **contestant.proof_request)
    deviation = check_contestant(contestant, z0, expected[key], work.model.spec.n_layers)
    entry = Entry(contestant, _kind(name), about, z0, deviation, built)
    target, watch = work.job["timing_seconds"], stopwatch(work.device)
    if any_rows:
        one_step = watch(timed(entry)) * work.n_chains / len(z0)
        entry.z0 = all_z0[: max(min(ANY_ROWS, len(all_z0)), int(min(1.0, 5 * target / one_step) * work.n_chains))]

    def steps(n_steps: int) -> float:
        entry.n_steps = n_steps
        return timed(entry)()

    entry.n_steps = steps_within(steps, target, work.device)
    timed(entry)()  # a contestant that compiles for a number of steps has done so now
    entry.seconds = watch(timed(entry))
    return entry


def timed(entry: Entry) -> Timed:
    def run() -> float:
        entry.contestant.run(entry.z0, entry.n_steps)
        return entry.contestant.uncounted()

    return run
