"""The choice of kernel and tile: pure functions of network, precision and GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kaleido_kernels.choice import candidates, choose, refusal
from kaleido_kernels.narrow.plan import narrow_shared, register_estimate
from kaleido_kernels.onchip.plan import OnchipTile
from kaleido_kernels.shapes import ACTIVATIONS, NetShape
from kaleido_kernels.stream.plan import stream_shared
from kaleido_kernels.tile import GpuFacts, Tile
from kaleido_kernels.tuned import read_tuned, tile_from_json, tile_to_json, tuned_key
from kaleido_kernels.wide.plan import WideTile

NETWORKS = {
    "points1d": NetShape((1, *[10] * 9, 1)),
    "points2d": NetShape((2, *[50] * 6, 2), bound="sigmoid", low=0.0),
    "digits": NetShape((64, *[256] * 5, 64)),
    "deep128": NetShape((64, *[128] * 9, 64)),
    "mnist": NetShape((784, *[500] * 10, 784)),
    "cifar": NetShape((3072, *[2000] * 10, 3072)),
}
GPUS = {
    "H100": GpuFacts(),
    "A100": GpuFacts(166_912, (8, 0)),
    "RTX 4090": GpuFacts(101_376, (8, 9)),
    "64 KiB": GpuFacts(65_536, (8, 0)),
}
DEVICE_PRECISIONS = ("fp16x3", "ieee", "tf32", "fp16", "bf16")


@pytest.mark.parametrize(
    ("network", "hopper", "others"),
    [
        *[("points1d", "narrow", "narrow"), ("points2d", "narrow", "narrow"), ("digits", "onchip", "wide")],
        *[("deep128", "onchip", "stream"), ("mnist", "onchip", "wide"), ("cifar", "wide", "wide")],
    ],
)
def test_each_class_of_network_gets_its_kernel(network, hopper, others):
    assert choose(NETWORKS[network], "bf16", GPUS["H100"]).kernel == hopper
    assert choose(NETWORKS[network], "bf16", GPUS["A100"]).kernel == others


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("precision", DEVICE_PRECISIONS)
def test_what_is_chosen_fits_and_what_stood_before_it_does_not(network, gpu, precision):
    shape, facts = NETWORKS[network], GPUS[gpu]
    choice = choose(shape, precision, facts)
    assert refusal(shape, precision, choice.tile, facts) is None
    better = candidates(shape, precision, facts)
    for tile in better[: better.index(choice.tile)]:
        assert refusal(shape, precision, tile, facts) in choice.refused


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 15, 16, 63, 64, 127, 128, 255, 256, 257])
def test_every_width_and_activation_has_a_tile(width, activation):
    for dim in (1, 16, 100, width):
        shape = NetShape((dim, width, width, dim), activation)
        for precision in DEVICE_PRECISIONS:
            choose(shape, precision, GPUS["H100"])


# Shared memory that ahead-of-time compilation for sm_90 reports (triton 3.7.1).
@pytest.mark.parametrize(
    ("network", "precision", "tile", "compiled"),
    [
        ("points1d", "bf16", Tile("narrow", 64), 9_216),
        ("points1d", "fp16x3", Tile("narrow", 64), 14_336),
        ("points2d", "bf16", Tile("narrow", 64), 49_152),
        ("points2d", "fp16x3", Tile("narrow", 64), 94_208),
        ("points2d", "bf16", Tile("narrow", 128, 8), 53_248),
        ("deep128", "bf16", Tile("stream", 128, 8, 3), 99_328),
        ("deep128", "fp16x3", Tile("stream", 128, 8, 3), 197_632),
        ("digits", "bf16", Tile("stream", 128, 8, 3), 197_632),
        ("digits", "bf16", Tile("stream", 128, 8, 2), 132_096),
    ],
)
def test_the_estimate_of_shared_memory_is_what_the_compiler_takes(network, precision, tile, compiled):
    estimate = narrow_shared if tile.kernel == "narrow" else stream_shared
    assert estimate(NETWORKS[network], precision, tile) == compiled


def test_a_tile_that_would_spill_is_refused():
    shape = NetShape((62, *[126] * 5, 62))
    assert register_estimate(shape, "bf16", Tile("narrow", 64, 4)) <= 255
    tile = Tile("narrow", 128, 4)
    reason = refusal(shape, "bf16", tile, GPUS["H100"])
    assert reason is not None and "registers a thread, the GPU has 255" in reason


def test_the_reason_names_limit_and_need():
    choice = choose(NETWORKS["deep128"], "bf16", GPUS["H100"])
    assert "narrow" in choice.refused[0] and "the GPU has 232,448" in choice.refused[0]
    assert choice.explain().startswith("onchip 256 chains (4 slots, in turns), first that fits; not narrow")
    choice = choose(NETWORKS["deep128"], "bf16", GPUS["A100"])
    assert any("onchip" in why and "compute capability 9.0, the GPU has 8.0" in why for why in choice.refused)


def test_no_tile_at_all():
    with pytest.raises(ValueError, match=r"no tile fits this GPU for .* in bf16: .* the GPU has 1,000"):
        choose(NETWORKS["points1d"], "bf16", GpuFacts(1_000))
    with pytest.raises(ValueError, match=r"needs compute capability 8.0, the GPU has 7.5"):
        choose(NETWORKS["points1d"], "bf16", GpuFacts(65_536, (7, 5)))


def test_a_tuned_tile_wins_where_it_fits(tmp_path):
    shape, tile = NETWORKS["points2d"], Tile("narrow", 32, 4)
    key = tuned_key(shape, "bf16")
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"device": "a GPU", "tiles": {key: tile_to_json(tile)}}))
    tuned = read_tuned(path)
    choice = choose(shape, "bf16", GPUS["H100"], tuned)
    assert choice.tile == tile and choice.tuned
    assert choose(shape, "fp16", GPUS["H100"], tuned).tile != tile
    too_large = {key: tile_to_json(Tile("narrow", 256, 1))}
    assert not choose(shape, "bf16", GPUS["H100"], too_large).tuned


def test_a_tile_of_the_copy_engine_is_refused_where_there_is_none():
    key = tuned_key(NETWORKS["mnist"], "bf16")
    choice = choose(NETWORKS["mnist"], "bf16", GPUS["A100"], {key: tile_to_json(WideTile(64, 64, 64, 64, 4, 2))})
    assert not choice.tuned and not choice.tile.use_tma
    reason = refusal(NETWORKS["mnist"], "bf16", WideTile(), GPUS["A100"])
    assert reason is not None and "no copy engine" in reason


def test_copies_by_pointers_are_refused_where_products_need_a_fence_behind_them():
    tile = WideTile(64, 64, 64, 32, 4, 3, use_tma=False)
    for facts in (GPUS["H100"], GpuFacts(232_448, (10, 0))):
        assert "fences copies" in str(refusal(NETWORKS["mnist"], "fp16", tile, facts))
        assert refusal(NETWORKS["mnist"], "ieee", tile, facts) is None, "plain products read as threads do"
    for facts in (GPUS["A100"], GpuFacts(101_376, (12, 0)), GpuFacts(has_tma=False)):
        assert refusal(NETWORKS["mnist"], "fp16", tile, facts) is None


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", '{"tiles": {"a": {"kernel": "narrow"}}}', '{"tiles": {"a": {"x": 1}}}', '{"tiles": {"a": 5}}'),
        '{"tiles": {"a": {"kernel": "narrow", "block_chains": 64.0}}}',
        '{"tiles": {"a": {"kernel": "narrow", "block_chains": 64, "num_warps": true}}}',
        '{"tiles": {"a": {"kernel": "wide", "use_tma": "no"}}}',
        '{"tiles": {"a": {"kernel": "graph", "block_chains": "1024"}}}',
    ],
)
def test_a_broken_table_is_refused_by_name(tmp_path, text):
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"gpu\.json is no tuned table"):
        read_tuned(path)


@pytest.mark.parametrize(
    "tile",
    [Tile("narrow", 64), Tile("stream", 128, 8, 2), WideTile(), WideTile(64, 64, 64, 32, 4), OnchipTile(3, 128, True)],
)
def test_tiles_survive_json(tile):
    assert tile_from_json(json.loads(json.dumps(tile_to_json(tile)))) == tile


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "wide"}, "'narrow' or 'stream'"),
        ({"block_chains": 48}, "block_chains is 48"),
        ({"num_warps": 3}, "3 warps"),
        ({"num_stages": 0}, "0 stages"),
    ],
)
def test_impossible_tiles_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(Tile("narrow", 64), **change)


def test_the_package_and_its_tiles_load_neither_torch_nor_triton():
    code = "import sys, kaleido_kernels.choice; sys.exit('torch' in sys.modules or 'triton' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "kernels")}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
