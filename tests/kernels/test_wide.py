"""The wide kernel under Triton's interpreter against plain torch: odd sizes, every variant, laws of independence."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")

from kernel_oracle import (
    DEVICE,
    FP32,
    OPERANDS,
    TRIPLES,
    assert_agree,
    assert_close,
    assert_halts_as_defined,
    assert_tiles_are_left_early,
    count_products,
    empty_outputs,
    moved_outputs,
    on_device,
    random_net,
    sample,
    use_true_bfloat16,
)

from kaleido_kernels.launch import LaunchRequest, Outputs
from kaleido_kernels.packing import device_precision
from kaleido_kernels.precision import operand_parts
from kaleido_kernels.schedule import Schedule
from kaleido_kernels.shapes import NetShape
from kaleido_kernels.wide.kernel import launch_wide
from kaleido_kernels.wide.pack import WideScratch, allocate_scratch, pack_wide
from kaleido_kernels.wide.plan import WideTile, program_blocks, wide_layers

# NaN or garbage that meets a product is a read of memory that nobody wrote, whether or not its result is used.
pytestmark = pytest.mark.filterwarnings("error:invalid value encountered in matmul", "error:overflow encountered")

SMALL = WideTile(rows=16, cols=32, last_cols=32, inner=16, warps=4, stages=2, use_tma=False)
COPIED = replace(SMALL, use_tma=True)
PRIMES = NetShape((7, 37, 17, 7))
# Interpreted fp16 rounds each product's operands as the device does; one step, since longer chains part ways.
FP16 = ("fp16", 4e-3 if DEVICE.type == "cuda" else 3e-3, 0.0)
TF32 = next(triple for triple in TRIPLES if triple[0] == "tf32")


def poisoned(packed, n_programs: int = 2) -> WideScratch:
    """Scratch full of NaN: a value read before it is written shows."""
    scratch = allocate_scratch(packed, n_programs)
    for tensor in (scratch.act, scratch.raw, scratch.state):
        tensor.fill_(float("nan"))
    return scratch


def run(
    layers, shape: NetShape, request: LaunchRequest, *, tile=SMALL, precision="fp32", programs=2, keep_draws=True
) -> Outputs:
    if tile.use_tma and DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no copy engine")
    packed = pack_wide(layers, shape, tile, precision, DEVICE)
    outputs = empty_outputs(request, shape, keep_draws=keep_draws)
    launch_wide(packed, on_device(request), outputs, poisoned(packed, programs))
    return moved_outputs(outputs, "cpu")


def check(shape: NetShape, request: LaunchRequest, triple=FP32, **options) -> Outputs:
    """Runs both and compares draws, final states and residuals."""
    precision, atol, rtol = triple
    layers = random_net(shape)
    got = run(layers, shape, request, precision=precision, **options)
    want = sample(layers, shape, request, OPERANDS[precision])
    assert_agree(got, want, atol, rtol, f"{shape.widths} {precision}")
    return got


@pytest.mark.parametrize("triple", [FP32, FP16], ids=lambda triple: triple[0])
@pytest.mark.parametrize("tile", [SMALL, COPIED], ids=["pointers", "copy engine"])
@pytest.mark.parametrize("widths", [(1, 11, 1), (7, 37, 17, 7), (67, 41, 67), (5, 5), (3, 2, 71, 2, 3)], ids=str)
def test_one_step_equals_torch(widths, tile, triple):
    check(NetShape(widths), LaunchRequest(19, Schedule()), triple, tile=tile)


@pytest.mark.parametrize("tile", [SMALL, COPIED], ids=["pointers", "copy engine"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_one_step_of_tf32(tile, activation):
    check(replace(PRIMES, activation=activation), LaunchRequest(19, Schedule()), TF32, tile=tile)


@pytest.mark.parametrize("tile", [SMALL, COPIED], ids=["pointers", "copy engine"])
@pytest.mark.parametrize("shape", [PRIMES, replace(PRIMES, activation="silu")], ids=["relu", "silu"])
def test_one_step_of_bf16(monkeypatch, tile, shape):
    use_true_bfloat16(monkeypatch)
    check(shape, LaunchRequest(19, Schedule()), ("bf16", 2e-2, 0.0), tile=tile)


@pytest.mark.parametrize("factor", [1e5, 1e-4])
def test_fp32_falls_back_to_ieee_outside_of_the_range_of_split_operands(factor):
    layers = random_net(PRIMES)
    scaled = [(layers[0][0] * factor, layers[0][1]), (layers[1][0] / max(factor, 1), layers[1][1]), *layers[2:]]
    assert device_precision(scaled, "fp32") == "ieee"
    request = LaunchRequest(19, Schedule(burn_in=1, n_draws=2, settle=0, jitter=0.1), seed=2)
    got, want = run(scaled, PRIMES, request), sample(scaled, PRIMES, request)
    assert_close(got.final, want.final, 3e-6, 1e-5, f"factor {factor}")


@pytest.mark.parametrize("n_chains", [1, 16, 35])
def test_several_steps_and_draws_equal_torch(n_chains):
    check(PRIMES, LaunchRequest(n_chains, Schedule(burn_in=2, n_draws=2, thin=2)))


# No hidden layer; several tiles of the last one; its last tile wider than what is stored of a state.
QUIET_ENDS = [
    ((67, 67), SMALL),
    ((67, 41, 67), SMALL),
    ((70, 41, 70), replace(SMALL, cols=128, last_cols=256)),
    ((70, 41, 70), replace(COPIED, last_cols=64)),
]


@pytest.mark.parametrize(("widths", "tile"), QUIET_ENDS, ids=str)
def test_steps_that_only_make_the_next_input_equal_torch_and_those_that_end_a_launch(widths, tile):
    """A launch of one step keeps its states; in a longer one most steps only make the next input."""
    shape = NetShape(widths)
    layers = random_net(shape)
    request = LaunchRequest(19, Schedule(burn_in=3, n_draws=2, thin=2))
    whole = check(shape, request, tile=tile)
    start, residual = None, None
    for step in range(request.schedule.n_steps):
        one = run(layers, shape, replace(request, first_step=step, run_steps=1, start=start), tile=tile)
        start, residual = one.final, one.residual
    assert torch.equal(whole.final, start) and torch.equal(whole.residual, residual)


@pytest.mark.parametrize("noise", ["normal", "uniform"])
def test_settled_steps_between_jittered_ones_equal_torch(noise):
    schedule = Schedule(burn_in=2, n_draws=2, thin=7, settle=4, jitter=0.3, noise=noise)
    check(NetShape((67, 41, 67)), LaunchRequest(19, schedule, seed=3), ("fp32", 6e-6, 2e-5))


def test_steps_between_checks_give_the_defined_states():
    shape = NetShape((67, 41, 67))
    assert_halts_as_defined(lambda layers, shape, request: run(layers, shape, request), shape, 5, 2)


def test_no_chain_is_no_work():
    outputs = run(random_net(PRIMES), PRIMES, LaunchRequest(0, Schedule(n_draws=3)))
    assert outputs.final.shape == (0, 7) and outputs.residual.shape == (0,)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "tanh"])
@pytest.mark.parametrize("bound", ["tanh", "sigmoid"])
def test_every_activation_and_bound(activation, bound):
    low = {"tanh": -1.0, "sigmoid": 0.0}[bound]
    shape = NetShape((5, 19, 5), activation, bound, negative_slope=0.2, low=low)
    got = check(shape, LaunchRequest(5, Schedule(burn_in=1)), ("fp32", 5e-6, 1e-5))
    assert got.final.min() >= low and got.final.max() <= 1.0


def test_layers_without_bias():
    check(NetShape((5, 19, 13, 5), bias=(False, True, False)), LaunchRequest(5, Schedule()))


@pytest.mark.parametrize("noise", ["normal", "uniform", "upstream"])
@pytest.mark.parametrize("dim", [3, 13])
def test_jitter_follows_the_schedule(noise, dim):
    schedule = Schedule(burn_in=2, n_draws=2, thin=3, settle=1, jitter=0.3, noise=noise)
    shape = NetShape((dim, 19, dim), low=-0.9, high=0.7)
    check(shape, LaunchRequest(9, schedule, seed=2**63 + 5), ("fp32", 1e-5, 1e-5))


def test_settle_longer_than_a_draw_means_no_jitter():
    calm = check(PRIMES, LaunchRequest(3, Schedule(burn_in=1, thin=2, settle=9, jitter=0.5)))
    plain = check(PRIMES, LaunchRequest(3, Schedule(burn_in=1, thin=2)))
    assert torch.equal(calm.final, plain.final)


@pytest.mark.parametrize("init", ["uniform", "normal"])
def test_chain_ids_across_the_32_bit_border(init, ordered_products):
    request = LaunchRequest(5, Schedule(thin=3, settle=0, jitter=0.2), first_chain=2**32 - 2, init=init, seed=3)
    by_row = check(PRIMES, request, ("fp32", 1e-5, 1e-5))
    ids = torch.tensor([2**32 + 2, 2**40 + 1, 2**32 - 2])
    by_id = check(PRIMES, replace(request, n_chains=3, chain_ids=ids, first_chain=0), ("fp32", 1e-5, 1e-5))
    assert torch.equal(by_id.final[0], by_row.final[4]) and torch.equal(by_id.final[2], by_row.final[0])


def test_given_states_and_a_split_in_time_change_no_bit():
    layers = random_net(PRIMES)
    schedule = Schedule(burn_in=1, n_draws=2, thin=2, settle=1, jitter=0.3)
    whole = run(layers, PRIMES, LaunchRequest(17, schedule, seed=5))
    first = run(layers, PRIMES, LaunchRequest(17, schedule, seed=5, run_steps=2))
    rest = run(layers, PRIMES, LaunchRequest(17, schedule, seed=5, first_step=2, start=first.final))
    assert whole.draws is not None and rest.draws is not None
    assert torch.equal(rest.final, whole.final) and torch.equal(rest.residual, whole.residual)
    assert torch.equal(rest.draws, whole.draws), "both draws end after the split"


def test_draws_that_end_outside_the_launch_are_left_alone():
    layers = random_net(PRIMES)
    part = run(layers, PRIMES, LaunchRequest(3, Schedule(n_draws=3, thin=2), run_steps=3))
    assert part.draws is not None
    assert part.draws[:, 0].isfinite().all() and part.draws[:, 1:].isnan().all()


def test_neighbours_rows_and_programs_change_no_bit(ordered_products):
    layers = random_net(PRIMES)
    request = LaunchRequest(35, Schedule(thin=2, settle=0, jitter=0.3), seed=1)
    together = run(layers, PRIMES, request, programs=1)
    apart = run(layers, PRIMES, request, programs=3)
    assert torch.equal(together.final, apart.final)
    ids = torch.randperm(35, generator=torch.Generator().manual_seed(0))
    mixed = run(layers, PRIMES, replace(request, chain_ids=ids))
    assert torch.equal(mixed.final, together.final[ids]) and torch.equal(mixed.residual, together.residual[ids])


@pytest.mark.parametrize("tile", [replace(SMALL, rows=32), replace(SMALL, cols=64, last_cols=16)], ids=str)
def test_the_tile_changes_no_more_than_rounding(tile):
    layers = random_net(PRIMES)
    request = LaunchRequest(19, Schedule(burn_in=1), seed=1)
    assert_close(run(layers, PRIMES, request, tile=tile).final, run(layers, PRIMES, request).final, 1e-6, 0, str(tile))


def test_nan_stays_in_its_chain_and_is_reported():
    start = torch.zeros(5, 7)
    start[2, 6] = float("nan")
    got = check(PRIMES, LaunchRequest(5, Schedule(n_draws=2, settle=0, jitter=0.1), start=start), ("fp32", 1e-5, 1e-5))
    assert got.residual.isnan().tolist() == [False, False, True, False, False]


def test_final_may_be_written_without_draws():
    layers, request = random_net(PRIMES), LaunchRequest(5, Schedule(n_draws=2))
    outputs = run(layers, PRIMES, request, keep_draws=False)
    assert outputs.draws is None
    assert_close(outputs.final, sample(layers, PRIMES, request).final, 3e-6, 1e-5, "final")


def test_packed_blocks_hold_the_weights():
    """Block (n, k) of a layer is the contiguous piece W[n cols, k inner], its low part right behind it."""
    layers = random_net(PRIMES)
    packed = pack_wide(layers, PRIMES, SMALL, "fp32")
    assert packed.precision == "fp16x3"
    blocks = packed.weight.reshape(-1, 2, SMALL.cols, SMALL.inner).float().sum(1)
    layer = wide_layers(PRIMES, SMALL)[1]  # 37 -> 17: one tile of outputs, three blocks of inputs
    assert (layer.col_tiles, layer.inner_blocks) == (1, 3)
    third = blocks[layer.weight_block + 2]
    assert_close(third[:17, :5], layers[1][0][:, 32:37], 1e-6, 0, "weights")
    assert not third[17:].any() and not third[:, 5:].any(), "padding is zero"


def test_no_layer_writes_what_it_reads():
    for widths in [(7, 7), (7, 37, 7), (7, 64, 9, 100, 33, 7)]:
        shape = NetShape(widths)
        table = wide_layers(shape, SMALL)
        for layer, following in pairwise(table):
            assert following.in_block == layer.out_block
        # Where the last layer of a quiet step puts the next input; without a hidden layer none is quiet.
        quiet_end = set(range(table[1].in_block)) if len(table) > 1 else set()
        assert not quiet_end & set(range(table[-1].in_block, table[-1].in_block + table[-1].inner_blocks))
        for layer in table[:-1]:
            reads = set(range(layer.in_block, layer.in_block + layer.inner_blocks))
            n_out = layer.col_tiles * SMALL.cols // SMALL.inner
            writes = set(range(layer.out_block, layer.out_block + n_out))
            assert not reads & writes and max(writes) < program_blocks(shape, SMALL)


@pytest.mark.parametrize(
    "options", [{"rows": 48}, {"cols": 16, "inner": 32}, {"last_cols": 16, "inner": 32}, {"warps": 3}, {"stages": 0}]
)
def test_impossible_tiles_are_refused(options):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        WideTile(**options)


def test_weights_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="layer 1: weight is"):
        pack_wide(random_net(NetShape((7, 37, 18, 7))), PRIMES, SMALL, "fp32")


def test_parts_of_each_precision():
    assert [operand_parts(precision) for precision in ("fp16x3", "ieee", "tf32", "fp16", "bf16")] == [2, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("shape", "every", "patience"),
    [(PRIMES, 4, 1), (PRIMES, 1, 3), (NetShape((70, 33, 70)), 1, 2)],  # the last has two state blocks
)
def test_chains_halt_inside_a_launch_as_defined(ordered_products, shape, every, patience):
    assert_halts_as_defined(run, shape, every, patience)


@pytest.mark.interpreter
def test_tiles_whose_chains_have_halted_are_left(monkeypatch):
    products = count_products(monkeypatch)
    assert_tiles_are_left_early(run, PRIMES, products)
