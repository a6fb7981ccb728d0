"""Compiled kernels in the emulator: the six networks in every kernel and precision, whole runs, faults that must show.

Runs with ``pytest --emulate`` only; so do the kernels' own tests, from the same source as in the interpreter.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from conftest import assert_states_close, random_mlp

from kaleido_fast import Trace, fast_sample
from kaleido_fast.benchmarking.cases import SIZES
from kaleido_fast.benchmarking.contest import EngineRun, start_states
from kaleido_fast.benchmarking.gpu.subjects import report_network
from kaleido_fast.benchmarking.tuning import FusedRun
from kaleido_fast.engines.triton import TritonEngine, plain_layers
from kaleido_fast.planning.facts import H200
from kaleido_fast.planning.plan import plan_kernel
from kaleido_fast.planning.request import SampleRequest
from kaleido_kernels.packing import device_precision, weights_range
from kaleido_kernels.proving.emulate import ALLOWED, Comparison, compare
from kaleido_kernels.proving.emulation.block import Conditions
from kaleido_kernels.proving.emulation.driver import Emulator
from kaleido_kernels.proving.emulation.errors import EmulatorError
from kaleido_kernels.proving.trials import trial_tiles
from kaleido_kernels.shapes import KERNELS
from kaleido_kernels.tile import GpuFacts

pytestmark = pytest.mark.emulated
CPU = torch.device("cpu")
FACTS = replace(H200, gpu=GpuFacts(n_sm=2, graph_block=64))  # several tiles for each program of wide
CONDITIONS = {
    "late": Conditions(),
    "early": Conditions(early_copies=True),
    "apart": Conditions(apart=True, seed=1),
    "first": Conditions(apart=True, order=(0, 1)),
    "last": Conditions(apart=True, order=(1, 0)),
}
QUICK = [
    ("points1d", "narrow", "fp16", "late"),
    ("points2d", "narrow", "bf16", "apart"),
    ("points2d", "narrow", "fp32", "early"),
    ("points1d", "narrow", "tf32", "late"),
    ("digits", "stream", "fp16", "late"),
    ("deep128", "stream", "bf16", "early"),
    ("deep128", "stream", "fp32", "apart"),
    ("points2d", "stream", "tf32", "late"),
    ("digits", "wide", "fp32", "late"),
    ("digits", "wide", "fp16", "apart"),
    ("points2d", "wide", "bf16", "early"),
    ("points2d", "wide", "tf32", "late"),
    ("points1d", "graph", "fp32", "late"),
    ("points1d", "graph", "fp16", "late"),
    ("points1d", "graph", "bf16", "apart"),
    ("digits", "onchip", "fp16", "early"),
    ("deep128", "onchip", "fp32", "late"),
]
"""Every kernel in every precision that it offers, small enough for a check of every change."""


@pytest.mark.parametrize("net, kernel, precision, how", QUICK)
def test_every_kernel_in_every_precision_gives_the_right_states(net, kernel, precision, how):
    found = compare(net, precision, kernel, 150, 2, Emulator(CONDITIONS[how]))
    assert found.passed, f"{found.kernel}: error {found.error:.3g} at chain {found.chain}, dim {found.dim}"


TRACED = {"n_chains": 8, "n_draws": 3, "burn_in": 2, "tol": None, "trace": Trace((0, 3), (0, 5))}


@pytest.mark.parametrize("options", [TRACED, {"n_chains": 8, "n_draws": 4, "burn_in": 2, "tol": 1e-4}])
def test_a_run_agrees_with_the_reference(options):
    """The trace was wrong by 0.055: what narrow carried from stretch to stretch was dropped in compilation."""
    model = random_mlp(5, 11, 13, 5)
    got, want = (fast_sample(model, engine=engine, seed=3, **options) for engine in ("triton", "reference"))
    assert_states_close(got.draws, want.draws, 3e-6, 1e-5, "draws")
    if want.trace is not None:
        assert got.trace is not None
        assert_states_close(got.trace, want.trace, 3e-6, 1e-5, "trace")


# ---- the six networks

CASES = [(net, precision, kernel) for net in SIZES for precision in ("fp32", "fp16", "bf16") for kernel in KERNELS]
VARIANTS = {
    "given start": ({"jitter": 0.0}, True),
    "jitter": ({"jitter": 0.1, "settle": 0}, True),
    "start noise": ({"jitter": 0.0}, False),
}


def tolerance(model, precision: str, n_steps: int) -> float:
    return ALLOWED[precision] * model.spec.n_layers * n_steps


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("net, precision, kernel", CASES)
def test_every_draw_of_the_six_networks_is_right(net, precision, kernel, variant):
    """Three steps of 300 chains, a draw after each; cifar one jittered step of 130."""
    model = report_network(net, False)
    options, given = VARIANTS[variant]
    n, n_draws = (130, 1) if net == "cifar" else (300, 3)
    if net == "cifar" and (variant != "jitter" or precision != "fp16"):
        pytest.skip("the largest network is run once: a minute a step")
    request = SampleRequest(
        n_chains=n, n_draws=n_draws, burn_in=0, tol=None, engine="triton", precision=precision, kernel=kernel, **options
    )
    try:
        plan = plan_kernel(model.spec, precision, FACTS, weights_range(plain_layers(model)), kernel=kernel)
    except ValueError as problem:
        pytest.skip(str(problem)[:80])
    engine = TritonEngine(model, request, plan, CPU)
    z0, draws = start_states(model, n, CPU), torch.full((n, n_draws, model.spec.dim), float("nan"))
    out = engine.advance(torch.arange(n), z0 if given else None, 0, n_draws, draws, lambda _: None)
    want = EngineRun(model, "reference", precision, CPU, **options).sample(z0, 0, n_draws)
    atol = tolerance(model, precision, n_draws)
    assert_states_close(draws, want.draws, atol, what=f"draws of {plan.choice.tile.name}")
    assert_states_close(out.state, want.final, atol, what="final states")
    print(f"error {float((draws - want.draws).abs().max()):.2e} of {atol:.2e}", end=" ")


TILES = [(net, precision) for net in SIZES if net != "cifar" for precision in ("fp32", "fp16")]


@pytest.mark.slow
@pytest.mark.parametrize("net, precision", TILES)
def test_every_tile_worth_timing_is_right(net, precision):
    model = report_network(net, False)
    on_gpu = device_precision(plain_layers(model), precision)
    z0 = start_states(model, 300, CPU)
    want = EngineRun(model, "reference", precision, CPU).sample(z0, 2, 1).final
    tiles = [tile for tile in trial_tiles(model.spec, on_gpu, FACTS.gpu) if "graph" not in tile.name]
    for tile in tiles:
        run = FusedRun(model, precision, CPU, FACTS, 300, tile)
        got = run.engine.advance(run.chain_ids, None, 0, 3, run.draws, lambda _: None).state
        assert_states_close(got, want, tolerance(model, precision, 3), what=tile.name)
    print(f"{len(tiles)} tiles", end=" ")


# ---- faults

Fault = Callable[[str], str]


def replaced(pattern: str, by: str, count: int = 0) -> Fault:
    """The PTX with something replaced; a pattern that is not there is a mistake of the test."""

    def change(text: str) -> str:
        changed, n = re.subn(pattern, by, text, count=count)
        assert n, f"nothing like {pattern} in the compiled kernel"
        return changed

    return change


def state_not_carried(text: str) -> str:
    """Drops, in the loop of products, a move into a register from which an operand is made: what a step hands on."""
    lines = text.splitlines()
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"(\$L__BB\w+):", line))}
    for end, line in enumerate(lines):
        branch = re.search(r"bra(?:\.uni)?\s+(\$L__BB\w+);", line)
        start = labels.get(branch[1], end) if branch else end
        body = "\n".join(lines[start:end])
        if "wgmma" not in body:
            continue
        for place in range(start, end):
            moved = re.match(r"\s+mov\.b32\s+(%r\d+), (%r\d+);", lines[place])
            if moved and re.search(rf"cvt\.rn\S*\s+%\w+, [^;]*{moved[1]}\b", body):
                return "\n".join(lines[:place] + lines[place + 1 :])
    raise AssertionError("no state is carried by a move in the compiled kernel")


WAIT = r"mbarrier\.try_wait[^;]* complete, [^;]*;"
ARRIVE = r"(mbarrier\.arrive\.expect_tx[^;]*), (\d+);"
COPY = r"(@%p\d+ cp\.async\.bulk\.tensor[^;]*)\{(%r\d+), (%r\d+)\}([^;]*;)"


def moved_copy(row: int = 0, col: int = 0) -> str:
    """A copy of the copy engine from some rows or columns further on."""
    moved = rf"add.s32 col, \2, {col}; add.s32 row, \3, {row};"
    return "{\n.reg .b32 row;\n.reg .b32 col;\n" + moved + r" \1{col, row}\4" + "\n}"


FAULTS: dict[str, tuple[str, str, str, Fault]] = {
    # name: network, kernel, precision, what is changed
    "a state that is not carried to the next step": ("points2d", "narrow", "fp16", state_not_carried),
    "an operand's descriptor off by 32 bytes": (
        *("deep128", "stream", "fp16"),
        replaced(r"(wgmma\.mma_async[^;]*\}, )(%rd\d+)(, %p|, [01],)", r"add.s64 \2, \2, 2; \1\2\3", 1),
    ),
    "a copy from one block further on": ("digits", "wide", "fp16", replaced(COPY, moved_copy(row=128), 1)),
    "a copy from other columns": ("digits", "wide", "fp16", replaced(COPY, moved_copy(col=8), 1)),
    "no wait for a thread's copies": ("deep128", "stream", "fp16", replaced(r"cp\.async\.wait_group\s+\d+;", "")),
    "a wait for all but one group of copies": (
        *("deep128", "stream", "fp16"),
        replaced(r"cp\.async\.wait_group\s+0;", "cp.async.wait_group 1;"),
    ),
    "no wait for the copy engine": ("digits", "wide", "fp16", replaced(WAIT, "setp.eq.u32 complete, 0, 0;")),
    "half of the bytes expected": (
        *("digits", "wide", "fp16"),
        replaced(ARRIVE, lambda found: f"{found[1]}, {int(found[2]) // 2};"),  # type: ignore[arg-type]
    ),
    "more bytes expected than come": (
        *("digits", "wide", "fp16"),
        replaced(ARRIVE, lambda found: f"{found[1]}, {int(found[2]) * 2};"),  # type: ignore[arg-type]
    ),
    "no wait for products": (
        *("deep128", "stream", "fp16"),
        replaced(r"wgmma\.wait_group\.sync\.aligned\s+\d+;", "wgmma.wait_group.sync.aligned 7;"),
    ),
    "one wait for products less": (
        *("points2d", "narrow", "fp16"),
        replaced(r"wgmma\.wait_group\.sync\.aligned\s+\d+;", "", 1),
    ),
    "no fence between stores and the copy engine": (
        "digits",
        "wide",
        "fp16",
        replaced(r"fence\.proxy\.async\.global;", ""),
    ),
    "no fence between stores and products": (
        *("digits", "stream", "fp16"),
        replaced(r"fence\.proxy\.async\.shared::cta;", ""),
    ),
    "a store past a tensor": (
        *("points2d", "narrow", "fp16"),
        replaced(r"(st\.global\.\S+) \[ (%rd\d+) \+ 0 \]", r"\1 [ \2 + 4096 ]"),
    ),
    "a load past a tensor": (
        *("points2d", "stream", "fp16"),
        replaced(r"(ld\.global\.v\d\.\S+) (\{[^}]*\}), \[ (%rd\d+) \+ 0 \]", r"\1 \2, [ \3 + 65536 ]"),
    ),
    "no barriers": ("deep128", "stream", "fp16", replaced(r"bar\.sync\s+0;", "")),
    "a loop that does not count": ("points2d", "narrow", "fp16", replaced(r"(add\.s32\s+%r\d+, %r\d+), 1;", r"\1, 0;")),
}


def shows(net: str, kernel: str, precision: str, fault: Fault | None, conditions: Conditions) -> str:
    """What a fault shows as under some conditions; nothing if it does not."""
    emulator = Emulator(replace(conditions, most_instructions=300_000), change=fault)
    try:
        found: Comparison = compare(net, precision, kernel, 150, 3, emulator)
    except EmulatorError as problem:
        return f"{type(problem).__name__}: {problem}"
    return "" if found.passed else f"error {found.error:.3g}"


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_shows(name):
    net, kernel, precision, fault = FAULTS[name]
    found = {}
    for how, conditions in CONDITIONS.items():
        found[how] = shows(net, kernel, precision, fault, conditions)
        if found[how]:
            break
    print(f"{how}: {found[how][:110]}", end=" ")
    assert any(found.values()), f"{name} shows under none of {', '.join(found)}"


@pytest.mark.parametrize("net, kernel, precision", sorted({fault[:3] for fault in FAULTS.values()}))
def test_without_a_fault_nothing_shows(net, kernel, precision):
    assert {
        how: shows(net, kernel, precision, None, conditions) for how, conditions in CONDITIONS.items()
    } == dict.fromkeys(CONDITIONS, "")
