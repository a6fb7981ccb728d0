"""The cost model: pieces by hand, laws for any work, and the figures of a study of the compiled kernels."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

if importlib.util.find_spec("triton") is None:  # importing it here would fix its mode for the interpreter's tests
    pytest.skip("needs triton", allow_module_level=True)

from kaleido_kernels.choice import choose
from kaleido_kernels.proving.roofline.gpu import FAST, NOTE, PEAK_FLOPS, SLOW, Gpu, resident_programs
from kaleido_kernels.proving.roofline.loops import L2_LOST, Loop, Overlap, Reuse
from kaleido_kernels.proving.roofline.model import TileWork, chain_cycles, estimate, unit_cycles
from kaleido_kernels.proving.roofline.work import (
    counted_work,
    exact_fma,
    narrow_work,
    step_counts,
    stream_overlap,
    stream_work,
    wide_overlap,
    wide_reuses,
    wide_work,
)
from kaleido_kernels.proving.trials import expected_milliseconds, trial_tiles
from kaleido_kernels.shapes import NETWORKS, NetShape
from kaleido_kernels.tile import GpuFacts, Tile
from kaleido_kernels.wide.plan import WideTile, padded_products, shared_bytes, step_bytes, wide_candidates, wide_layers

# 1000 fp16 products, 100 bytes of L2 and 10 of memory a clock and multiprocessor; a load waits 30 clocks.
ROUND = Gpu(
    n_sm=10, clock=1e9, tensor_flops=2e13, tensor_fma=1000, l2_bandwidth=1e12, l2_capacity=1e6, hbm_bandwidth=1e11,
    latency=30, launch_seconds=1e-3,
)  # fmt: skip


def test_each_unit_by_hand():
    reuses = (Reuse(own=500, between=1e5, beside=0.5e6), Reuse(own=7777, between=1e5))  # 1.5 and 1.0 of the capacity
    work = TileWork(64, 100, 64_000, 1280, 5000, instructions=40, alu=20, mufu=10, reuses=reuses)
    cycles = unit_cycles(work, ROUND)
    assert cycles == pytest.approx(
        {"tensor": 64, "fma": 10, "l2": 50, "hbm": 50, "issue": 10, "alu": 10, "mufu": 20, "chain": 0}
    )


@pytest.mark.parametrize(
    ("overlap", "cycles"),
    [
        (Overlap(0), 50 + 20 + 30 + 40),  # products, other instructions, latency, copy
        (Overlap(1), 50 + 20 + 30 + 40),
        (Overlap(1, products=0.5), 50 + 20 + 70 - 25),
        (Overlap(1, other=0.25), 50 + 20 + 70 - 5),
        (Overlap(1, products=1, other=1), 50 + 20),
        (Overlap(2), 70),  # two buffers, each of them for 70 of load and 70 of work
        (Overlap(2, products=1, other=1), 70),
        (Overlap(3), 70),
    ],
)
def test_a_round_by_hand(overlap, cycles):
    loop = Loop(3, fma=50_000, other=20, loaded=4000, overlap=overlap)
    assert loop.round_cycles(ROUND) == pytest.approx(cycles)
    assert loop.cycles(ROUND) == pytest.approx(3 * cycles)
    # From nothing the first load is waited for, unless each round waits for a whole load anyway.
    assert replace(loop, starts=2).cycles(ROUND) == pytest.approx(3 * cycles + 2 * (140 - cycles))


def test_copies_limit_a_loop_whose_loads_run_ahead():
    loop = Loop(3, fma=10_000, loaded=4000, stored=1000, overlap=Overlap(5, products=1))
    assert loop.round_cycles(ROUND) == pytest.approx(50), "loads and stores share the bandwidth"
    late = replace(loop, overlap=Overlap(1, products=1), stored=0)
    assert late.round_cycles(ROUND) == pytest.approx(70), "one round ahead is shorter than a load"
    for ahead in (2, 3):
        waiting = replace(loop, loaded=10, stored=0, overlap=Overlap(ahead))
        assert waiting.round_cycles(ROUND) == pytest.approx((10 + 30 + 0.1) / ahead), "the load's latency, shared"


def test_time_is_the_longest_unit_in_whole_rounds_and_each_launch():
    work = TileWork(64, 100, 64_000, loops=(Loop(2, fma=32_000),), serial=36, waits=2, drained=500)
    guess = estimate(work, n_chains=641, n_steps=5, n_launches=3, fast=ROUND, slow=replace(ROUND, launch_seconds=2e-3))
    assert (guess.limit, guess.tile_rounds) == ("chain", 2)
    gpu = (64 + 36 + 2 * 30 + 5) * 2 * 5 / 1e9
    assert guess.low.milliseconds == pytest.approx(1e3 * gpu + 3 * 1.0)
    assert guess.high.milliseconds == pytest.approx(1e3 * gpu + 3 * 2.0)
    assert (guess.low.launch_milliseconds, guess.high.launch_milliseconds) == pytest.approx((3.0, 6.0))
    assert guess.low.peak_share == pytest.approx(2 * 100 * 641 * 5 / PEAK_FLOPS / (gpu + 3e-3))


def test_programs_side_by_side_hide_each_others_waits_but_share_the_units():
    work = TileWork(64, 100, 20_000, loops=(Loop(1, fma=20_000, loaded=1000),), programs=4)
    assert chain_cycles(work, ROUND) == pytest.approx(20 + 30 + 10)
    assert unit_cycles(work, ROUND)["chain"] == pytest.approx(60 / 4)
    assert unit_cycles(work, replace(ROUND, collisions=1.0))["chain"] == pytest.approx((60 + 3 * 20) / 4)
    few = estimate(work, n_chains=64, n_steps=1, fast=ROUND, slow=ROUND)
    assert few.low.cycles["chain"] == pytest.approx(60), "one tile has nothing to hide its waits behind"


def test_the_ideal_tile_reaches_the_peak():
    free = replace(FAST, launch_seconds=0.0)
    guess = estimate(TileWork(64, 100, 6400), n_chains=6400, n_steps=7, fast=free)
    assert guess.low.peak_share == pytest.approx(6400 / (132 * 64), rel=1e-6), "only the empty processors are lost"


amounts = st.floats(0, 1e6, allow_nan=False)
overlaps = st.builds(Overlap, st.integers(0, 4), st.floats(0, 1), st.floats(0, 1))
loops = st.builds(Loop, st.integers(5, 50), st.integers(0, 5), amounts, st.floats(0, 1e3), amounts, amounts, overlaps)
works = st.builds(
    TileWork,
    chains=st.integers(16, 256),
    exact_fma=st.integers(1, 10**6),
    tensor_fma=amounts,
    scalar_fma=amounts,
    l2_bytes=amounts,
    instructions=amounts,
    alu=amounts,
    mufu=amounts,
    loops=st.lists(loops, max_size=3).map(tuple),
    serial=st.floats(0, 1e4),
    waits=st.integers(0, 20),
    drained=amounts,
    reuses=st.lists(st.builds(Reuse, amounts, amounts, amounts, amounts), max_size=3).map(tuple),
    programs=st.integers(1, 16),
)
SLACK = 1 + 1e-9  # of rounding


def spent(work: TileWork, gpu: Gpu = FAST) -> float:
    """Milliseconds without launches, of 10 rounds of tiles."""
    quiet = replace(gpu, launch_seconds=0.0)
    return estimate(work, 10 * 132 * work.chains, 100, fast=quiet, slow=quiet).low.milliseconds


@given(works)
def test_a_range_holds_its_middle(work):
    guess = estimate(work, 100_000, 300)
    assert 0 < guess.low.milliseconds <= guess.milliseconds <= guess.high.milliseconds
    assert guess.low.peak_share >= guess.high.peak_share > 0


BETTER = {
    **{"tensor_flops": 2.0, "tensor_fma": 2.0, "l2_bandwidth": 2.0, "l2_capacity": 2.0, "hbm_bandwidth": 2.0},
    **{"latency": 0.5, "collisions": 0.5, "launch_seconds": 0.5, "clock": 1.0, "n_sm": 1.0},
}


@given(works, st.sampled_from(sorted(BETTER)), st.sampled_from([FAST, SLOW]))
def test_no_better_rate_ever_costs_time(work, name, gpu):
    better = replace(gpu, **{name: BETTER[name] * getattr(gpu, name)})
    times = [estimate(work, 100_000, 300, fast=each, slow=each).low.milliseconds for each in (better, gpu)]
    assert times[0] <= times[1] * SLACK


@given(loops, st.sampled_from([FAST, SLOW]))
def test_loads_that_run_further_ahead_are_never_slower(loop, gpu):
    times = [replace(loop, overlap=replace(loop.overlap, ahead=ahead)).cycles(gpu) for ahead in range(6)]
    assert times == sorted(times, reverse=True) or max(times) <= min(times) * SLACK, times


@given(loops, st.floats(0, 1), st.sampled_from(["products", "other"]))
def test_more_behind_a_copy_is_never_slower(loop, share, name):
    more = replace(loop.overlap, **{name: max(share, getattr(loop.overlap, name))})
    assert replace(loop, overlap=more).cycles(SLOW) <= loop.cycles(SLOW) * SLACK


@given(loops)
def test_without_overlap_the_time_is_the_sum(loop):
    alone = replace(loop, stored=0.0, overlap=Overlap(1))
    whole = alone.rounds * (alone.work(SLOW) + alone.load(SLOW))
    assert alone.cycles(SLOW) == pytest.approx(whole)
    assert replace(alone, overlap=loop.overlap).cycles(SLOW) <= whole * SLACK + alone.starts * alone.load(SLOW)


@given(works, st.integers(1, 16), st.sampled_from([FAST, SLOW]))
def test_more_programs_are_never_slower(work, more, gpu):
    assert spent(replace(work, programs=work.programs + more), gpu) <= spent(work, gpu) * SLACK


@given(works, amounts, amounts)
def test_what_does_not_fit_l2_costs_time(work, own, between):
    """Never less with more of it; and just its bytes over the rate of memory where nothing takes longer."""
    reuse = Reuse(own=own, between=between)
    assert spent(replace(work, reuses=(*work.reuses, reuse))) >= spent(work) / SLACK
    assert Reuse(own=own, between=FAST.l2_capacity / FAST.n_sm).missed(FAST) == 0
    lost = Reuse(own=own, between=L2_LOST * FAST.l2_capacity / FAST.n_sm)
    assert lost.missed(FAST) == pytest.approx(own)
    cycles = unit_cycles(TileWork(64, 1, 0.0, reuses=(lost,)), FAST)
    assert cycles["hbm"] == pytest.approx(own / FAST.hbm_per_cycle)


def test_activations_that_do_not_fit_are_counted_at_every_read():
    """cifar: 8 to 12 passes of 132 programs over 69 MB a layer; mnist: layers fit, raw sums of 69 MB do not."""

    def missed(name: str, gpu: Gpu, tile: WideTile = WideTile()) -> float:  # noqa: B008, a frozen record
        """Bytes of all programs in a step."""
        return gpu.n_sm * sum(reuse.missed(gpu) for reuse in wide_reuses(NETWORKS[name], tile, "fp16"))

    layer = 132 * 128 * 2048 * 2
    reads = sum(entry.col_tiles for entry in wide_layers(NETWORKS["cifar"], WideTile())[1:])
    for gpu in (FAST, SLOW):
        assert missed("cifar", gpu) > reads * layer
        assert 2 * 69e6 < missed("mnist", gpu) < 0.3e9
        assert missed("digits", gpu, WideTile(last_cols=64)) == 0
        assert missed("mnist", replace(gpu, l2_capacity=1e9)) == 0
    work, poor = wide_work(NETWORKS["cifar"], WideTile(), "fp16"), replace(FAST, hbm_bandwidth=2e12)
    assert unit_cycles(work, poor)["hbm"] == max(unit_cycles(work, poor).values())
    assert spent(work, poor) > 1.2 * spent(work, replace(poor, l2_capacity=1e9))


@pytest.mark.parametrize("name", NETWORKS)
def test_padding_never_saves_products(name):
    shape = NETWORKS[name]
    for precision in ("fp16x3", "fp16", "tf32"):
        for tile in wide_candidates(shape, precision):
            assert padded_products(shape, tile) >= exact_fma(shape.widths)


@pytest.mark.parametrize("precision", ["fp16x3", "fp16", "tf32", "ieee"])
@pytest.mark.parametrize("name", ["points2d", "digits", "mnist"])
def test_loops_hold_all_of_a_tiles_products_and_bytes(name, precision):
    shape = NETWORKS[name]
    for tile in (WideTile(), WideTile(128, 64, 128, 32, 8, 2)):
        work = wide_work(shape, tile, precision)
        assert sum(loop.rounds * loop.fma for loop in work.loops) == pytest.approx(work.tensor_fma)
        moved = sum(loop.rounds * (loop.loaded + loop.stored) for loop in work.loops) + work.drained
        assert moved == pytest.approx(step_bytes(shape, tile, precision)), "loaded and stored"


def test_split_fp32_costs_three_products_and_tf32_two():
    shape = NetShape((64, 64, 64))
    tensor = {p: unit_cycles(narrow_work(shape, 64, 4, p, {}), FAST)["tensor"] for p in ("fp16", "fp16x3", "tf32")}
    assert tensor["fp16x3"] == pytest.approx(3 * tensor["fp16"])
    assert tensor["tf32"] == pytest.approx(2 * tensor["fp16"])


def test_ieee_products_run_on_the_ordinary_units():
    cycles = unit_cycles(narrow_work(NetShape((64, 64, 64)), 64, 4, "ieee", {}), FAST)
    assert cycles["tensor"] == 0 and cycles["fma"] == pytest.approx(64 * 64 * 64 * 2 / 128)


def test_counts_are_of_one_warp_and_a_loop_over_layers_adds_up():
    assert counted_work({"all": 100, "FMNMX": 8, "MUFU": 4}, 4) == {"instructions": 400, "alu": 32, "mufu": 16}
    total = step_counts({"all": 10, "HGMMA": 2}, {"all": 50, "HGMMA": 2, "MUFU": 8}, rounds=10, rare_rounds=1)
    assert total == {"all": 140, "HGMMA": 20, "MUFU": 8}


@pytest.mark.parametrize(
    ("shared", "registers", "warps", "programs"),
    [
        (98_304, 126, 8, 2),
        (98_304, 129, 8, 1),
        (196_608, 100, 8, 1),
        (49_152, 95, 4, 4),
        (9_216, 64, 4, 8),
        (0, 8, 1, 64),
    ],
)
def test_programs_that_fit_a_multiprocessor(shared, registers, warps, programs):
    assert resident_programs(shared, registers, warps, 232_448) == programs


def deep_stream(stages: int, programs: int) -> TileWork:
    return stream_work(
        NETWORKS["deep128"],
        128,
        8,
        "fp16",
        {"all": 2000},
        n_tiles=10,
        programs=programs,
        overlap=stream_overlap(stages),
    )


def test_stream_with_two_stages_waits_for_every_load_and_with_three_does_not():
    """Its copies are issued behind the products, and two stages wait for all of them: copy, latency, product, rest."""
    per_tile = {stages: chain_cycles(deep_stream(stages, 1), SLOW) / 10 for stages in (2, 3, 4)}
    copy, product, rest = 128 * 128 * 2 / SLOW.l2_per_cycle, 128 * 128 * 128 / 2048, 2000 / 10 * 8 / 4
    assert per_tile[2] == pytest.approx(copy + SLOW.latency + product + rest)
    assert per_tile[3] == pytest.approx(per_tile[2] / 2), "two loads at once"
    assert per_tile[4] == pytest.approx(max(copy, per_tile[2] / 3, product + rest))
    assert chain_cycles(deep_stream(2, 2), SLOW) == chain_cycles(deep_stream(2, 1), SLOW), "a program by itself"
    assert spent(deep_stream(2, 2)) < spent(deep_stream(2, 1))


def test_wide_in_split_fp32_hides_a_load_behind_one_of_three_products():
    shape, two, four = NETWORKS["mnist"], WideTile(stages=2), WideTile(inner=32, stages=4)
    loop = next(loop for loop in wide_work(shape, two, "fp16x3").loops if loop.fma)
    product = 128 * 256 * 64 / 2048
    load = (128 + 256) * 64 * 4 / SLOW.l2_per_cycle + SLOW.latency
    assert loop.round_cycles(SLOW) == pytest.approx(2 * product + max(product, load))
    assert wide_overlap("fp16x3", 2).ahead == 1 and wide_overlap("fp16x3", 4).ahead == 3
    for gpu in (FAST, SLOW):
        assert spent(wide_work(shape, four, "fp16x3"), gpu) < 0.75 * spent(wide_work(shape, two, "fp16x3"), gpu)


def test_jitter_starts_the_loop_of_stream_anew_in_every_step():
    work = deep_stream(3, 1)
    (loop,) = work.loops
    again = replace(work, loops=(replace(loop, starts=1),))
    first = loop.load(SLOW) + loop.work(SLOW) - loop.round_cycles(SLOW)
    assert chain_cycles(again, SLOW) - chain_cycles(work, SLOW) == pytest.approx(first) and first > 0


def test_mnist_in_wide_is_bound_by_l2_and_the_wider_tile_is_better():
    """Figures derived by hand: 9.1 % padding and about 11 MiB a tile-step for 128 x 256 tiles."""
    shape = NETWORKS["mnist"]
    wide, narrow = WideTile(), replace(WideTile(), cols=128, last_cols=128)
    assert padded_products(shape, wide) / exact_fma(shape.widths) == pytest.approx(1.091, abs=0.002)
    guess = estimate(wide_work(shape, wide, "fp16"), 100_000, 300)
    assert guess.l2_bytes == pytest.approx(11.5e6, rel=0.1) and guess.tile_rounds == 6
    for end in (guess.low, guess.high):
        assert max((u for u in end.cycles if u != "chain"), key=end.cycles.__getitem__) == "l2"
    assert guess.milliseconds < estimate(wide_work(shape, narrow, "fp16"), 100_000, 300).milliseconds


def test_more_bandwidth_helps_only_what_it_limits():
    work = wide_work(NETWORKS["mnist"], WideTile(), "fp16")
    slow, usual, fast, faster = (spent(work, replace(FAST, l2_bandwidth=rate)) for rate in (5e12, 8e12, 1e15, 2e15))
    assert slow > usual > fast == pytest.approx(faster, rel=0.01)


@pytest.mark.parametrize("precision", ["fp16x3", "fp16", "bf16", "tf32", "ieee"])
@pytest.mark.parametrize("use_tma", [True, False])
def test_candidates_fit_a_multiprocessor(precision, use_tma):
    for tile in wide_candidates(NETWORKS["mnist"], precision, use_tma):
        assert shared_bytes(tile, precision) <= 232_448


# Milliseconds for 100,000 chains x 300 steps that a study derived by hand from the compiled kernels: how copies and
# products follow each other, and for points1d what a launch takes Python as well. They are estimates as the model's
# are: it has to come to the same from what it reads, here from sizes and in test_inspect from machine code.
STUDY = {
    ("points1d", "fp16", "narrow"): (0.27 + 0.025, 0.27 + 0.05),
    ("points2d", "fp16", "narrow"): (1.7, 2.3),
    # Not the study's, which are of an earlier form: what `inspect` reads from machine code.
    ("deep128", "fp16", "stream"): (12.6, 16.8),
    ("deep128", "fp16x3", "stream"): (42.7, 44.0),
    ("digits", "fp16", "stream"): (32.1, 36.7),
    ("mnist", "fp16", "wide"): (580, 600),
    ("mnist", "fp16x3", "wide"): (1000, 1000),
    ("cifar", "fp16", "wide"): (5300, 6500),
}


@pytest.mark.parametrize(("net", "precision", "kernel"), [case for case in STUDY if case[2] != "narrow"])
def test_sizes_alone_come_to_the_studys_figures(net, precision, kernel):
    low, high = STUDY[net, precision, kernel]
    shape = NETWORKS[net]
    tile = choose(shape, precision, GpuFacts(), kernel=kernel).tile
    guess = expected_milliseconds(shape, precision, tile, GpuFacts())
    assert guess == pytest.approx((low + high) / 2, rel=0.1)


def test_the_result_says_that_it_is_a_model_and_what_is_assumed():
    record = estimate(TileWork(64, 100, 6400), 64, 1).to_json()
    assert record["note"] == NOTE == "model, not a measurement"
    assert record["low"]["milliseconds"] <= record["milliseconds"] <= record["high"]["milliseconds"]
    assert record["low"]["assumed"]["l2_bandwidth"] > record["high"]["assumed"]["l2_bandwidth"]
    assert record["overlap"] is None
    assert estimate(deep_stream(2, 1), 64, 1).to_json()["overlap"] == {"ahead": 1, "products": 0.0, "other": 0.0}


@pytest.mark.parametrize("net", ["digits", "mnist", "cifar"])
def test_split_fp32_tries_the_tile_that_loads_three_tiles_ahead_and_expects_it_to_win(net):
    shape, facts = NETWORKS[net], GpuFacts()
    tiles = [tile for tile in trial_tiles(shape, "fp16x3", facts) if tile.kernel == "wide"]
    best = min(tiles, key=lambda tile: expected_milliseconds(shape, "fp16x3", tile, facts))
    assert (best.cols, best.inner, best.stages) == (256, 32, 4)


@pytest.mark.parametrize("net", ["mnist", "cifar"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_16_bits_try_one_load_more_in_flight(net, precision):
    tiles = trial_tiles(NETWORKS[net], precision, GpuFacts())
    assert any(isinstance(tile, WideTile) and (tile.cols, tile.stages) == (256, 4) for tile in tiles)


def test_a_fourth_stage_is_tried_where_it_fits():
    facts = GpuFacts()
    assert Tile("stream", 128, 8, 4) in trial_tiles(NETWORKS["deep128"], "fp16", facts)
    assert Tile("stream", 128, 8, 4) not in trial_tiles(NETWORKS["digits"], "fp16", facts), "256 KB of weights"


def test_stages_are_never_slower_by_the_model():
    """Where they leave room for as many programs: shared memory that costs one is another matter."""
    for precision in ("fp16", "fp16x3", "tf32"):
        for net in ("digits", "mnist"):
            times = [
                spent(wide_work(NETWORKS[net], WideTile(inner=32, stages=n), precision), SLOW) for n in range(1, 6)
            ]
            assert times == sorted(times, reverse=True)
    for programs in (1, 2):
        times = [spent(deep_stream(stages, programs), SLOW) for stages in range(1, 6)]
        assert times == sorted(times, reverse=True)
