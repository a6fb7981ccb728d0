"""Benchmarks: timing with a clock of our own, peers against the reference, tables and files. No speed is asserted."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from kaleido_fast import ModelCard, save_checkpoint
from kaleido_fast.benchmarking import bars, cases, ceiling, cold, contest, machine, peers, report, runner, timing
from kaleido_fast.benchmarking.acceptance import WrongStatesError, measure_deviation, refuse_wrong
from kaleido_fast.benchmarking.cases import SIZES, Size, Subject
from kaleido_fast.benchmarking.faults import DeviceLostError
from kaleido_fast.benchmarking.peers import PEERS, Setting, build_peer, choose_peers, loops
from kaleido_fast.cli import main
from kaleido_fast.errors import InputError
from kaleido_fast.model import BOUNDS
from kaleido_fast.presets import NETWORKS

from conftest import random_mlp  # isort: skip

CPU = torch.device("cpu")


class Clock:
    """Time that passes only when somebody works or waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def work(self, name: str, seconds: float, uncounted: float = 0.0):
        def run() -> float:
            self.order.append(name)
            self.now += seconds + uncounted
            return uncounted

        return run

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += seconds


def test_contestants_take_turns_forwards_and_backwards_and_nobody_is_always_first():
    clock = Clock()
    runs = {name: clock.work(name, 1.0) for name in "abc"}
    timing.time_alternating(runs, 4, clock=clock, pause=clock.pause)
    assert "".join(clock.order) == "abccba" + "bcaacb"


def test_seconds_hold_the_work_and_neither_pauses_nor_packing():
    clock, told = Clock(), []
    runs = {"engine": clock.work("engine", 2.0, uncounted=5.0), "peer": clock.work("peer", 3.0)}
    seconds = timing.time_alternating(
        runs, 3, clock=clock, pause=clock.pause, after=lambda name, value: told.append((name, value))
    )
    assert seconds == {"engine": [pytest.approx(2.0)] * 3, "peer": [pytest.approx(3.0)] * 3}
    assert len(told) == 6


def test_the_device_is_waited_for_before_and_after_the_work():
    clock, queued = Clock(), []

    def launch() -> float:
        queued.append(4.0)  # asynchronous: the work is done when somebody waits
        return 0.0

    def synchronise() -> None:
        clock.now += sum(queued)
        queued.clear()

    seconds = timing.time_alternating(
        {"gpu": launch}, 2, clock=clock, pause=lambda _: queued.append(9.0), synchronise=synchronise
    )
    assert seconds["gpu"] == [4.0, 4.0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0], (3, 3, 3)), ([4.0, 1.0, 3.0, 2.0, 5.0], (3, 1.8, 4.2)), ([1.0, 2.0], (1.5, 1.2, 1.8))],
)
def test_spread_is_median_and_quantiles(values, expected):
    got = timing.spread(values)
    assert (got.median, got.p20, got.p80) == pytest.approx(expected)


def test_ratio_within_the_spread_is_a_tie():
    clear = timing.compare([1.0, 1.1, 0.9], [2.0, 2.2, 1.8])
    assert clear.value == pytest.approx(2.0)
    assert not clear.tie
    assert timing.compare([1.0, 1.3, 0.8], [1.1, 1.2, 0.9]).tie
    slower = timing.compare([2.0, 2.1], [1.0, 1.1])
    assert slower.value < 1 and not slower.tie
    assert timing.compare([1.0], [9.0]).tie, "one timing has no spread"
    with pytest.raises(ValueError, match="at least one round"):
        timing.spread([])


def test_the_table_of_sizes_covers_the_six_networks():
    assert tuple(SIZES) == tuple(NETWORKS)
    for name in SIZES:
        spec, subject = cases.network_spec(name), Subject(name, network=name)
        quick, full = (cases.make_size(subject, spec, quick=quick, kind="cpu", threads=2) for quick in (True, False))
        assert (quick, full) == (SIZES[name].quick, SIZES[name].full)
        assert quick.n_chains * quick.n_steps < full.n_chains * full.n_steps
        assert full.n_steps >= 2, "one step is no recursion"


def test_more_cores_take_more_steps_and_options_win():
    spec, subject = cases.network_spec("digits"), Subject("digits", network="digits")
    size = partial(cases.make_size, subject, spec, quick=True, kind="cpu")
    assert size(threads=8).n_steps == 4 * SIZES["digits"].quick.n_steps
    assert size(threads=1).n_steps == SIZES["digits"].quick.n_steps
    assert size(threads=8, n_chains=7, n_steps=3) == Size(7, 3)
    assert cases.scaled(Size(200, 2), "cuda", 2).n_chains == 100_000
    with pytest.raises(InputError, match="chains is 0"):
        size(threads=8, n_chains=0)


def test_a_checkpoint_takes_about_the_work_of_the_nearest_network():
    spec = random_mlp(64, 250, 250, 64).spec
    size = cases.make_size(Subject("mine", path="mine.safetensors"), spec, quick=True, kind="cpu", threads=2)
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


def test_start_states_do_not_depend_on_how_many_are_made(monkeypatch):
    model = random_mlp(6, 9, 6)
    assert torch.equal(contest.start_states(model, 100, CPU)[:7], contest.start_states(model, 7, CPU))


NETS = [
    {"widths": (6, 11, 13, 6)},
    {"widths": (5, 7, 5), "activation": "gelu", "bound": "sigmoid"},
    {"widths": (5, 7, 5), "activation": "gelu_tanh"},
    {"widths": (3, 8, 8, 3), "activation": "silu", "bias": False},
    {"widths": (3, 8, 3), "activation": "leaky_relu", "negative_slope": 0.2},
    {"widths": (4, 4), "activation": "tanh", "bound": "sigmoid"},
]


@pytest.mark.parametrize("net", NETS, ids=lambda net: f"{net.get('activation', 'relu')}-{len(net['widths'])}")
@pytest.mark.parametrize("name", [name for name in PEERS if PEERS[name].module != "compile"])
def test_peers_reproduce_the_reference_and_are_caught_when_they_do_not(name, net):
    missing = [module for module in PEERS[name].needs if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"{name}: {missing} not installed")
    options = dict(net)
    model = random_mlp(*options.pop("widths"), scale=1.0, **options).requires_grad_(False)
    z0 = contest.start_states(model, 37, CPU)
    before = z0.clone()
    peer = build_peer(PEERS[name], Setting(model, len(z0), CPU, threads=1))
    expected = contest.reference_states(model, z0, peer.precision, **peer.proof_request)
    found = contest.check_contestant(peer, z0, expected, model.spec.n_layers)
    assert found.error < 1e-5 or peer.precision != "fp32", str(found)
    assert torch.equal(z0, before), "a peer writes into the start states"
    assert peer.run(z0, 4).shape == z0.shape
    expected[-1] = expected[-1].clone()
    expected[-1][5, 1] += 2e-3 if peer.precision == "fp32" else 0.5
    with pytest.raises(WrongStatesError, match=r"after step 3 \(chain 5, dim 1"):
        contest.check_contestant(peer, z0, expected, model.spec.n_layers)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compile", "compile-fp16"])
def test_compiled_peers_reproduce_the_reference(name):
    model = random_mlp(6, 11, 13, 6, scale=1.0).requires_grad_(False)
    z0 = contest.start_states(model, 37, CPU)
    peer = build_peer(PEERS[name], Setting(model, len(z0), CPU, threads=1))
    expected = contest.reference_states(model, z0, peer.precision)
    found = contest.check_contestant(peer, z0, expected, model.spec.n_layers)
    assert found.error < 1e-5 or peer.precision != "fp32", str(found)


def test_adapters_are_short_enough_to_be_judged_at_a_glance():
    adapters = {Path(peers.__file__).with_name(f"{peer.module}.py") for peer in PEERS.values()}
    assert max(len(path.read_text().splitlines()) for path in adapters) < 40


def test_a_peer_that_gives_nan_or_another_shape_is_refused():
    model = random_mlp(4, 5, 4)
    z0 = contest.start_states(model, 8, CPU)
    expected = contest.reference_states(model, z0)
    for wrong, text in ((lambda z, n: z * torch.nan, "by nan"), (lambda z, n: z[:, :2], "shape")):
        with pytest.raises(InputError, match=text):
            contest.check_contestant(contest.Contestant(wrong), z0, expected, model.spec.n_layers)


def rounded(x: torch.Tensor, precision: str) -> torch.Tensor:
    return x.to({"fp16": torch.float16, "bf16": torch.bfloat16}[precision]).to(torch.float32)


def same(x: torch.Tensor, precision: str) -> torch.Tensor:
    return x


def modelled(model, precision: str, *, parts: int, rounding=rounded, operands=rounded) -> contest.Run:
    """The network in 16 bits as a GPU may do it: each product in ``parts`` sums, ``rounding`` after each addition."""
    spec = model.spec
    weights = [operands(layer.weight.detach(), precision).t().contiguous() for layer in model.linears]

    def layer(x: torch.Tensor, i: int) -> torch.Tensor:
        total, length = torch.zeros(()), -(-x.shape[1] // parts)
        for columns in torch.arange(x.shape[1]).split(length):
            part = rounding(x[:, columns] @ weights[i][columns], precision)
            total = rounding(total + part, precision)
        total = rounding(total + model.linears[i].bias, precision)
        return BOUNDS[spec.bound](total) if i == spec.n_layers - 1 else model.activate(total)

    @torch.inference_mode()
    def run(z0: torch.Tensor, n_steps: int) -> torch.Tensor:
        x = z0
        for i in range(n_steps * spec.n_layers):
            x = layer(operands(x, precision), i % spec.n_layers)
        return x

    return run


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("network", ["mnist", "deep128"])
def test_rounding_alone_is_accepted_in_16_bits(network, precision):
    """mnist on its own: partial sums that a library rounds make errors up to 1.4e-2 in fp16, 1.1e-1 in bf16."""
    model = cases.random_network(network).requires_grad_(False)
    z0 = contest.start_states(model, 600, CPU)
    expected = contest.reference_states(model, z0, precision)
    largest = 0.0
    for parts, rounding in ((8, same), (1, rounded), (4, rounded)):
        run = modelled(model, precision, parts=parts, rounding=rounding)
        entry = contest.Contestant(run, precision=precision)
        found = contest.check_contestant(entry, z0, expected, model.spec.n_layers)
        assert 0 < found.relative < 0.05, str(found)
        largest = max(largest, found.error)
    assert network != "mnist" or largest > {"fp16": 1e-2, "bf16": 8e-2}[precision], "the model of rounding is too kind"


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("fp16", {"parts": 8, "operands": lambda x, _: rounded(x, "bf16"), "rounding": same}),  # too few bits
        ("fp16", {"parts": 8, "rounding": lambda x, _: rounded(x, "bf16")}),  # sums kept in too few bits
        ("fp16", {"parts": 500}),  # sums in fp16, one product at a time
    ],
)
def test_arithmetic_of_too_few_bits_is_refused_though_no_value_stands_out(precision, options):
    model = cases.random_network("deep128").requires_grad_(False)
    z0 = contest.start_states(model, 300, CPU)
    expected = contest.reference_states(model, z0, precision)
    entry = contest.Contestant(modelled(model, precision, **options), precision=precision)
    with pytest.raises(WrongStatesError, match="differs from the reference by"):
        contest.check_contestant(entry, z0, expected, model.spec.n_layers)


CHAINS, DIM, LAYERS, STEP = 100_000, 64, 6, 3


def states_with_rounding(precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(reference, states that are off by as much as rounding is, heavy tails included)."""
    generator = torch.Generator().manual_seed(0)
    want = torch.rand(CHAINS, DIM, generator=generator) * 2 - 1
    unit = {"fp16": 2**-11, "bf16": 2**-8}[precision] * (LAYERS * STEP) ** 0.5 * float(want.square().mean().sqrt())
    noise = torch.randn(CHAINS, DIM, generator=generator) * (0.7 + 0.3 * torch.rand(CHAINS, 1, generator=generator))
    return want, want + unit * noise


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_one_wrong_chain_tile_dim_or_value_of_100_000_chains_is_refused_and_named(precision):
    want, good = states_with_rounding(precision)
    found = measure_deviation(good, want, STEP)
    refuse_wrong(found, precision, LAYERS)
    error = (good - want).abs()
    assert found.error == float(error.max()) == float(error[found.chain, found.dim])
    assert found.relative == pytest.approx(float((good - want).double().norm() / want.double().norm()), rel=1e-3)

    def refused(rows, columns, values) -> str:
        wrong = good.clone()
        wrong[rows, columns] = values
        with pytest.raises(WrongStatesError, match=f"after step {STEP} ") as caught:
            refuse_wrong(measure_deviation(wrong, want, STEP), precision, LAYERS)
        place = caught.value.deviation
        assert float((wrong - want)[place.chain, place.dim].abs()) == pytest.approx(place.error, nan_ok=True)
        return str(caught.value)

    everything = slice(None)
    assert "chain 70123" in refused(70_123, everything, want[70_124])
    tile = slice(51_200, 51_328)
    assert re.search(r"chain 51[23]\d\d", refused(tile, everything, want[:128]))
    assert "after step" in refused(tile, slice(32, 48), want[tile, 16:32])
    small = {"fp16": 0.01, "bf16": 0.08}[precision]  # a little more than rounding, in every chain or every dim
    assert "dim 7 by" in refused(everything, 7, good[:, 7] + small)
    assert "chain 99999 by" in refused(99_999, everything, good[99_999] + small)
    assert "chain 5, dim 3" in refused(5, 3, want[5, 3] + {"fp16": 0.05, "bf16": 0.3}[precision])
    assert "all states by" in refused(everything, everything, want + 2.3 * (good - want))
    assert "nan" in refused(8, 9, torch.nan)


def test_errors_may_grow_with_the_root_of_the_depth_in_16_bits_and_not_at_all_in_fp32():
    want = torch.rand(200, 30) * 2 - 1
    for precision, factor in (("fp16", 10.0), ("bf16", 10.0), ("fp32", 1.0)):
        largest = []
        for n_layers in (1, 100):
            low, high = 0.0, 10.0
            for _ in range(60):
                error = (low + high) / 2
                got = want.double()
                got[3, 4] += error
                try:
                    refuse_wrong(measure_deviation(got, want.double(), 1), precision, n_layers)
                    low = error
                except WrongStatesError:
                    high = error
            largest.append(low)
        assert largest[1] / largest[0] == pytest.approx(factor)
    assert largest[0] == pytest.approx(2e-4)


def test_the_fastest_variant_that_works_is_taken_and_the_others_problems_are_told(monkeypatch):
    z0 = torch.zeros(3, 2)
    paces = {"slow": 2.0, "quick": 1.0}
    monkeypatch.setattr(peers, "two_steps_seconds", lambda run, z0: paces[run])

    def broken():
        raise RuntimeError("no compiler\nand a long traceback")

    variants = {"slow": lambda: "slow", "broken": broken, "quick": lambda: "quick"}
    assert peers.fastest(variants, z0) == ("quick", "quick; broken failed: no compiler")
    assert peers.fastest(variants, z0, seconds=-1) == ("slow", "slow"), "there was time for the first that works alone"
    with pytest.raises(InputError, match=r"^a failed: no compiler; b failed: no compiler$"):
        peers.fastest({"a": broken, "b": broken}, z0)


@pytest.mark.parametrize("bad", ["default", "max-autotune-no-cudagraphs"])
def test_a_mode_of_torch_compile_that_fails_costs_itself_alone(monkeypatch, bad):
    tried = []

    def compiled(model, mode, dynamic):
        tried.append(mode)
        if mode == bad:
            raise RuntimeError("accessing tensor output of CUDAGraphs that has been overwritten")
        return model

    monkeypatch.setattr(torch, "compile", compiled)
    model = random_mlp(4, 5, 4, scale=1.0).requires_grad_(False)
    z0 = contest.start_states(model, 9, CPU)
    peer = build_peer(PEERS["compile"], Setting(model, len(z0), CPU, threads=1))
    assert tried == ["default", "max-autotune-no-cudagraphs"] and f"{bad} failed: accessing" in peer.about
    assert contest.check_contestant(peer, z0, contest.reference_states(model, z0), 2).error < 1e-5


class FakeCuda:
    """Records what is done outside of a capture and inside, in place of a GPU."""

    def __init__(self, monkeypatch, *, fails: bool = False) -> None:
        self.stream, self.capturing = "main", False
        self.calls: list[str] = []
        fake = self

        class Graph:
            def replay(self):
                fake.calls.append("replay")

        class Side:
            def __init__(self, device):
                pass

            def wait_stream(self, other):
                fake.calls.append(f"wait for {other}")

        @contextlib.contextmanager
        def on(stream):
            before, fake.stream = fake.stream, stream
            yield
            fake.stream = before  # as torch's: not given back if something fails inside

        @contextlib.contextmanager
        def stream_of(stream):
            before, fake.stream = fake.stream, stream
            try:
                yield
            finally:
                fake.stream = before

        @contextlib.contextmanager
        def capture(graph, stream):
            with on(stream):
                fake.capturing = True
                if fails:
                    raise RuntimeError("operation not permitted when stream is capturing")
                yield
                fake.capturing = False

        for name, value in (("CUDAGraph", Graph), ("Stream", Side), ("stream", stream_of), ("graph", capture)):
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: self.calls.append("synchronise"))

    def work(self) -> None:
        assert self.stream != "main"
        self.calls.append("captured" if self.capturing else "warm-up")


def test_a_step_is_captured_once_after_it_has_run_on_a_stream_that_waited(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    replay = loops.capture(cuda.work, torch.device("cuda"))
    assert cuda.calls[0] == "wait for main" and cuda.calls[1:4] == ["warm-up"] * 3
    assert cuda.calls.count("captured") == 1 and cuda.calls[-1] == "captured" and cuda.stream == "main"
    replay()
    assert cuda.calls[-1] == "replay"


def test_a_capture_that_fails_gives_the_stream_back(monkeypatch):
    cuda = FakeCuda(monkeypatch, fails=True)
    with pytest.raises(RuntimeError, match="not permitted"):
        loops.capture(cuda.work, torch.device("cuda"))
    assert cuda.stream == "main"


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if "cuda" in peer.devices])
def test_peers_reproduce_the_reference_on_a_gpu(name):
    device = torch.device("cuda")
    if reason := peers.why_absent(PEERS[name], device):
        pytest.skip(f"{name}: {reason}")
    model = random_mlp(6, 11, 13, 6, scale=1.0).requires_grad_(False).to(device)
    z0 = contest.start_states(model, 300, device)
    peer = build_peer(PEERS[name], Setting(model, len(z0), device, threads=1, quick=True))
    expected = contest.reference_states(model, z0, peer.precision, **peer.proof_request)
    for _ in range(2):  # a captured step starts again from other states
        contest.check_contestant(peer, z0, expected, model.spec.n_layers)


def test_the_published_procedure_never_waits_and_draws_its_noise_where_the_states_are():
    """On the meta device a value cannot be read, and nothing mixes with tensors of the CPU."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            seen.append((str(function), getattr(result, "device", None)))
            return result

    meta = torch.device("meta")
    model = random_mlp(4, 9, 4).requires_grad_(False).to(meta)
    peer = build_peer(PEERS["published"], Setting(model, 8, meta, threads=1))
    with Watching():
        final = peer.run(torch.empty(8, 4, device=meta), 3)
    assert final.device == meta and {device for _, device in seen} == {meta}
    assert sum("rand" in name for name, _ in seen) == sum("mse_loss" in name for name, _ in seen) == 3


@pytest.mark.parametrize("bound", ["tanh", "sigmoid"])
def test_the_published_procedure_adds_its_drifting_noise_after_the_network(bound):
    model = random_mlp(4, 9, 4, bound=bound)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    low, high = model.spec.low, model.spec.high
    z0 = contest.start_states(model, 2000, CPU)
    moved = build_peer(PEERS["published"], Setting(model, 2000, CPU, threads=1)).run(z0, 2) - (low + high) / 2
    spread = 0.01 * (high - low)  # of noise that is uniform on [high, 2 high - low), times the published 0.01
    assert float(moved.min()) == pytest.approx(0.01 * high, abs=0.01 * spread)
    assert float(moved.max()) == pytest.approx(0.01 * high + spread, abs=0.01 * spread)


def test_the_published_procedure_draws_new_noise_each_time_and_stays_in_range():
    model = random_mlp(4, 9, 4)
    z0 = contest.start_states(model, 64, CPU)
    peer = build_peer(PEERS["published"], Setting(model, 64, CPU, threads=1))
    first, second = peer.run(z0, 2), peer.run(z0, 2)
    assert not torch.equal(first, second)
    assert float(first.min()) >= -1 and float(first.max()) <= 1


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_engines_run_on_their_public_path_and_report_packing_apart(engine):
    if engine == "cpu" and importlib.util.find_spec("numba") is None:
        pytest.skip("the cpu engine needs numba")
    model = random_mlp(6, 11, 6)
    z0 = contest.start_states(model, 20, CPU)
    entry = contest.engine_contestant(model, engine, "fp32", CPU)
    found = contest.check_contestant(entry, z0, contest.reference_states(model, z0), model.spec.n_layers)
    assert found.error < 1e-5, str(found)
    assert entry.uncounted() > 0
    assert contest.resolve_engine(model, engine, "fp32", CPU) == engine


def test_peers_are_chosen_by_name_and_left_out_with_a_reason(monkeypatch):
    chosen, skipped = choose_peers((), CPU, quick=True)
    assert {"eager", "chunked", "published"} <= {peer.name for peer in chosen}
    assert "--peers" in skipped["compile"] and "cuda" in skipped["eager-fp16"]
    assert [peer.name for peer in choose_peers(("compile", "eager"), CPU, quick=True)[0]] == ["compile", "eager"]
    assert choose_peers(("none",), CPU, quick=False) == ([], {})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "jax not installed" in choose_peers(("all",), CPU, quick=False)[1]["jax"]
    with pytest.raises(InputError, match="peer 'jax' jax not installed"):
        choose_peers(("jax",), CPU, quick=False)
    with pytest.raises(InputError, match="did you mean 'eager'"):
        choose_peers(("eagr",), CPU, quick=False)


def test_every_peer_has_an_adapter():
    for peer in PEERS.values():
        assert importlib.util.find_spec(f"kaleido_fast.benchmarking.peers.{peer.module}"), peer.name


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp64", "bf16"])
def test_ceiling_runs_in_every_precision_and_leaves_the_setting_alone(precision, monkeypatch):
    monkeypatch.setattr(ceiling, "SIDE", 32)
    before = torch.get_float32_matmul_precision()
    assert ceiling.ceiling_run(precision, CPU)() == 0.0
    assert torch.get_float32_matmul_precision() == before


def small_request(**options) -> runner.BenchRequest:
    defaults = {
        "subjects": [Subject("points1d", network="points1d")],
        "engine": "reference",
        "peers": [PEERS["eager"], PEERS["chunked"]],
        "skipped": {"jax": "jax not installed"},
        "precision": "fp32",
        "device": CPU,
        "n_chains": 30,
        "n_steps": 2,
        "rounds": 3,
        "first_calls": False,
    }
    return runner.BenchRequest(**{**defaults, **options})


@pytest.fixture(scope="module")
def small_report() -> runner.BenchReport:
    subjects = [Subject(name, network=name) for name in ("points1d", "points2d")]
    return runner.run_bench(small_request(subjects=subjects))


def test_a_run_times_everybody_and_its_record_holds_every_raw_timing(small_report):
    record = json.loads(json.dumps(report.as_record(small_report)))
    assert [entry["network"] for entry in record["results"]] == ["points1d", "points2d"]
    assert {"date", "command", "commit", "dirty", "machine", "versions", "quick"} <= record.keys()
    assert {"cpu", "cores", "threads", "system", "load_average"} <= record["machine"].keys()
    for entry in record["results"]:
        assert set(entry["contestants"]) == {"reference", "eager", "chunked"}
        assert len(entry["ceiling"]["seconds"]) == 3
        for contestant in entry["contestants"].values():
            seconds = contestant["seconds"]
            assert len(seconds) == 3
            speed = entry["n_chains"] * entry["n_steps"] / sorted(seconds)[1]
            assert contestant["chain_steps_per_second"]["median"] == pytest.approx(speed)
            assert contestant["flops_per_second"] == pytest.approx(speed * entry["flops_per_step"])
        assert entry["ratios"]["reference"].keys() == {"eager", "chunked"}
        assert entry["skipped"] == {"jax": "jax not installed"}


def test_progress_only_moves_forward_and_ends_at_one():
    shares: list[float] = []
    runner.run_bench(small_request(), lambda share, text: shares.append(share))
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_wrong_or_failing_peer_is_not_timed_and_says_why(monkeypatch):
    def build(peer, setting):
        if peer.name == "eager":
            return contest.Contestant(lambda z0, n: z0 * 0.5)
        raise RuntimeError("no compiler\nlong traceback")

    monkeypatch.setattr(runner, "build_peer", build)
    (result,) = runner.run_bench(small_request()).results
    assert result.peers == []
    assert "differs from the reference" in result.skipped["eager"]
    assert result.skipped["chunked"] == "no compiler"


def failing_peer(monkeypatch, answers: bool) -> None:
    """Peer eager fails on points2d; whether the device ``answers`` after that."""
    failed = []

    def build(peer, setting):
        if peer.name == "eager" and setting.model.spec == cases.network_spec("points2d"):
            failed.append(peer.name)
            raise RuntimeError("CUDA error: an illegal memory access\nlong traceback")
        return build_peer(peer, setting)

    monkeypatch.setattr(runner, "build_peer", build)
    monkeypatch.setattr(runner, "device_answers", lambda device: answers or not failed)


def test_a_lost_device_ends_the_run_and_what_was_measured_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    failing_peer(monkeypatch, answers=False)
    Path("README.md").write_text(f"{report.BEGIN}\nolder\n{report.END}\n")
    nets = ("--net", "points1d,points2d", "--peers", "eager,chunked", "--json", "bench.json")
    files = ("--readme", "README.md", "--picture", "bars.png")
    status, output, errors = call(monkeypatch, capsys, *SMALL, *nets, *files)
    assert status == 2
    assert "points1d" in output
    assert errors.count("\n") == 1
    assert "eager: CUDA error: an illegal memory access" in errors
    assert "points2d not measured, README.md left as it is, bars.png left as it is" in errors
    record = json.loads(Path("bench.json").read_text())
    assert [entry["network"] for entry in record["results"]] == ["points1d"]
    assert (record["unmeasured"], "takes no more work" in record["lost"]) == (["points2d"], True)
    assert "older" in Path("README.md").read_text()
    assert not Path("bars.png").exists()


def test_a_device_lost_before_anything_was_measured_is_an_error(monkeypatch):
    failing_peer(monkeypatch, answers=False)
    subjects = [Subject("points2d", network="points2d"), Subject("points1d", network="points1d")]
    with pytest.raises(DeviceLostError, match="eager: CUDA error"):
        runner.run_bench(small_request(subjects=subjects))


def test_a_peer_that_fails_on_a_device_that_still_answers_costs_itself_alone(monkeypatch):
    failing_peer(monkeypatch, answers=True)
    (result,) = runner.run_bench(small_request(subjects=[Subject("points2d", network="points2d")])).results
    assert result.peers == ["chunked"]
    assert result.skipped["eager"] == "CUDA error: an illegal memory access"


def test_engine_all_skips_what_cannot_run_and_a_name_is_refused():
    (result,) = runner.run_bench(small_request(engine="all", peers=[])).results
    assert "reference" in result.engines
    if "triton" not in result.engines:
        assert "cannot run here" in result.skipped["triton"]
        with pytest.raises(InputError, match="cannot run here"):
            runner.run_bench(small_request(engine="triton"))


def test_first_calls_are_measured_in_a_new_process():
    task = {"name": "points1d", "network": "points1d", "path": None, "n_chains": 20, "engine": "reference"}
    call = cold.measure_first_call({**task, "precision": "fp32", "device": "cpu", "threads": 1})
    assert call.cached and call.import_seconds > 0.05
    assert call.peak_bytes >= call.idle_bytes
    with pytest.raises(InputError, match="unknown engine 'tritn'"):
        cold.measure_first_call({**task, "engine": "tritn", "precision": "fp32", "device": "cpu", "threads": 1})


def test_the_table_fits_80_columns(small_report):
    output = io.StringIO()
    Console(width=80, file=output).print(*report.tables(small_report))
    assert "…" not in output.getvalue()


def test_the_table_names_engines_peers_ratios_and_who_is_missing(small_report):
    output = io.StringIO()
    Console(width=100, file=output).print(*report.tables(small_report))
    text = "\n".join([output.getvalue(), *report.remarks(small_report)])
    for words in (
        "points2d",
        "reference",
        "chunked",
        "GFLOP/s",
        "not timed: jax: jax not installed",
        "30 x 2",
        "is x",
    ):
        assert words in text, words


def test_markdown_has_a_line_a_network_and_says_how_it_was_made(small_report):
    lines = report.markdown_table(small_report).splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert len(rows) == 2
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1, "columns differ"
    assert small_report.about["command"] in lines[-1]
    assert small_report.about["date"][:10] in lines[-2]


def test_ties_are_named_in_the_table():
    assert report.ratio_text(timing.Ratio(1.04, 0.9, 1.2)) == "1.04 tie"
    assert report.ratio_text(timing.Ratio(2.5, 2.4, 2.6)) == "2.50"


@pytest.mark.parametrize(("value", "text"), [(4_670_000, "4.67M"), (326_123, "326k"), (12.34, "12.3"), (5e9, "5G")])
def test_short_numbers(value, text):
    assert report.short(value) == text


def test_readme_is_written_between_its_markers_only(small_report, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n{report.BEGIN}\nold table\n{report.END}\nafter\n")
    report.write_readme(small_report, readme)
    once = readme.read_text()
    assert once.startswith(f"# Title\n{report.BEGIN}\n| network")
    assert once.endswith(f"{report.END}\nafter\n")
    assert "old table" not in once
    report.write_readme(small_report, readme)
    assert readme.read_text() == once


@pytest.mark.parametrize("text", ["no markers", f"{report.BEGIN} only", f"{report.END}\n{report.BEGIN}"])
def test_readme_without_a_place_is_refused_and_left_alone(small_report, tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(InputError, match="no place for the table"):
        report.write_readme(small_report, readme)
    assert readme.read_text() == text


def test_bars_are_drawn(small_report, tmp_path):
    pytest.importorskip("matplotlib")
    bars.save_bars(small_report, tmp_path / "bars.png")
    assert Image.open(tmp_path / "bars.png").width > 400


def test_commit_is_that_of_the_tracked_package_only(tmp_path):
    package = tmp_path / "site" / "kaleido_fast"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert machine.source_commit(package) == (None, None)
    assert machine.command_line(["/x/kaleido_fast/__main__.py", "bench", "--net", "a b"]) == (
        "kaleido-fast bench --net 'a b'"
    )


def call(monkeypatch, capsys, *args: str) -> tuple[int, str, str]:
    """Run the program in this process: (exit status, output, errors)."""
    monkeypatch.setattr(sys, "argv", ["kaleido-fast", "bench", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


SMALL = ("--chains", "20", "--steps", "2", "--rounds", "1", "--no-first-calls", "--engine", "reference")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--net", "digts"), "did you mean 'digits'"),
        (("--peers", "onnxruntme"), "did you mean 'onnxruntime'"),
        (("--peers", "eager-fp16"), "cuda only"),
        (("--engine", "refrence"), "did you mean 'reference'"),
        (("--engine", "cpu", "--precision", "fp64"), "cannot run here"),
        (("--chains", "0"), "n_chains is 0"),
        (("--steps", "-1"), "n_steps is -1"),
        (("--json", "nowhere/a.json"), "does not exist"),
        (("--json", "."), "is a folder"),
        (("--readme", "empty.md"), "no place for the table"),
        (("--readme", "gone.md"), "is not a file"),
        (("--picture", "a.gif"), "unknown ending"),
        (("--model", "gone.safetensors"), "does not exist"),
    ],
)
def test_bad_input_is_found_before_anything_is_timed(tmp_path, monkeypatch, capsys, args, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.md").write_text("")
    monkeypatch.setattr(runner, "time_alternating", lambda *args, **options: pytest.fail("timing has started"))
    status, output, errors = call(monkeypatch, capsys, "--net", "points1d", *args)
    assert (status, output) == (2, "")
    assert errors.count("\n") == 1 and text in errors, errors
    assert [path.name for path in tmp_path.iterdir()] == ["empty.md"]


def test_command_writes_what_it_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "mine.safetensors", random_mlp(6, 9, 6), ModelCard("mine"))
    Path("README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    files = ("--json", "bench.json", "--readme", "README.md", "--picture", "bars.png")
    nets = ("--net", "points1d", "--model", "mine.safetensors", "--peers", "eager,published")
    status, output, errors = call(monkeypatch, capsys, *SMALL, *nets, *files)
    assert (status, errors) == (0, "")
    assert "mine" in output and "published" in output
    record = json.loads(Path("bench.json").read_text())
    assert [entry["network"] for entry in record["results"]] == ["points1d", "mine"]
    assert "| `mine` |" in Path("README.md").read_text()
    assert Image.open("bars.png").width > 400


def test_json_to_the_terminal_is_one_object(monkeypatch, capsys):
    status, output, _ = call(monkeypatch, capsys, *SMALL, "--net", "points1d", "--peers", "none", "--json", "-")
    assert status == 0
    assert json.loads(output)["results"][0]["contestants"].keys() == {"reference"}


def test_help_does_not_load_torch():
    code = (
        "import sys; from kaleido_fast.cli import cli\n"
        "try: cli.main(['bench', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, "help imports torch"
    assert "--readme" in result.stdout
    text = re.sub(r"(?<=\w-)\n\s+", "", result.stdout)  # click breaks lines after hyphens too
    for name in (*PEERS, *NETWORKS):
        assert re.search(rf"\s{name}[\s,;\].]", text), f"a newcomer cannot know of {name}"
