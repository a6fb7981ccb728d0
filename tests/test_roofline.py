"""The cost model: hand-computed cases, monotonicity, and agreement with the instruction counts it is fed."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest

if importlib.util.find_spec("triton") is None:  # importing it here would fix its mode for the interpreter's tests
    pytest.skip("needs triton", allow_module_level=True)

from kaleido_kernels.inspect import NETWORKS
from kaleido_kernels.roofline import (
    NOTE,
    Gpu,
    TileWork,
    counted_work,
    estimate,
    exact_fma,
    narrow_work,
    step_counts,
    stream_work,
    unit_cycles,
    wide_work,
)
from kaleido_kernels.shapes import NetShape
from kaleido_kernels.wide_plan import WideTile, padded_products, shared_bytes, wide_candidates

ROUND = Gpu(n_sm=10, clock=1e9, tensor_flops=2e13, l2_bandwidth=1e12, hbm_bandwidth=1e11)  # 1000 FMA, 100 B a clock


def test_each_unit_by_hand():
    work = TileWork(
        64, 100, 64_000, scalar_fma=1280, l2_bytes=5000, resident_bytes=6.001e6, instructions=40, alu=20, mufu=10
    )
    cycles = unit_cycles(work, ROUND)
    assert cycles == pytest.approx(
        {"tensor": 64, "fma": 10, "l2": 50, "hbm": 200, "issue": 10, "alu": 10, "mufu": 20, "serial": 0}
    )


def test_time_is_the_longest_unit_plus_the_serial_part_in_whole_rounds():
    work = TileWork(64, 100, 64_000, serial=36)
    guess = estimate(work, n_chains=641, n_steps=5, gpu=ROUND)
    assert (guess.limit, guess.tile_rounds) == ("tensor", 2)
    assert guess.milliseconds == pytest.approx(1e3 * (64 + 36) * 2 * 5 / 1e9)
    assert guess.peak_share == pytest.approx(2 * 100 * 641 * 5 / 2e13 / (1000e-9))


def test_the_ideal_tile_reaches_the_peak():
    guess = estimate(TileWork(64, 100, 6400), n_chains=6400, n_steps=7)
    assert guess.peak_share == pytest.approx(6400 / (132 * 64), rel=1e-6), "only the empty processors are lost"


@pytest.mark.parametrize("name", NETWORKS)
def test_padding_never_saves_products(name):
    shape = NETWORKS[name]
    for precision in ("fp16x3", "fp16", "tf32"):
        for tile in wide_candidates(shape, precision):
            assert padded_products(shape, tile) >= exact_fma(shape.widths)


def test_split_fp32_costs_three_products_and_tf32_two():
    shape = NetShape((64, 64, 64))
    tensor = {p: unit_cycles(narrow_work(shape, 64, 4, p, {}), Gpu())["tensor"] for p in ("fp16", "fp16x3", "tf32")}
    assert tensor["fp16x3"] == pytest.approx(3 * tensor["fp16"])
    assert tensor["tf32"] == pytest.approx(2 * tensor["fp16"])


def test_ieee_products_run_on_the_ordinary_units():
    cycles = unit_cycles(narrow_work(NetShape((64, 64, 64)), 64, 4, "ieee", {}), Gpu())
    assert cycles["tensor"] == 0 and cycles["fma"] == pytest.approx(64 * 64 * 64 * 2 / 128)


def test_counts_are_of_one_warp_and_a_loop_over_layers_adds_up():
    assert counted_work({"all": 100, "FMNMX": 8, "MUFU": 4}, 4) == {"instructions": 400, "alu": 32, "mufu": 16}
    total = step_counts({"all": 10, "HGMMA": 2}, {"all": 50, "HGMMA": 2, "MUFU": 8}, rounds=10, rare_rounds=1)
    assert total == {"all": 140, "HGMMA": 20, "MUFU": 8}


def test_a_lone_stream_program_hides_nothing():
    def work(programs: int) -> TileWork:
        return stream_work(NETWORKS["deep128"], 128, 8, "fp16", {"all": 1000}, n_tiles=10, programs=programs)

    assert work(2).serial == 0 and work(1).serial == 1000 * 8 / 4


def test_mnist_in_wide_is_bound_by_l2_and_the_wider_tile_is_better():
    """Figures derived by hand: 9.1 % padding and about 11 MiB a tile-step for 128 x 256 tiles."""
    shape = NETWORKS["mnist"]
    wide, narrow = WideTile(), replace(WideTile(), cols=128, last_cols=128)
    assert padded_products(shape, wide) / exact_fma(shape.widths) == pytest.approx(1.091, abs=0.002)
    guess = estimate(wide_work(shape, wide, "fp16"), 100_000, 300)
    assert guess.limit == "l2" and guess.tile_rounds == 6
    assert guess.l2_bytes == pytest.approx(11.5e6, rel=0.1)
    assert guess.milliseconds < estimate(wide_work(shape, narrow, "fp16"), 100_000, 300).milliseconds


def test_more_bandwidth_helps_only_what_it_limits():
    work = wide_work(NETWORKS["mnist"], WideTile(), "fp16")
    slow, fast = (estimate(work, 100_000, 300, Gpu(l2_bandwidth=rate)) for rate in (5.5e12, 50e12))
    assert slow.limit == "l2" and fast.limit == "tensor"
    assert slow.milliseconds > estimate(work, 100_000, 300).milliseconds > fast.milliseconds


@pytest.mark.parametrize("precision", ["fp16x3", "fp16", "bf16", "tf32", "ieee"])
@pytest.mark.parametrize("use_tma", [True, False])
def test_candidates_fit_a_multiprocessor(precision, use_tma):
    for tile in wide_candidates(NETWORKS["mnist"], precision, use_tma):
        assert shared_bytes(tile, precision) <= 232_448


def test_the_result_says_that_it_is_a_model():
    record = estimate(TileWork(64, 100, 6400), 64, 1).to_json()
    assert record["note"] == NOTE == "model, not a measurement"
