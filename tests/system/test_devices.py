"""One device or several: names, what is refused, and the same bits whoever computes a chain."""

from __future__ import annotations

import threading
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from conftest import random_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kaleido_fast import InputError, SamplingInterruptedError, Trace, fast_sample
from kaleido_fast.engines.reference import ReferenceEngine
from kaleido_fast.sampling import prepare_run
from kaleido_fast.system.devices import (
    device_facts,
    devices_for,
    home_of,
    refuse_capture,
    resolve_device,
    resolve_devices,
)

MODEL = random_mlp(6, 11, 13, 6)
ARRAYS = ("draws", "residual", "steps", "period", "outcome")
GENERAL = {"dim": 4, "data_range": (-1.0, 1.0)}


def assert_same(got, want) -> None:
    for name in ARRAYS:
        assert torch.equal(getattr(got, name), getattr(want, name)), name


@pytest.fixture
def gpus(monkeypatch):
    """A machine that says it has three GPUs, the third of another kind."""
    names = ["H200", "H200", "A100"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])


# Several devices. CPUs stand in for GPUs: all but the copies between them is the same code.


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 120),
    n_devices=st.integers(2, 4),
    block=st.one_of(st.none(), st.integers(1, 40)),
    options=st.sampled_from(
        [
            {"burn_in": 5},
            {"burn_in": 60, "tol": 1e-3, "n_draws": 3, "thin": 5},
            {"burn_in": 6, "jitter": 0.2, "n_draws": 2},
            {"burn_in": 6, "precision": "fp16", "polish": 3, "engine": "reference"},
            {"burn_in": 3, "engine": "cpu", "first_chain": 2**40},
        ]
    ),
)
def test_several_devices_give_the_bits_of_one(n, n_devices, block, options):
    want = fast_sample(MODEL, n_chains=n, device="cpu", **options)
    got = fast_sample(MODEL, n_chains=n, device=["cpu"] * n_devices, block_chains=block, **options)
    assert_same(got, want)
    assert got.stats.chain_steps == want.stats.chain_steps
    assert got.stats.device == ", ".join(["cpu"] * n_devices)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.interpreter
def test_several_devices_run_the_kernels_of_one(ordered_products):
    options = {"n_chains": 33, "burn_in": 2, "engine": "triton"}
    got, want = fast_sample(MODEL, device=["cpu", "cpu"], **options), fast_sample(MODEL, device="cpu", **options)
    assert_same(got, want)
    assert got.plan.kernel == want.plan.kernel


def test_start_states_and_traces_go_to_every_device():
    z0 = 2 * torch.rand(40, 6) - 1
    options = {"n_chains": 40, "z0": z0, "burn_in": 4, "trace": Trace((0, 39), (0, 2, 5))}
    want, got = fast_sample(MODEL, device="cpu", **options), fast_sample(MODEL, device=["cpu", "cpu"], **options)
    assert_same(got, want)
    assert got.trace is not None and torch.equal(got.trace, want.trace)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_several_devices_under_the_callers_modes(mode):
    want = fast_sample(MODEL, n_chains=30, burn_in=4)
    with mode():
        assert_same(fast_sample(MODEL, n_chains=30, burn_in=4, device=["cpu", "cpu"]), want)


def test_progress_of_several_devices_comes_from_the_callers_thread():
    seen = []

    def callback(progress) -> None:
        assert threading.current_thread() is threading.main_thread()
        seen.append(progress)

    fast_sample(MODEL, n_chains=200, burn_in=99, tol=1e-3, device=["cpu", "cpu"], block_chains=30, callback=callback)
    assert (seen[-1].chains_done, seen[-1].chain_steps_done) == (200, 200 * 100)
    done = [progress.chain_steps_done for progress in seen]
    assert done == sorted(done)


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
def test_a_failing_device_stops_the_others_and_is_reported(kind, monkeypatch):
    whole = ReferenceEngine.advance
    calls = []

    def advance(self, *arguments):
        calls.append(threading.current_thread().name)
        if len(calls) == 3:
            raise kind("from a thread")
        return whole(self, *arguments)

    monkeypatch.setattr(ReferenceEngine, "advance", advance)
    options = {"n_chains": 100, "burn_in": 3, "tol": None, "engine": "reference", "block_chains": 2}
    with pytest.raises(SamplingInterruptedError if kind is KeyboardInterrupt else kind):
        fast_sample(MODEL, device=["cpu", "cpu"], **options)
    assert len(calls) < 45
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kaleido cpu")]


def test_a_callback_that_raises_stops_every_device():
    def callback(_progress) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        fast_sample(MODEL, n_chains=100, burn_in=9, device=["cpu", "cpu"], callback=callback)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kaleido cpu")]


# Names.


def test_cuda_is_the_current_device(gpus):
    assert resolve_device("cuda") == resolve_device(None) == resolve_device("auto") == torch.device("cuda", 1)
    assert resolve_devices(["cuda:0", torch.device("cuda", 1)]) == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert resolve_devices("cpu") == [torch.device("cpu")]


@pytest.mark.parametrize(
    ("devices", "text"),
    [
        ("cuda:3", "this machine has 3 CUDA devices"),
        (["cuda:0", "cuda:7"], "this machine has 3 CUDA devices"),
        (["cuda:0", "cpu"], "different kinds"),
        (["cuda:0", "cuda:2"], r"different kinds \(A100, H200\)"),
        (["cuda:0", "cuda:0"], "named twice"),
        (["cuda", "cuda:1"], "named twice"),
        ([], "give a name"),
        (["gpu"], "unknown device"),
        ("tpu:0", "unknown device"),
        ("meta", "unknown device"),
        ({"cpu"}, "give a name"),
        ([None, "cpu"], "different kinds"),
        ([["cpu"]], "unknown device"),
        (3.5, "give a name"),
    ],
)
def test_bad_devices_are_named(gpus, devices, text):
    with pytest.raises(InputError, match=text) as caught:
        resolve_devices(devices)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("hip", "uses_tma"), [(None, True), ("6.4", False)])
def test_a_gpu_of_amd_has_no_copy_engine_whatever_its_number(gpus, monkeypatch, hip, uses_tma):
    properties = SimpleNamespace(
        name="MI300X", major=9, minor=4, multi_processor_count=304, shared_memory_per_block_optin=65_536
    )
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**37, 2**37))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    assert device_facts(torch.device("cuda", 0)).gpu.uses_tma == uses_tma


# Where the model is.


class Elsewhere(nn.Module):
    """A module that says its weights lie on given devices."""

    def __init__(self, *devices: str) -> None:
        super().__init__()
        self.devices = devices

    def parameters(self, recurse: bool = True):
        class Weight:
            def __init__(self, device: str) -> None:
                self.device = torch.device(device)

        return iter([Weight(device) for device in self.devices])


@pytest.mark.parametrize(
    ("home", "asked", "packable", "want"),
    [
        ("cuda:0", None, True, ["cuda:0"]),
        ("cuda:0", "cuda:0", True, ["cuda:0"]),
        ("cuda:0", ["cuda:1", "cuda:0"], True, ["cuda:1", "cuda:0"]),
        ("cuda:0", "cuda:1", True, "the model is on cuda:0, device cuda:1 was asked for"),
        ("cuda:0", "cuda", True, "device cuda:1 was asked for"),
        ("cuda:0", "cpu", True, "the model is on cuda:0, device cpu"),
        ("cpu", None, True, ["cuda:1"]),
        ("cpu", "cuda:0", True, ["cuda:0"]),
        ("cpu", ["cuda:0", "cuda:1"], True, ["cuda:0", "cuda:1"]),
        ("cpu", None, False, ["cpu"]),
        ("cpu", "cuda:0", False, "the model is on cpu, device cuda:0 was asked for"),
        ("cuda:0", None, False, ["cuda:0"]),
        ("cpu", ["cpu", "cpu"], False, "a list of devices takes a KaleidoMLP"),
    ],
)
def test_a_model_is_sampled_where_it_is_or_where_it_can_be_copied(gpus, home, asked, packable, want):
    if isinstance(want, list):
        assert list(map(str, devices_for(Elsewhere(home), asked, packable=packable))) == want
        return
    with pytest.raises(InputError, match=want):
        devices_for(Elsewhere(home), asked, packable=packable)


def test_models_on_no_device_or_on_several_are_refused():
    with pytest.raises(InputError, match="on device meta"):
        fast_sample(random_mlp(3, 5, 3).to("meta"), n_chains=2)
    with pytest.raises(InputError, match="lie on cpu, cuda:0"):
        home_of(Elsewhere("cuda:0", "cpu"))
    assert home_of(nn.Tanh()) is None


def test_what_takes_one_device_refuses_a_list():
    with pytest.raises(InputError, match="takes a KaleidoMLP"):
        fast_sample(nn.Tanh(), n_chains=2, burn_in=1, device=["cpu", "cpu"], **GENERAL)
    with pytest.raises(InputError, match="torchrun"):
        prepare_run(MODEL, n_chains=10, device=["cpu", "cpu"], stored=True)


def test_the_capture_of_a_cuda_graph_is_refused(monkeypatch):
    refuse_capture(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    refuse_capture(torch.device("cpu"))
    with pytest.raises(InputError, match="inside the capture of a CUDA graph"):
        refuse_capture(torch.device("cuda"))
    with pytest.raises(InputError, match="inside the capture of a CUDA graph"):
        fast_sample(MODEL, n_chains=2)  # before it reads weights, which would spoil the capture


# On GPUs.


@pytest.mark.gpu
def test_every_gpu_gives_the_same_bits():
    n_gpus = torch.cuda.device_count()
    if n_gpus < 2:
        pytest.skip("needs two GPUs")
    devices = [f"cuda:{k}" for k in range(n_gpus)]
    for options in ({"tol": None}, {"tol": 1e-3}, {"jitter": 0.3}):
        one = fast_sample(MODEL, n_chains=10_000, device="cuda:0", **options)
        assert_same(fast_sample(MODEL, n_chains=10_000, device=devices, **options), one)
        last = fast_sample(MODEL, n_chains=10_000, device=devices[-1], **options)
        assert torch.equal(last.draws.cpu(), one.draws.cpu())
