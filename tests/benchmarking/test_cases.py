"""The work that is timed: networks and their sizes."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kaleido_fast.benchmarking import cases, contest
from kaleido_fast.benchmarking.cases import SIZES, BenchNetwork, Size
from kaleido_fast.errors import InputError
from kaleido_fast.presets import NETWORKS

from conftest import random_mlp  # isort: skip
from small_bench import CPU


def test_the_table_of_sizes_covers_the_six_networks():
    assert tuple(SIZES) == tuple(NETWORKS)
    for name in SIZES:
        spec, network = cases.network_spec(name), BenchNetwork(name, network=name)
        quick, full = (cases.make_size(network, spec, quick=quick, kind="cpu", threads=2) for quick in (True, False))
        assert (quick, full) == (SIZES[name].quick, SIZES[name].full)
        assert quick.n_chains * quick.n_steps < full.n_chains * full.n_steps
        assert full.n_steps >= 2, "one step is no recursion"


def test_more_cores_take_more_steps_and_options_win():
    spec, network = cases.network_spec("digits"), BenchNetwork("digits", network="digits")
    size = partial(cases.make_size, network, spec, quick=True, kind="cpu")
    assert size(threads=8).n_steps == 4 * SIZES["digits"].quick.n_steps
    assert size(threads=1).n_steps == SIZES["digits"].quick.n_steps
    assert size(threads=8, n_chains=7, n_steps=3) == Size(7, 3)
    assert cases.scaled(Size(200, 2), "cuda", 2).n_chains == 100_000
    with pytest.raises(InputError, match="chains is 0"):
        size(threads=8, n_chains=0)


def test_a_checkpoint_takes_about_the_work_of_the_nearest_network():
    spec = random_mlp(64, 250, 250, 64).spec
    size = cases.make_size(BenchNetwork("mine", path="mine.safetensors"), spec, quick=True, kind="cpu", threads=2)
    work = size.n_chains * size.n_steps * spec.flops_per_step
    base = SIZES["deep128"].quick
    want = base.n_chains * base.n_steps * cases.network_spec("deep128").flops_per_step
    assert 0.5 < work / want < 2


def test_random_networks_are_seeded_and_keep_moving_without_overflow():
    for name in ("points1d", "points2d", "digits", "deep128"):
        model, again = cases.random_network(name), cases.random_network(name)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        states = contest.reference_states(model, contest.start_states(model, 50, CPU))
        assert all(bool(torch.isfinite(state).all()) for state in states)
        assert float(states[0].std(dim=0).mean()) > 0.01, "all chains alike: a check would compare constants"
