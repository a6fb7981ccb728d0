"""Flows in every kernel against plain torch: steps by parts, draws that start anew, laws of independence."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")

from kernel_oracle import (
    COMPILED,
    DEVICE,
    FP32,
    OPERANDS,
    TRIPLES,
    Layers,
    assert_agree,
    assert_close,
    empty_outputs,
    moved_outputs,
    on_device,
    random_net,
    sample,
)

from kaleido_kernels.arguments import QUIET
from kaleido_kernels.graph.plan import GraphTile
from kaleido_kernels.kernels import make_launcher
from kaleido_kernels.launch import LaunchRequest, Outputs, kind_of
from kaleido_kernels.onchip.plan import OnchipTile
from kaleido_kernels.schedule import Checks, Schedule
from kaleido_kernels.shapes import NETWORKS, RESTART, NetShape
from kaleido_kernels.stream.kernel import variant
from kaleido_kernels.stream.plan import most_registers
from kaleido_kernels.tile import AnyTile, Tile
from kaleido_kernels.wide.plan import WideTile

NARROW = Tile("narrow", 16)
STREAM = Tile("stream", 16, 4, 2)
WIDE = WideTile(rows=16, cols=32, last_cols=32, inner=16, warps=4, stages=2, use_tma=False)
CASES: dict[str, tuple[AnyTile, NetShape]] = {
    "narrow, bias folded": (NARROW, NetShape((3, 13, 7, 3), low=-0.5, high=0.75)),
    "narrow, bias by products": (NARROW, NetShape((16, 16, 16), "silu", "sigmoid", low=0.0)),
    "narrow, one value": (NARROW, NetShape((1, 10, 1), "tanh")),
    "stream": (STREAM, NetShape((3, 13, 7, 11, 3), "silu", "sigmoid", low=0.25)),
    "stream, rows for every warp": (Tile("stream", 128, 8, 3), NetShape((17, 61, 53, 17), "silu")),
    "stream, two tiles a layer": (STREAM, NetShape((7, 131, 137, 7))),
    "stream, states in two tiles": (STREAM, NetShape((151, 139, 151))),
    "onchip": (OnchipTile(3), NetShape((7, 37, 17, 7), "silu")),
    "onchip, 128 chains a group": (OnchipTile(3, 128, in_turns=True), NetShape((70, 90, 70))),
    "graph": (GraphTile(16, rows=8, cols=16), NetShape((21, 19, 21), "gelu", low=-0.9, high=0.7)),
    "wide": (WIDE, NetShape((7, 37, 17, 7), "silu")),
    "wide by the copy engine, two blocks of states": (replace(WIDE, use_tma=True), NetShape((70, 33, 70))),
}
FLOW = Schedule.flow(3, 4, 0.9, 0.2)
ATOL, RTOL = 6e-6, 1e-5

in_every_kernel = pytest.mark.parametrize("case", CASES)


def run(case: str, layers: Layers, request: LaunchRequest, precision: str = "fp32", *, keep_draws=True) -> Outputs:
    tile, shape = CASES[case]
    if tile.use_tma and DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no copy engine")
    if tile.kernel == "onchip" and not COMPILED:
        pytest.skip("Gluon has no interpreter: pass --emulate, or use a GPU")
    outputs = empty_outputs(request, shape, keep_draws=keep_draws)
    launch = make_launcher(tile, layers, shape, precision, DEVICE, n_programs=2, capture=DEVICE.type == "cuda")
    launch(on_device(request), outputs)
    return moved_outputs(outputs, "cpu")


def check(
    case: str, request: LaunchRequest, precision: str = "fp32", atol: float = ATOL, rtol: float = RTOL
) -> Outputs:
    """Runs both and compares draws, final states and residuals."""
    shape = CASES[case][1]
    layers = random_net(shape)
    got = run(case, layers, request, precision)
    want = sample(layers, shape, request, OPERANDS[precision])
    assert_agree(got, want, atol, rtol, f"{case} {precision}")
    return got


@in_every_kernel
@pytest.mark.parametrize("n_chains", [1, 19])
def test_draws_equal_torch(case, n_chains):
    got = check(case, LaunchRequest(n_chains, FLOW, seed=2**64 - 3))
    assert got.draws is not None
    assert torch.equal(got.draws[:, -1], got.final), "the last step is whole"


@in_every_kernel
@pytest.mark.parametrize("steps", [1, 2])
def test_draws_of_few_steps(case, steps):
    check(case, LaunchRequest(7, Schedule.flow(2, steps, 1.0, 0.1), seed=1))


@in_every_kernel
@pytest.mark.parametrize(("precision", "atol", "rtol"), [each for each in TRIPLES if each != FP32])
def test_first_step_of_other_precisions(case, precision, atol, rtol):
    """Inputs of 16 bits double a difference in time: one step is compared, whose state is a part of the way."""
    if precision == "tf32" and CASES[case][0].kernel in ("graph", "onchip"):
        pytest.skip("its products are never tf32")
    check(case, replace(LaunchRequest(9, FLOW, seed=2), run_steps=1), precision, atol, rtol)


@in_every_kernel
def test_chain_ids_across_32_bits(case):
    request = LaunchRequest(6, FLOW, seed=2**63 + 5, first_chain=2**32 - 3)
    by_row = check(case, request)
    ids = torch.tensor([2**32 + 2, 2**40, 2**32 - 3])
    by_id = check(case, replace(request, n_chains=3, chain_ids=ids, first_chain=0))
    assert_close(by_id.final[[0, 2]], by_row.final[[5, 0]], 1e-6, 0.0, "the same chains")


@in_every_kernel
def test_given_states_are_not_clamped_and_hold_for_the_first_draw_alone(case):
    shape = CASES[case][1]
    start = 4 * torch.randn(9, shape.dim, generator=torch.Generator().manual_seed(1))
    request = LaunchRequest(9, FLOW, seed=3)
    got = check(case, replace(request, start=start), atol=2e-5)
    noise = check(case, request)
    assert got.draws is not None and noise.draws is not None
    assert not torch.equal(got.draws[:, 0], noise.draws[:, 0])
    assert torch.equal(got.draws[:, 1:], noise.draws[:, 1:])


@in_every_kernel
def test_more_draws_change_none_of_those_before(case):
    layers = random_net(CASES[case][1])
    requests = [LaunchRequest(17, Schedule.flow(n, 3, 0.9, 0.2), seed=4) for n in (1, 3)]
    one, three = (run(case, layers, request).draws for request in requests)
    assert one is not None and three is not None
    assert torch.equal(one[:, 0], three[:, 0])


@in_every_kernel
@pytest.mark.parametrize("cuts", [[1], [4], [5], [2, 4, 8, 11]])
def test_a_launch_cut_in_time_has_the_same_bits(case, cuts):
    layers = random_net(CASES[case][1])
    request = LaunchRequest(5, FLOW, seed=5, first_chain=2**33)
    whole = run(case, layers, request)
    draws, start = torch.full_like(whole.draws, float("nan")), None
    for first, last in pairwise([0, *cuts, FLOW.n_steps]):
        part = run(case, layers, replace(request, first_step=first, run_steps=last - first, start=start))
        start = part.final
        draws = torch.where(part.draws.isnan(), draws, part.draws)
    assert torch.equal(draws, whole.draws), f"draws differ when cut at {cuts}"
    assert torch.equal(part.final, whole.final), f"final states differ when cut at {cuts}"
    assert torch.equal(part.residual, whole.residual), f"residuals differ when cut at {cuts}"


def test_operands_in_two_halves_in_registers():
    """On GPUs, of stream in 16 bits: whole, and cut in the middle of a draw."""
    tile, shape = Tile("stream", 128, 8, 3), NetShape((7, 131, 137, 7))
    layers = random_net(shape)
    request = LaunchRequest(131, FLOW, seed=5)
    launch = make_launcher(tile, layers, shape, "fp16", DEVICE, n_programs=2, capture=False)

    def run_from(request: LaunchRequest) -> Outputs:
        outputs = moved_outputs(empty_outputs(request, shape), DEVICE)
        launch(on_device(request), outputs)
        return moved_outputs(outputs, "cpu")

    whole = run_from(request)
    assert_agree(whole, sample(layers, shape, request, torch.float16), 2e-2, 0.0, "two halves")
    part = run_from(replace(request, run_steps=6))
    assert torch.equal(run_from(replace(request, first_step=6, run_steps=6, start=part.final)).final, whole.final)


@in_every_kernel
def test_neighbours_and_rows_change_no_bit(case, ordered_products):
    layers = random_net(CASES[case][1])
    request = LaunchRequest(37, FLOW, seed=6, first_chain=1000)
    whole = run(case, layers, request)
    ids = 1000 + torch.randperm(37, generator=torch.Generator().manual_seed(0))
    shuffled = run(case, layers, replace(request, chain_ids=ids))
    assert torch.equal(shuffled.draws, whole.draws[ids - 1000])
    assert torch.equal(shuffled.residual, whole.residual[ids - 1000])
    few = run(case, layers, replace(request, n_chains=3, first_chain=1034), keep_draws=False)
    assert torch.equal(few.final, whole.final[34:])


@in_every_kernel
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_nan_stays_in_its_chain_and_ends_with_its_draw(case):
    shape = CASES[case][1]
    start = torch.zeros(5, shape.dim)
    start[2, shape.dim - 1] = float("nan")
    for steps in (1, 5, 12):
        got = check(case, LaunchRequest(5, FLOW, start=start, run_steps=steps))
        assert got.residual.isnan().tolist() == [False, False, steps == 1, False, False]
    assert got.draws is not None
    assert got.draws.isnan().any(dim=2).nonzero().tolist() == [[2, 0]]


def test_its_kernel_is_one_whatever_init_says_and_looks_at_no_chain():
    outputs = Outputs(torch.empty(3, 2), torch.empty(3))
    kinds = {kind_of(LaunchRequest(3, FLOW, init=init), outputs) for init in ("uniform", "normal")}
    assert len(kinds) == 1 and kinds.pop().by_parts
    with pytest.raises(ValueError, match="checks with a flow"):
        LaunchRequest(3, FLOW, checks=Checks(0.1, 1, 1, torch.zeros(3, dtype=torch.int32), None))


def test_a_program_is_held_to_the_registers_with_which_two_fit():
    tile = Tile("stream", 128, 8, 3)
    deep = NETWORKS["deep128"]
    assert most_registers(deep, "fp16", tile) == 128
    assert most_registers(deep, "fp16x3", tile) is None
    assert most_registers(replace(deep, activation="gelu"), "fp16", tile) is None, "it would spill"
    assert most_registers(NETWORKS["digits"], "fp16", tile) is None
    for jitter in ("none", "normal", RESTART):
        assert variant(deep, "fp16", tile, QUIET._replace(jitter=jitter)).options["maxnreg"] == 128
