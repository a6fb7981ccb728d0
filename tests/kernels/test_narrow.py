"""The narrow kernel under Triton's interpreter against plain torch: odd sizes, every variant, laws of independence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from kernel_oracle import (
    OPERANDS,
    TRIPLES,
    Kernel,
    assert_close,
    assert_halts_as_defined,
    assert_tiles_are_left_early,
    count_products,
    random_net,
    sample,
    use_true_bfloat16,
)

from kaleido_kernels.launch import LaunchRequest
from kaleido_kernels.narrow.kernel import launch_narrow
from kaleido_kernels.narrow.pack import pack_narrow
from kaleido_kernels.narrow.plan import narrow_layout
from kaleido_kernels.packing import device_precision
from kaleido_kernels.schedule import Schedule
from kaleido_kernels.shapes import ACTIVATIONS, BOUNDS, INITS, NOISES, NetShape
from kaleido_kernels.tile import Tile

NARROW = Kernel(Tile("narrow", 16), pack_narrow, launch_narrow)
PRIMES = NetShape((3, 13, 7, 11, 3))
FEW = Schedule(burn_in=1, n_draws=2, thin=2)


@pytest.mark.parametrize("n_chains", [1, 5, 16, 37])
@pytest.mark.parametrize(
    "widths", [(1, 10, 10, 1), (2, 50, 47, 50, 2), (17, 19, 17), (16, 16, 16), (64, 23, 64), (5, 5), (14, 14, 14)]
)
def test_odd_sizes(widths, n_chains):
    NARROW.check(NetShape(widths), LaunchRequest(n_chains, FEW, seed=3))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bound", BOUNDS)
def test_every_activation_and_bound(activation, bound):
    low, high = BOUNDS[bound]
    shape = NetShape((2, 11, 13, 2), activation, bound, low=low, high=high, negative_slope=0.2)
    NARROW.check(shape, LaunchRequest(7, FEW, seed=1))


@pytest.mark.parametrize("precision, atol, rtol", TRIPLES)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_one_step_of_every_precision(precision, atol, rtol, activation):
    shape = replace(PRIMES, activation=activation)
    request = LaunchRequest(19, Schedule(), seed=2)
    NARROW.check(shape, request, precision, atol, rtol, OPERANDS[precision])


@pytest.mark.parametrize("shape", [PRIMES, NetShape((16, 32, 16)), NetShape((2, 16, 2), "tanh")])
def test_one_step_of_bf16(monkeypatch, shape):
    use_true_bfloat16(monkeypatch)
    NARROW.check(shape, LaunchRequest(19, Schedule(), seed=2), "bf16", 2e-2, 0.0, torch.bfloat16)


def test_fp32_falls_back_to_ieee_outside_of_the_range_of_split_operands():
    layers = random_net(PRIMES)
    for factor in (1e5, 1e-4):
        scaled = [(layers[0][0] * factor, layers[0][1]), (layers[1][0] / factor, layers[1][1]), *layers[2:]]
        assert device_precision(scaled, "fp32") == "ieee"
        request = LaunchRequest(5, Schedule(), seed=2)
        got, want = NARROW.run(scaled, PRIMES, request), sample(scaled, PRIMES, request)
        assert_close(got.final, want.final, 3e-6, 1e-5, f"factor {factor}")


@pytest.mark.parametrize("bias", [(False,) * 4, (True, False, True, False), (False, True, True, True)])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_layers_without_bias(bias, activation):
    NARROW.check(replace(PRIMES, bias=bias, activation=activation), LaunchRequest(9, FEW))


def test_the_bias_is_folded_where_there_is_room_and_the_activation_allows():
    assert narrow_layout(NetShape((14, 30, 14))).bias == "fold"
    assert narrow_layout(NetShape((14, 31, 14))).bias == "mma"
    assert narrow_layout(NetShape((15, 30, 15))).bias == "mma"
    assert narrow_layout(NetShape((14, 30, 14), "silu")).bias == "mma"
    assert narrow_layout(NetShape((14, 30, 14), bias=(False, False))).bias == "none"


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("settle", [0, 1, 9])
@pytest.mark.parametrize("dim", [2, 7])
def test_jitter(noise, settle, dim):
    shape = NetShape((dim, 13, dim), low=-0.5, high=0.75)
    schedule = Schedule(burn_in=2, n_draws=2, thin=3, settle=settle, jitter=0.3, noise=noise)
    NARROW.check(shape, LaunchRequest(6, schedule, seed=2**64 - 3, first_chain=2**32 - 3), atol=6e-6)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("first_chain", [0, 2**32 - 3, 2**40])
@pytest.mark.parametrize("dim", [1, 5])
def test_start_noise_across_32_bits(init, first_chain, dim):
    shape = NetShape((dim, 13, dim), low=-0.25, high=1.0)
    NARROW.check(shape, LaunchRequest(7, Schedule(), seed=2**63 + 1, first_chain=first_chain, init=init))


def test_given_states_and_chain_ids():
    ids = torch.tensor([2**40, 3, 2**32 - 1, 2**32, 7])
    jittered = Schedule(burn_in=3, n_draws=1, thin=1, settle=1, jitter=0.2)
    NARROW.check(PRIMES, LaunchRequest(5, jittered, chain_ids=ids))
    start = torch.rand(5, 3) * 2 - 1
    NARROW.check(PRIMES, LaunchRequest(5, jittered, chain_ids=ids, start=start))


@pytest.mark.parametrize("burn_in, n_draws, thin", [(0, 1, 1), (0, 5, 1), (4, 1, 3), (3, 2, 5)])
def test_draws_and_thinning(burn_in, n_draws, thin):
    NARROW.check(PRIMES, LaunchRequest(3, Schedule(burn_in, n_draws, thin)))


def test_no_chains_and_no_draws():
    layers = random_net(PRIMES)
    empty = NARROW.run(layers, PRIMES, LaunchRequest(0, FEW))
    assert empty.final.shape == (0, 3)
    request = LaunchRequest(5, FEW, seed=1)
    kept, without = NARROW.run(layers, PRIMES, request), NARROW.run(layers, PRIMES, request, keep_draws=False)
    assert without.draws is None
    assert torch.equal(kept.final, without.final)


@pytest.mark.parametrize("jitter, noise", [(0.0, "normal"), (0.4, "normal"), (0.1, "upstream")])
@pytest.mark.parametrize("cuts", [[1], [4], [5], [3, 4, 8]])
def test_a_launch_cut_in_time_has_the_same_bits(jitter, noise, cuts):
    schedule = Schedule(burn_in=2, n_draws=3, thin=3, settle=1, jitter=jitter, noise=noise)
    NARROW.check_split(PRIMES, schedule, 5, cuts)


@pytest.mark.parametrize("noise", ["normal", "upstream"])
def test_chains_do_not_depend_on_neighbours_rows_or_tiles(ordered_products, noise):
    schedule = Schedule(burn_in=2, n_draws=2, thin=2, settle=1, jitter=0.3, noise=noise)
    layers = random_net(PRIMES)
    request = LaunchRequest(37, schedule, seed=4, first_chain=1000)
    whole = NARROW.run(layers, PRIMES, request)
    ids = 1000 + torch.randperm(37, generator=torch.Generator().manual_seed(0))
    shuffled = NARROW.run(layers, PRIMES, replace(request, chain_ids=ids))
    assert torch.equal(shuffled.final, whole.final[ids - 1000])
    assert torch.equal(shuffled.residual, whole.residual[ids - 1000])
    few = NARROW.run(layers, PRIMES, replace(request, n_chains=3, first_chain=1034))
    assert torch.equal(few.final, whole.final[34:])
    for block in (32, 64):
        other = NARROW.run(layers, PRIMES, request, tile=Tile("narrow", block))
        assert torch.equal(other.final, whole.final), f"block of {block}"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("noise", NOISES)
def test_nan_reaches_state_and_residual_of_its_chain_only(activation, noise):
    shape = replace(PRIMES, activation=activation)
    start = torch.zeros(5, 3)
    start[2, 1] = float("nan")
    request = LaunchRequest(5, Schedule(burn_in=2, jitter=0.3, settle=0, noise=noise), start=start)
    got = NARROW.run(random_net(shape), shape, request)
    bad = torch.tensor([False, False, True, False, False])
    assert torch.equal(got.final.isnan(), bad[:, None].expand(5, 3))
    assert torch.equal(got.residual.isnan(), bad)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_overflow_of_fp16_turns_to_nan():
    layers = random_net(PRIMES)
    layers[0] = (layers[0][0] * 3e4, layers[0][1])
    layers[1] = (layers[1][0] * 30, layers[1][1])
    got = NARROW.run(layers, PRIMES, LaunchRequest(16, Schedule(), seed=1), "fp16")
    assert got.final.isnan().any(dim=1).sum() > 8


def test_the_bound_holds():
    for bound, (low, high) in BOUNDS.items():
        shape = NetShape((3, 13, 3), bound=bound, low=low, high=high)
        final = NARROW.run(random_net(shape, gain=30.0), shape, LaunchRequest(64, FEW)).final
        assert low <= float(final.min()) and float(final.max()) <= high


def test_bad_input_is_refused_by_name():
    layers = random_net(PRIMES)
    request = LaunchRequest(5, FEW)
    with pytest.raises(ValueError, match="kernel 'stream'"):
        NARROW.run(layers, PRIMES, request, tile=Tile("stream", 64))
    with pytest.raises(ValueError, match=r"start is \(4, 3\)"):
        NARROW.run(layers, PRIMES, replace(request, start=torch.zeros(4, 3)))
    with pytest.raises(ValueError, match=r"chain_ids .* torch.int32"):
        NARROW.run(layers, PRIMES, replace(request, chain_ids=torch.zeros(5, dtype=torch.int32)))
    with pytest.raises(ValueError, match="precision is 'fp8'"):
        NARROW.run(layers, PRIMES, request, "fp8")
    with pytest.raises(ValueError, match="'fp16': the largest weight is"):
        NARROW.run([(layers[0][0] * 1e6, layers[0][1]), *layers[1:]], PRIMES, request, "fp16")
    with pytest.raises(ValueError, match="layer 1: weight holds nan"):
        NARROW.run([layers[0], (layers[1][0] * float("nan"), layers[1][1]), *layers[2:]], PRIMES, request)
    with pytest.raises(ValueError, match="start is None"):
        LaunchRequest(5, FEW, first_step=1)
    with pytest.raises(ValueError, match="run_steps is 6"):
        LaunchRequest(5, FEW, run_steps=6)


@pytest.mark.parametrize("shape", [PRIMES, NetShape((2, 16, 2), "tanh")])
@pytest.mark.parametrize(("every", "patience"), [(4, 1), (5, 2), (1, 3)])
def test_chains_halt_inside_a_launch_as_defined(ordered_products, shape, every, patience):
    assert_halts_as_defined(NARROW.run, shape, every, patience)


@pytest.mark.interpreter
def test_tiles_whose_chains_have_halted_are_left(monkeypatch):
    products = count_products(monkeypatch)
    assert_tiles_are_left_early(NARROW.run, PRIMES, products)
