"""The operator in programs with settings and threads of their own."""

from __future__ import annotations

import random
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import assert_same, needs, random_mlp
from torch import nn

from kaleido_fast import fast_sample, forget_packed, sample_op
from kaleido_fast.op import SampledChains

MODEL = random_mlp(6, 11, 13, 6)
ENGINES = ["reference", "cpu", "triton"]


@pytest.fixture
def restored():
    """Put back what the tests below change."""
    matmul = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    for backend in matmul:
        backend.fp32_precision = "ieee"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("widths", [(5, 11, 13, 5), (7, 150, 7), (7, 300, 7)], ids=str)
def test_default_dtype_is_not_obeyed(engine, dtype, widths, restored):
    needs(engine)
    model = random_mlp(*widths, bias=(False, *[True] * (len(widths) - 2)))
    options = {"n_chains": 9, "burn_in": 1, "jitter": 0.1, "engine": engine}
    want = sample_op(model, **options)
    forget_packed()
    torch.set_default_dtype(dtype)
    assert_same(sample_op(model, **options), want)
    assert_same(fast_sample(model, **options), want)
    assert torch.get_default_dtype() is dtype


@pytest.mark.parametrize("engine", ENGINES)
def test_default_device_is_not_obeyed(engine):
    needs(engine)
    options = {"n_chains": 9, "burn_in": 1, "jitter": 0.1, "engine": engine}
    want = sample_op(MODEL, **options)
    forget_packed()
    with torch.device("meta"):
        assert_same(sample_op(MODEL, **options), want)
        assert_same(fast_sample(MODEL, device="cpu", **options), want)
        fast_sample("attractors", n_chains=2, burn_in=1, device="cpu", engine=engine if engine != "triton" else "auto")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "mode",
    [
        torch.inference_mode,
        torch.no_grad,
        torch.enable_grad,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.detect_anomaly,
    ],
    ids=["inference", "no_grad", "grad", "autocast", "anomaly"],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_modes_of_autograd_and_autocast_change_no_bit(engine, mode):
    needs(engine)
    options = {"n_chains": 9, "burn_in": 6, "n_draws": 2, "engine": engine, "tol": 1e-3}
    want = sample_op(MODEL, **options)
    for first, second in ((mode, nullcontext), (nullcontext, mode)):  # packed inside and used outside, and so on
        forget_packed()
        with first():
            assert_same(sample_op(MODEL, **options), want)
        with second():
            assert_same(sample_op(MODEL, **options), want)
            assert_same(fast_sample(MODEL, **options), want)


def _flags() -> tuple:
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return cuda.fp32_precision, cpu.fp32_precision, cuda.allow_fp16_reduced_precision_reduction


@pytest.mark.parametrize("new_names", [False, True])
def test_permission_of_tf32_is_neither_obeyed_nor_disturbed(new_names, restored):
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(_flags())
            return torch.tanh(x)

    if new_names:  # after this torch refuses to read the older ones
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    else:
        torch.set_float32_matmul_precision("medium")
    before = _flags()
    sample_op(MODEL, n_chains=3, burn_in=2, engine="reference")
    fast_sample(Spy(), n_chains=3, burn_in=2, dim=4, data_range=(-1.0, 1.0), device="cpu")
    assert set(seen) <= {("ieee", "ieee", False), ("ieee", "none", False)}
    assert _flags() == before


def test_a_permission_for_all_backends_is_left_as_one(restored):
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"
    try:
        inherited = torch.backends.cuda.matmul.fp32_precision
        sample_op(MODEL, n_chains=3, burn_in=2, engine="reference")
        assert torch.backends.cuda.matmul.fp32_precision == inherited
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    finally:
        torch.backends.fp32_precision = "none"


@pytest.mark.parametrize("engine", ENGINES)
def test_random_numbers_of_the_host_program_are_its_own(engine):
    needs(engine)
    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    sample_op(MODEL, n_chains=3, burn_in=2, jitter=0.1, engine=engine)
    fast_sample("attractors", n_chains=2, burn_in=1, seed=None, device="cpu")
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    assert torch.equal(states[0], after[0])
    assert np.array_equal(states[1], after[1])
    assert states[2] == after[2]


def test_threads_may_sample_at_once():
    want = {seed: sample_op(MODEL, n_chains=30, burn_in=20, seed=seed, engine="reference") for seed in range(6)}
    torch.set_float32_matmul_precision("medium")
    forget_packed()
    got: dict[int, SampledChains] = {}

    def work(seed: int) -> None:
        got[seed] = sample_op(MODEL, n_chains=30, burn_in=20, seed=seed, engine="reference")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in want]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    for seed in want:
        assert_same(got[seed], want[seed])
