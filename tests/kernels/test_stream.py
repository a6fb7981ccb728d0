"""The stream kernel under Triton's interpreter against plain torch: one tile a layer and two, every variant."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from kernel_oracle import (
    OPERANDS,
    TRIPLES,
    Kernel,
    assert_halts_as_defined,
    assert_tiles_are_left_early,
    count_products,
    random_net,
    use_true_bfloat16,
)

from kaleido_kernels.launch import LaunchRequest
from kaleido_kernels.schedule import Schedule
from kaleido_kernels.shapes import ACTIVATIONS, BOUNDS, INITS, NOISES, NetShape
from kaleido_kernels.stream.kernel import launch_stream
from kaleido_kernels.stream.pack import pack_stream
from kaleido_kernels.stream.plan import stream_layout
from kaleido_kernels.tile import Tile

STREAM = Kernel(Tile("stream", 16, 4, 2), pack_stream, launch_stream)
WARP_GROUPS = Kernel(Tile("stream", 128, 8, 3), pack_stream, launch_stream)
"""The tile that the plan takes. On GPUs its products are another instruction, with operands in registers."""
SMALL = NetShape((3, 13, 7, 11, 3))  # one tile a layer
HALVES = NetShape((7, 131, 137, 7))  # two tiles a layer, one in the last
WIDE_STATE = NetShape((151, 139, 151))  # two tiles a layer, two in the last
FEW = Schedule(burn_in=1, n_draws=2, thin=2)


@pytest.mark.parametrize("n_chains", [1, 19])
@pytest.mark.parametrize(
    "widths", [(1, 10, 10, 1), (17, 61, 53, 17), (128, 67, 128), (7, 131, 137, 7), (151, 139, 151), (5, 5), (256, 256)]
)
def test_odd_sizes(widths, n_chains):
    STREAM.check(NetShape(widths), LaunchRequest(n_chains, FEW, seed=3), atol=5e-6)


def test_layouts():
    assert stream_layout(SMALL).n_tiles == 4
    assert stream_layout(HALVES).n_tiles == 5
    assert stream_layout(WIDE_STATE).n_tiles == 4
    with pytest.raises(ValueError, match="300 wide"):
        stream_layout(NetShape((3, 300, 3)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bound", BOUNDS)
def test_every_activation_and_bound(activation, bound):
    low, high = BOUNDS[bound]
    shape = NetShape((2, 11, 13, 2), activation, bound, low=low, high=high, negative_slope=0.2)
    STREAM.check(shape, LaunchRequest(7, FEW, seed=1))


@pytest.mark.parametrize("precision, atol, rtol", TRIPLES)
@pytest.mark.parametrize("shape", [SMALL, HALVES])
def test_one_step_of_every_precision(precision, atol, rtol, shape):
    STREAM.check(shape, LaunchRequest(19, Schedule(), seed=2), precision, atol, rtol, OPERANDS[precision])


@pytest.mark.parametrize("shape", [SMALL, HALVES])
def test_one_step_of_bf16(monkeypatch, shape):
    use_true_bfloat16(monkeypatch)
    STREAM.check(shape, LaunchRequest(19, Schedule(), seed=2), "bf16", 2e-2, 0.0, torch.bfloat16)


@pytest.mark.parametrize("bias", [(False,) * 4, (True, False, True, False)])
def test_layers_without_bias(bias):
    STREAM.check(replace(SMALL, bias=bias), LaunchRequest(9, FEW))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("settle", [0, 1, 9])
@pytest.mark.parametrize("dim", [2, 7])
def test_jitter(noise, settle, dim):
    shape = NetShape((dim, 13, dim), low=-0.5, high=0.75)
    schedule = Schedule(burn_in=2, n_draws=2, thin=3, settle=settle, jitter=0.3, noise=noise)
    STREAM.check(shape, LaunchRequest(6, schedule, seed=2**64 - 3, first_chain=2**32 - 3), atol=6e-6)


@pytest.mark.parametrize("noise", NOISES)
def test_jitter_of_a_state_in_two_tiles(noise):
    schedule = Schedule(burn_in=2, n_draws=1, thin=1, settle=0, jitter=0.3, noise=noise)
    STREAM.check(WIDE_STATE, LaunchRequest(5, schedule, seed=9), atol=1e-5)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("first_chain", [2**32 - 3, 2**40])
def test_start_noise_across_32_bits(init, first_chain):
    shape = NetShape((37, 13, 37), low=-0.25, high=1.0)
    STREAM.check(shape, LaunchRequest(7, Schedule(), seed=2**63 + 1, first_chain=first_chain, init=init))


def test_given_states_and_chain_ids():
    ids = torch.tensor([2**40, 3, 2**32 - 1, 2**32, 7])
    jittered = Schedule(burn_in=3, n_draws=1, thin=1, settle=1, jitter=0.2)
    STREAM.check(SMALL, LaunchRequest(5, jittered, chain_ids=ids))
    STREAM.check(SMALL, LaunchRequest(5, jittered, chain_ids=ids, start=torch.rand(5, 3) * 2 - 1))


@pytest.mark.parametrize("burn_in, n_draws, thin", [(0, 1, 1), (0, 5, 1), (4, 1, 3), (3, 2, 5)])
def test_draws_and_thinning(burn_in, n_draws, thin):
    STREAM.check(SMALL, LaunchRequest(3, Schedule(burn_in, n_draws, thin)))


def test_no_chains_and_no_draws():
    layers = random_net(SMALL)
    assert STREAM.run(layers, SMALL, LaunchRequest(0, FEW)).final.shape == (0, 3)
    request = LaunchRequest(5, FEW, seed=1)
    kept, without = STREAM.run(layers, SMALL, request), STREAM.run(layers, SMALL, request, keep_draws=False)
    assert torch.equal(kept.final, without.final)


@pytest.mark.parametrize("jitter, noise", [(0.0, "normal"), (0.4, "normal"), (0.1, "upstream")])
@pytest.mark.parametrize("cuts", [[1], [4], [5], [3, 4, 8]])
def test_a_launch_cut_in_time_has_the_same_bits(jitter, noise, cuts):
    schedule = Schedule(burn_in=2, n_draws=3, thin=3, settle=1, jitter=jitter, noise=noise)
    STREAM.check_split(SMALL, schedule, 5, cuts)


@pytest.mark.parametrize("shape", [HALVES, WIDE_STATE])
def test_a_launch_of_two_tiles_a_layer_cut_in_time_has_the_same_bits(shape):
    STREAM.check_split(shape, Schedule(burn_in=2, n_draws=2, thin=2), 3, [1, 4])


@pytest.mark.parametrize("shape", [SMALL, HALVES])
def test_chains_do_not_depend_on_neighbours_rows_or_tiles(ordered_products, shape):
    schedule = Schedule(burn_in=2, n_draws=2, thin=2, settle=1, jitter=0.3)
    layers = random_net(shape)
    request = LaunchRequest(37, schedule, seed=4, first_chain=1000)
    whole = STREAM.run(layers, shape, request)
    ids = 1000 + torch.randperm(37, generator=torch.Generator().manual_seed(0))
    shuffled = STREAM.run(layers, shape, replace(request, chain_ids=ids))
    assert torch.equal(shuffled.final, whole.final[ids - 1000])
    assert torch.equal(shuffled.residual, whole.residual[ids - 1000])
    few = STREAM.run(layers, shape, replace(request, n_chains=3, first_chain=1034))
    assert torch.equal(few.final, whole.final[34:])
    # From 64 rows a warp on GPUs have products of their own, which add in another order.
    for tile in (Tile("stream", 32), Tile("stream", 32, 8)):
        other = STREAM.run(layers, shape, request, tile=tile)
        assert torch.equal(other.final, whole.final), tile.name


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("shape", [SMALL, HALVES])
def test_nan_reaches_state_and_residual_of_its_chain_only(shape, noise):
    start = torch.zeros(5, shape.dim)
    start[2, 1] = float("nan")
    request = LaunchRequest(5, Schedule(burn_in=2, jitter=0.3, settle=0, noise=noise), start=start)
    got = STREAM.run(random_net(shape), shape, request)
    bad = torch.tensor([False, False, True, False, False])
    assert torch.equal(got.final.isnan(), bad[:, None].expand(5, shape.dim))
    assert torch.equal(got.residual.isnan(), bad)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
@pytest.mark.parametrize("shape", [SMALL, HALVES])
def test_the_bound_holds(shape):
    for bound, (low, high) in BOUNDS.items():
        bounded = replace(shape, bound=bound, low=low, high=high)
        final = STREAM.run(random_net(bounded, gain=30.0), bounded, LaunchRequest(5, FEW)).final
        assert low <= float(final.min()) and float(final.max()) <= high


@pytest.mark.parametrize("shape", [NetShape((37, 101, 37)), HALVES, WIDE_STATE])
@pytest.mark.parametrize("noise", [None, *NOISES])
def test_the_tile_that_is_taken(shape, noise):
    jitter, noise = (0.0, "normal") if noise is None else (0.3, noise)
    schedule = Schedule(burn_in=1, n_draws=2, thin=2, settle=0, jitter=jitter, noise=noise)
    request = LaunchRequest(131, schedule, seed=7, first_chain=2**32 - 3)
    WARP_GROUPS.check(shape, request, "fp16", 2e-2, 0.0, torch.float16)
    if noise == "uniform":
        return
    WARP_GROUPS.check_split(shape, schedule, 131, [1, 4], "fp16")


def test_chains_of_the_tile_that_is_taken_do_not_depend_on_their_rows():
    shape, request = HALVES, LaunchRequest(131, Schedule(burn_in=2, jitter=0.3), seed=7, first_chain=2**32 - 3)
    layers = random_net(shape)
    ids = request.first_chain + torch.randperm(131, generator=torch.Generator().manual_seed(0))
    whole = WARP_GROUPS.run(layers, shape, request, "fp16")
    shuffled = WARP_GROUPS.run(layers, shape, replace(request, chain_ids=ids), "fp16")
    assert torch.equal(shuffled.final, whole.final[ids - request.first_chain])


def test_the_tile_that_is_taken_in_split_fp32():
    shape = NetShape((37, 101, 37))
    schedule = Schedule(burn_in=1, n_draws=2, thin=2, settle=0, jitter=0.1)
    WARP_GROUPS.check(shape, LaunchRequest(131, schedule, seed=7), atol=1e-5)


@pytest.mark.parametrize("shape", [NetShape((37, 101, 37)), HALVES])
def test_chains_halt_inside_a_launch_of_the_tile_that_is_taken(shape):
    def in_fp16(layers, shape, request):
        return WARP_GROUPS.run(layers, shape, request, "fp16")

    assert_halts_as_defined(in_fp16, shape, 4, 1)


def test_bad_input_is_refused_by_name():
    layers = random_net(SMALL)
    with pytest.raises(ValueError, match="kernel 'narrow'"):
        STREAM.run(layers, SMALL, LaunchRequest(5, FEW), tile=Tile("narrow", 64))
    with pytest.raises(ValueError, match="needs about 286 registers a thread, the GPU has 255"):
        STREAM.run(random_net(HALVES), HALVES, LaunchRequest(5, FEW), tile=Tile("stream", 64))
    long = LaunchRequest(5, Schedule(burn_in=2**30))
    with pytest.raises(ValueError, match="launch at most"):
        STREAM.run(layers, SMALL, long)


@pytest.mark.parametrize("shape", [SMALL, HALVES])
@pytest.mark.parametrize(("every", "patience"), [(4, 1), (5, 2), (1, 3)])
def test_chains_halt_inside_a_launch_as_defined(ordered_products, shape, every, patience):
    assert_halts_as_defined(STREAM.run, shape, every, patience)


@pytest.mark.interpreter
def test_tiles_whose_chains_have_halted_are_left(monkeypatch):
    products = count_products(monkeypatch)
    assert_tiles_are_left_early(STREAM.run, SMALL, products)
