"""Peers do the work of the reference, each in its own way."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch

from kaleido_fast.benchmarking import contest, peers
from kaleido_fast.benchmarking.acceptance import WrongStatesError
from kaleido_fast.benchmarking.peers import PEERS, Setting, build_peer, choose_peers, loops
from kaleido_fast.errors import InputError

from conftest import random_mlp  # isort: skip
from small_bench import CPU

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


def test_a_captured_step_keeps_the_weights_that_its_graph_reads(monkeypatch):
    """A graph holds addresses alone: weights that nothing else holds would be freed, and others written there."""
    for name in ("CUDAGraph", "Stream", "current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, mock.Mock())
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
    calls = []

    def captured() -> tuple[loops.Captured, list[weakref.ref[torch.Tensor]]]:
        model = random_mlp(6, 11, 6).requires_grad_(False)
        replay = loops.capture(lambda: calls.append(model(torch.zeros(1, 6))), CPU)
        return replay, [weakref.ref(weight) for weight in model.parameters()]

    replay, weights = captured()
    n_captured = len(calls)
    gc.collect()
    assert all(weight() is not None for weight in weights), "freed while the graph may be replayed"
    replay()
    assert len(calls) == n_captured == loops.WARM_UPS + 1, "a replay is no call"


def test_adapters_are_short_enough_to_be_judged_at_a_glance():
    adapters = {Path(peers.__file__).with_name(f"{peer.module}.py") for peer in PEERS.values()}
    assert max(len(path.read_text().splitlines()) for path in adapters) < 40


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


def test_peers_are_chosen_by_name_and_left_out_with_a_reason(monkeypatch):
    chosen, skipped = choose_peers((), CPU, quick=True)
    assert {"eager", "chunked"} <= {peer.name for peer in chosen}
    assert "--peers" in skipped["compile"] and "--peers" in skipped["published"] and "cuda" in skipped["eager-fp16"]
    assert "--precision bf16" in skipped["eager-bf16"]
    both = choose_peers((), CPU, quick=True, precisions=("fp32", "bf16"))[0]
    assert {"eager", "eager-bf16", "chunked"} <= {peer.name for peer in both}
    with pytest.raises(InputError, match="peer 'eager' computes in fp32, no engine does: give --precision fp32"):
        choose_peers(("eager",), CPU, quick=False, precisions=("bf16",))
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
