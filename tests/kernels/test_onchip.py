"""The onchip kernel against plain torch, on a GPU or in the emulator: every shape it has, every variant, its laws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from kernel_oracle import (
    COMPILED,
    DEVICE,
    OPERANDS,
    assert_agree,
    assert_close,
    assert_halts_as_defined,
    empty_outputs,
    moved_outputs,
    on_device,
    random_net,
    sample,
)

from kaleido_kernels.choice import choose
from kaleido_kernels.launch import LaunchRequest, Outputs
from kaleido_kernels.onchip.pack import OnchipScratch, allocate_scratch, pack_onchip
from kaleido_kernels.onchip.plan import (
    CHUNK,
    OnchipTile,
    candidates,
    inner_slots,
    onchip_layout,
    padded_width,
    refusal,
    shared_bytes,
    trials,
    turn_slots,
)
from kaleido_kernels.schedule import Schedule
from kaleido_kernels.shapes import NETWORKS, NetShape
from kaleido_kernels.tile import GpuFacts

compiled = pytest.mark.skipif(not COMPILED, reason="Gluon has no interpreter: pass --emulate, or use a GPU")

CASES: dict[str, tuple[OnchipTile, NetShape]] = {
    "one chunk": (OnchipTile(3), NetShape((7, 37, 17, 7))),
    "two chunks of inputs": (OnchipTile(3), NetShape((100, 133, 256, 100), "silu", "sigmoid", low=0.25)),
    "128 chains a group": (OnchipTile(3, 128), NetShape((20, 100, 90, 20), low=-0.5, high=0.75)),
    "128 chains a group, two chunks": (OnchipTile(3, 128, in_turns=True), NetShape((128, 128, 65, 128), "silu")),
    "four chunks, in turns": (OnchipTile(4, in_turns=True), NetShape((40, 256, 200, 40), high=0.5)),
    "layers of unequal widths": (OnchipTile(3), NetShape((64, 37, 200, 70, 64), bias=(True, False, True, False))),
    "inputs through memory": (OnchipTile(3), NetShape((256, 130, 256), "gelu")),
    "more inputs than places": (OnchipTile(2), NetShape((576, 260, 576))),
    "two halves": (OnchipTile(3), NetShape((20, 300, 270, 20))),
    "two halves, through memory": (OnchipTile(2), NetShape((150, 300, 150), "silu", "sigmoid", low=0.0)),
}
IN_REGISTERS = (
    *("one chunk", "two chunks of inputs", "128 chains a group", "128 chains a group, two chunks"),
    "four chunks, in turns",
)
SPLIT = (
    *("one chunk", "two chunks of inputs", "128 chains a group", "128 chains a group, two chunks"),
    "layers of unequal widths",
)
# After a step or two of networks of `random_net`; 16 bits double a difference in time.
TRIPLES = {"fp32": ("fp32", 6e-6, 1e-5), "fp16": ("fp16", 4e-3, 0.0), "bf16": ("bf16", 2e-2, 0.0)}

in_every_shape = pytest.mark.parametrize("case", CASES)
in_places = pytest.mark.parametrize(
    "case", ["one chunk", "128 chains a group", "four chunks, in turns", "two halves, through memory"]
)


def poisoned(packed, n_programs: int) -> OnchipScratch:
    """Scratch full of NaN: a value read before it is written shows."""
    scratch = allocate_scratch(packed, n_programs)
    for tensor in (scratch.inputs, scratch.state):
        tensor.fill_(float("nan"))
    return scratch


def run(case: str, layers, request: LaunchRequest, precision: str = "fp16", *, programs=2, keep_draws=True) -> Outputs:
    from kaleido_kernels.onchip.kernel import launch_onchip

    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is written for compute capability 9.0")
    tile, shape = CASES[case]
    packed = pack_onchip(layers, shape, tile, precision, DEVICE)
    outputs = empty_outputs(request, shape, keep_draws=keep_draws)
    launch_onchip(packed, on_device(request), outputs, poisoned(packed, programs))
    return moved_outputs(outputs, "cpu")


def check(case: str, request: LaunchRequest, precision: str = "fp16", **options) -> Outputs:
    """Runs both and compares draws, final states and residuals."""
    shape, (_, atol, rtol) = CASES[case][1], TRIPLES[precision]
    layers = random_net(shape)
    got = run(case, layers, request, precision, **options)
    want = sample(layers, shape, request, OPERANDS[precision])
    assert_agree(got, want, atol, rtol, f"{case} {precision}")
    return got


@compiled
@in_every_shape
@pytest.mark.parametrize(("precision", "n_chains"), [("fp16", 300), ("bf16", 300), ("fp16", 1)])
def test_one_step_equals_torch(case, precision, n_chains):
    check(case, LaunchRequest(n_chains, Schedule(), seed=1), precision)


@compiled
@pytest.mark.parametrize("case", SPLIT)
def test_several_steps_and_draws_equal_torch_in_fp32(case):
    check(case, LaunchRequest(300, Schedule(burn_in=2, n_draws=2, thin=2)), "fp32")


@compiled
@in_every_shape
def test_two_steps_equal_torch(case):
    check(case, LaunchRequest(300, Schedule(burn_in=1), init="normal"))


@compiled
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "tanh"])
@pytest.mark.parametrize("bound", ["tanh", "sigmoid"])
def test_every_activation_and_bound(monkeypatch, activation, bound):
    low = {"tanh": -1.0, "sigmoid": 0.0}[bound]
    shape = NetShape((5, 19, 5), activation, bound, negative_slope=0.2, low=low)
    monkeypatch.setitem(CASES, "this", (OnchipTile(3), shape))
    got = check("this", LaunchRequest(5, Schedule(burn_in=1)), "fp32")
    assert got.final.min() >= low and got.final.max() <= 1.0


@compiled
def test_layers_without_bias(monkeypatch):
    monkeypatch.setitem(CASES, "this", (OnchipTile(3), NetShape((5, 19, 13, 5), bias=(False, True, False))))
    check("this", LaunchRequest(5, Schedule()), "fp32")


@compiled
@pytest.mark.parametrize(
    ("case", "noise"),
    [
        *[("one chunk", "normal"), ("one chunk", "uniform"), ("one chunk", "upstream")],
        *[("two chunks of inputs", "normal"), ("128 chains a group", "upstream")],
    ],
)
def test_jitter_follows_the_schedule(case, noise):
    schedule = Schedule(burn_in=2, n_draws=2, thin=3, settle=1, jitter=0.3, noise=noise)
    check(case, LaunchRequest(9, schedule, seed=2**63 + 5), "fp32")


@compiled
@pytest.mark.parametrize(
    ("case", "noise"), [("inputs through memory", "normal"), ("two halves, through memory", "upstream")]
)
def test_jitter_where_there_is_no_fp32(case, noise):
    check(case, LaunchRequest(200, Schedule(burn_in=1, settle=0, jitter=0.3, noise=noise), seed=7))


@compiled
@in_places
def test_chain_ids_across_the_32_bit_border(case):
    request = LaunchRequest(5, Schedule(thin=2, settle=0, jitter=0.2), first_chain=2**32 - 2, seed=2**63 + 3)
    by_row = check(case, request)
    ids = torch.tensor([2**32 + 2, 2**40 + 1, 2**32 - 2])
    by_id = check(case, replace(request, n_chains=3, chain_ids=ids, first_chain=0))
    assert torch.equal(by_id.final[0], by_row.final[4]) and torch.equal(by_id.final[2], by_row.final[0])


@compiled
@in_places
@pytest.mark.parametrize(("cut", "noise"), [(2, "normal"), (3, "normal"), (2, "upstream")])
def test_given_states_and_a_split_in_time_change_no_bit(case, cut, noise):
    layers = random_net(CASES[case][1])
    schedule = Schedule(burn_in=1, n_draws=2, thin=2, settle=1, jitter=0.3, noise=noise)
    request = LaunchRequest(140, schedule, seed=5, first_chain=2**33)
    whole = run(case, layers, request)
    first = run(case, layers, replace(request, run_steps=cut))
    rest = run(case, layers, replace(request, first_step=cut, run_steps=None, start=first.final))
    assert whole.draws is not None and rest.draws is not None and first.draws is not None
    assert torch.equal(rest.final, whole.final) and torch.equal(rest.residual, whole.residual)
    assert torch.equal(torch.where(first.draws.isnan(), rest.draws, first.draws), whole.draws)


@compiled
@in_every_shape
def test_neighbours_rows_and_programs_change_no_bit(case):
    layers = random_net(CASES[case][1])
    request = LaunchRequest(290, Schedule(thin=2, settle=0, jitter=0.3), seed=1)
    together = run(case, layers, request, programs=1)
    apart = run(case, layers, request, programs=3)
    assert torch.equal(together.final, apart.final)
    ids = torch.randperm(290, generator=torch.Generator().manual_seed(0))
    mixed = run(case, layers, replace(request, chain_ids=ids))
    assert torch.equal(mixed.final, together.final[ids]) and torch.equal(mixed.residual, together.residual[ids])


@compiled
@pytest.mark.parametrize("case", ["one chunk", "two halves, through memory"])
def test_slots_change_no_bit(monkeypatch, case):
    tile, shape = CASES[case]
    layers, request = random_net(shape), LaunchRequest(140, Schedule(thin=2), seed=1)
    want = run(case, layers, request)
    monkeypatch.setitem(CASES, "this", (replace(tile, slots=5 - tile.slots), shape))
    assert torch.equal(run("this", layers, request).final, want.final)


@compiled
@in_places
def test_nan_stays_in_its_chain_and_is_reported(case):
    dim = CASES[case][1].dim
    start = torch.zeros(70, dim)
    start[2, dim - 1] = float("nan")
    layers = random_net(CASES[case][1])
    got = run(case, layers, LaunchRequest(70, Schedule(n_draws=2, settle=0, jitter=0.1), start=start))
    assert got.residual.isnan().nonzero().tolist() == [[2]]
    assert got.final.isnan().any(dim=1).nonzero().tolist() == [[2]]


@compiled
@in_places
def test_final_may_be_written_without_draws(case):
    layers, request = random_net(CASES[case][1]), LaunchRequest(5, Schedule(n_draws=2))
    outputs = run(case, layers, request, keep_draws=False)
    assert outputs.draws is None
    assert torch.equal(outputs.final, run(case, layers, request).final)


@compiled
def test_no_chain_is_no_work():
    case = "one chunk"
    outputs = run(case, random_net(CASES[case][1]), LaunchRequest(0, Schedule(n_draws=3)))
    assert outputs.final.shape == (0, 7) and outputs.residual.shape == (0,)


@compiled
@in_places
@pytest.mark.parametrize(("every", "patience"), [(4, 1), (1, 3)])
def test_chains_halt_inside_a_launch_as_defined(case, every, patience):
    assert_halts_as_defined(lambda layers, shape, request: run(case, layers, request), CASES[case][1], every, patience)


@in_every_shape
def test_slots_hold_the_weights_in_the_order_of_their_use(case):
    """The kernel's walk over slots, by plain products, gives the layers' products."""
    tile, shape = CASES[case]
    layers = random_net(shape)
    packed = pack_onchip(layers, shape, tile, "fp16")
    layout, slot = packed.layout, 0
    slots = packed.weights.view(-1, 256, CHUNK).float()
    generator = torch.Generator().manual_seed(0)
    for number, (weight, _) in enumerate(layers):
        is_last = number == shape.n_layers - 1
        cols, times = (layout.last, layout.last_tiles) if is_last else (layout.cols, layout.halves)
        inputs = torch.randn(3, weight.shape[1], generator=generator)
        n_slots = layout.last_slots if is_last else int(packed.inner[number])
        pieces = 256 // cols
        x = torch.zeros(3, n_slots * pieces * CHUNK)
        x[:, : inputs.shape[1]] = inputs
        if number == 0 and layout.through_memory:
            order = [8 * i + 2 * q + e for q in range(4) for i in range(8) for e in range(2)]
            x = x.view(3, -1, CHUNK)[:, :, order].reshape(3, -1)
        out = []
        for _ in range(times):
            acc = torch.zeros(3, cols)
            for chunk in x.view(3, n_slots, pieces, CHUNK).unbind(1):
                blocks = slots[slot].view(pieces, cols, CHUNK)
                acc += torch.einsum("rpk,pnk->rn", chunk, blocks)
                slot += 1
            out.append(acc)
        got = torch.cat(out, dim=1)
        assert_close(got[:, : weight.shape[0]], inputs @ weight.half().float().t(), 1e-4, 1e-4, f"layer {number}")
        assert not got[:, weight.shape[0] :].any(), "padding is zero"
    assert slot == layout.n_slots == len(slots)


@pytest.mark.parametrize("options", [{"slots": 1}, {"slots": 7}, {"slots": 3, "group_chains": 96}])
def test_impossible_tiles_are_refused(options):
    with pytest.raises(ValueError, match="choose 2 to 6 slots, and 64 or 128 chains"):
        OnchipTile(**options)


@pytest.mark.parametrize(
    ("shape", "precision", "tile", "facts", "why"),
    [
        (NETWORKS["digits"], "fp16", OnchipTile(4), GpuFacts(capability=(10, 0)), "written for compute capability 9.0"),
        (NETWORKS["digits"], "fp16", OnchipTile(4), GpuFacts(capability=(8, 0)), "written for compute capability 9.0"),
        (NETWORKS["digits"], "tf32", OnchipTile(4), GpuFacts(), "operands of 16 bits"),
        (NetShape((64, 64)), "fp16", OnchipTile(4), GpuFacts(), "no hidden layer"),
        (NETWORKS["cifar"], "fp16", OnchipTile(2), GpuFacts(), "is 2000 wide, at most 512"),
        (NETWORKS["mnist"], "fp16x3", OnchipTile(2), GpuFacts(), "is 500 wide, at most 256"),
        (NetShape((200, 256, 200)), "fp16x3", OnchipTile(2), GpuFacts(), "have 200 values, at most 128"),
        (NETWORKS["mnist"], "fp16", OnchipTile(4), GpuFacts(), "bytes of shared memory"),
        (NETWORKS["mnist"], "fp16", OnchipTile(3, 64, True), GpuFacts(), "a turn takes 13 slots, and there are 3"),
        (NETWORKS["digits"], "fp16x3", OnchipTile(4, 64, True), GpuFacts(), "a turn takes 8 slots, and there are 4"),
        (NetShape((300, 256, 256, 300)), "fp16", OnchipTile(5), GpuFacts(), "4 slots can be ahead, not 5"),
    ],
)
def test_what_it_cannot_run_is_refused_by_name(shape, precision, tile, facts, why):
    reason = refusal(shape, precision, tile, facts)
    assert reason is not None and reason.startswith("onchip") and why in reason


@pytest.mark.parametrize("net", NETWORKS)
@pytest.mark.parametrize("precision", ["fp16", "fp16x3"])
def test_no_turn_waits_for_slots_that_the_other_group_has_to_free(net, precision):
    """Such a launch would never end."""
    shape = NETWORKS[net]
    for tile in (*candidates(shape, precision, GpuFacts()), *trials(shape, precision, GpuFacts())):
        assert not tile.in_turns or turn_slots(shape, tile, precision) <= tile.slots


@compiled
def test_a_launch_that_would_never_end_is_refused():
    from kaleido_kernels.onchip.kernel import variant

    with pytest.raises(ValueError, match="a turn takes 4 slots, and there are 3"):
        variant(NETWORKS["digits"], "fp16", OnchipTile(3, in_turns=True))


def test_what_padding_would_make_slower_is_left_to_other_kernels_but_runs_when_asked_for():
    small = NetShape((64, *[64] * 40, 64))
    choice = choose(small, "fp16", GpuFacts())
    assert choice.kernel == "stream" and any("3.9 times the products" in reason for reason in choice.refused)
    assert choose(small, "fp16", GpuFacts(), kernel="onchip").kernel == "onchip"
    assert choose(NetShape((64, *[200] * 8, 64)), "fp16", GpuFacts()).kernel == "onchip", "stream would pad as much"


@pytest.mark.parametrize(
    ("shape", "tile", "precision", "held"),
    [
        (NETWORKS["digits"], OnchipTile(4), "fp16", True),
        (NETWORKS["deep128"], OnchipTile(4, 128), "bf16", True),
        (NETWORKS["digits"], OnchipTile(3), "fp16x3", False),
        (NETWORKS["mnist"], OnchipTile(3), "fp16", False),
        (NetShape((200, 100, 200)), OnchipTile(3), "fp16", False),
        *((shape, tile, "fp16", name in IN_REGISTERS) for name, (tile, shape) in CASES.items()),
    ],
    ids=str,
)
def test_activations_stay_in_registers_where_they_fit(shape, tile, precision, held):
    assert onchip_layout(shape, tile, precision).held == held
    shared, item = shared_bytes(shape, tile, precision), 4 if precision == "fp16x3" else 2
    activations = tile.chains * padded_width(shape, tile.group_chains) * item
    assert (shared < activations + tile.slots * 32_768) == held


def test_layouts_of_the_reference_networks():
    digits = onchip_layout(NETWORKS["digits"], OnchipTile(5), "fp16")
    assert (digits.n_slots, digits.halves, digits.last, digits.through_memory) == (4 * 4 + 1 + 1, 1, 64, False)
    mnist = onchip_layout(NETWORKS["mnist"], OnchipTile(3), "fp16")
    assert (mnist.n_slots, mnist.halves, mnist.through_memory) == (2 * 13 + 9 * 16 + 7 * 4, 2, True)
    assert inner_slots(NETWORKS["mnist"], OnchipTile(3)) == [13, *[8] * 9]
