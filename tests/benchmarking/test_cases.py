"""The work that is timed: networks and their sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kaleido_fast.benchmarking import cases, contest
from kaleido_fast.benchmarking.cases import SIZES, BenchNetwork
from kaleido_fast.errors import InputError
from kaleido_fast.presets import NETWORKS

from conftest import random_mlp  # isort: skip
from small_bench import CPU


def size(name: str, **options) -> tuple[int, int | None]:
    network, spec = BenchNetwork(name, network=name), cases.network_spec(name)
    return cases.make_size(network, spec, **{"quick": True, "kind": "cpu", **options})


def test_the_table_of_sizes_covers_the_six_networks_at_the_size_that_is_quoted():
    assert tuple(SIZES) == tuple(NETWORKS)
    assert [size(name)[0] for name in SIZES] == [100_000] * 3 + [20_000, 4096, 512]
    for name in SIZES:
        assert size(name, quick=True) == size(name, quick=False), "a quick run takes fewer steps, not fewer chains"
        quick, full = (size(name, quick=quick, kind="cuda") for quick in (True, False))
        assert quick[0] == full[0] == 100_000
        assert 2 <= quick[1] < full[1], "one step is no recursion"


@given(st.floats(1e-9, 1e4), st.booleans())
def test_a_timing_has_enough_steps_or_seconds_and_not_one_step_more(step_seconds, quick):
    n_steps = cases.steps_for(step_seconds, quick=quick)
    enough = [
        steps * step_seconds >= cases.SHORTEST_SECONDS * (1 - 1e-9)
        and (steps >= cases.LEAST_STEPS[quick] or steps * step_seconds >= cases.LEAST_SECONDS[quick] * (1 - 1e-9))
        for steps in (n_steps, n_steps - 1)
    ]
    assert n_steps >= 1 and enough[0]
    assert n_steps == 1 or not enough[1]


def test_options_win_over_the_table():
    assert size("digits", n_chains=7, n_steps=3) == size("digits", n_chains=7, n_steps=3, kind="cuda") == (7, 3)
    assert size("digits", n_chains=7) == (7, None)
    with pytest.raises(InputError, match="chains is 0"):
        size("digits", n_chains=0)


def test_a_checkpoint_takes_about_the_work_of_the_nearest_network():
    spec = random_mlp(64, 250, 250, 64).spec
    mine = BenchNetwork("mine", path="mine.safetensors")
    n_chains, n_steps = cases.make_size(mine, spec, quick=True, kind="cuda")
    work = n_chains * n_steps * spec.flops_per_step
    want = 100_000 * SIZES["deep128"].gpu_quick * cases.network_spec("deep128").flops_per_step
    assert 0.5 < work / want < 2
    assert cases.make_size(mine, spec, quick=True, kind="cpu") == (SIZES["deep128"].n_chains, None)


def test_random_networks_are_seeded_and_keep_moving_without_overflow():
    for name in ("points1d", "points2d", "digits", "deep128"):
        model, again = cases.random_network(name), cases.random_network(name)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        states = contest.reference_states(model, contest.start_states(model, 50, CPU))
        assert all(bool(torch.isfinite(state).all()) for state in states)
        assert float(states[0].std(dim=0).mean()) > 0.01, "all chains alike: a check would compare constants"
