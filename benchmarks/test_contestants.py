"""Engines and peers on every reference network, from the table of cases."""

from __future__ import annotations

import pytest
import torch

from kaleido_fast.benchmarking.cases import SIZES, BenchNetwork, make_size, steps_for
from kaleido_fast.benchmarking.contest import (
    check_contestant,
    engine_contestant,
    reference_states,
    resolve_engine,
    start_states,
)
from kaleido_fast.benchmarking.machine import describe_run
from kaleido_fast.benchmarking.peers import PEERS, Setting, build_peer, why_absent
from kaleido_fast.benchmarking.runner import ROUNDS
from kaleido_fast.benchmarking.timing import stopwatch
from kaleido_fast.errors import InputError
from kaleido_fast.names import ENGINES
from kaleido_fast.system.devices import resolve_device

QUICK_SHARE, QUICK_STEPS = 16, 3  # on a CPU: of the chains, and steps; to see that all run, not to quote
ENGINE_NAMES = [name for name in ENGINES if name != "auto"]


def build(name: str, setting: Setting):
    """An engine or a peer; skips, with the reason, what cannot run here."""
    if name in PEERS:
        reason = why_absent(PEERS[name], setting.device)
        if reason is None and setting.quick and not PEERS[name].in_quick:
            reason = "takes long to build"
        if reason:
            pytest.skip(f"{name}: {reason}")
        return build_peer(PEERS[name], setting)
    try:
        resolve_engine(setting.model, name, "fp32", setting.device)
    except InputError as problem:
        pytest.skip(str(problem))
    return engine_contestant(setting.model, name, "fp32", setting.device)


@pytest.mark.parametrize("name", [*ENGINE_NAMES, *PEERS])
@pytest.mark.parametrize("network", SIZES)
def test_speed(benchmark, request, network, name):
    quick = request.config.getoption("--quick")
    device = resolve_device(request.config.getoption("--bench-device"))
    network, threads = BenchNetwork(network, network=network), torch.get_num_threads()
    model = network.model().requires_grad_(False).to(device)
    n_chains, n_steps = make_size(network, model.spec, quick=quick, kind=device.type)
    if quick and device.type == "cpu":
        n_chains, n_steps = n_chains // QUICK_SHARE, QUICK_STEPS
    contestant = build(name, Setting(model, n_chains, device, threads, quick))
    z0 = start_states(model, n_chains, device)
    expected = reference_states(model, z0, contestant.precision, **contestant.proof_request)
    deviation = check_contestant(contestant, z0, expected, model.spec.n_layers)

    if n_steps is None:
        n_steps = steps_for(stopwatch(device)(contestant.timed(z0, 1)), quick=quick)

    def run() -> None:
        contestant.run(z0, n_steps)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.group = f"{network}: {n_chains:,} chains x {n_steps} steps"
    benchmark.pedantic(run, rounds=ROUNDS[quick], iterations=1, warmup_rounds=1)
    chain_steps = n_chains * n_steps
    seconds = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "chain_steps_per_second": chain_steps / seconds,
        "flops_per_second": chain_steps * model.spec.flops_per_step / seconds,
        **deviation.record(),
        **describe_run(device),
    }
