"""The CPU engine: the same chains as the reference engine, whatever tile, thread, split and neighbours."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_states_close, random_mlp
from cpu_runs import ACTIVATIONS, FP32_RUN, FP32_STEP, MODEL, assert_same_bits, assert_same_run, reference, run
from hypothesis import given, settings
from hypothesis import strategies as st

from kaleido_fast.errors import InputError
from kaleido_fast.model import KaleidoMLP, ModelSpec
from kaleido_fast.planning.request import SampleRequest

pytest.importorskip("numba", reason="the CPU engine needs numba")
from kaleido_fast.engines.cpu import CpuEngine
from kaleido_fast.engines.loops.packing import make_fp32_tile
from kaleido_fast.engines.loops.processor import LANES, VECTOR


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bound", ["tanh", "sigmoid"])
def test_one_step_and_several_agree_with_the_reference(activation, bound):
    model = random_mlp(5, 7, 23, 5, activation=activation, bound=bound)
    assert_same_run(model, SampleRequest(n_chains=77, burn_in=0, seed=3), FP32_STEP)
    assert_same_run(model, SampleRequest(n_chains=77, burn_in=4, n_draws=2, seed=3), FP32_RUN)


@pytest.mark.parametrize(
    "widths", [(1, 1), (1, 10, 1), (2, 50, 50, 2), (3, 127, 3), (67, 13, 67), (7, 1031, 7), (1033, 3, 1033)]
)
def test_odd_widths_agree_with_the_reference(widths):
    """Layers of one block and of many, of equal and of unequal blocks, in narrow and wide tiles."""
    assert_same_run(random_mlp(*widths), SampleRequest(n_chains=131, burn_in=2, seed=1), FP32_RUN)
    assert_same_run(random_mlp(*widths), SampleRequest(n_chains=131, sampler="flow", steps=3, seed=1), FP32_RUN)


@pytest.mark.parametrize("precision", ["fp64", "tf32", "fp16"])
def test_other_precisions_are_refused(precision):
    with pytest.raises(InputError, match=rf"no {precision}: use precision='fp32'"):
        CpuEngine(MODEL, SampleRequest(n_chains=1, precision=precision))


@pytest.mark.parametrize("n_out", range(1, 38))
def test_every_register_block_computes_every_output(n_out):
    """Whole numbers below 2^24: any order of summing is exact, so a slip of one weight shows."""
    model = KaleidoMLP(ModelSpec((3, n_out, 3), low=-0.5, high=0.5))
    generator = torch.Generator().manual_seed(n_out)
    with torch.no_grad():
        for layer in model.linears:
            layer.weight.copy_(torch.randint(-9, 9, layer.weight.shape, generator=generator))
            layer.bias.copy_(torch.randint(-9, 9, layer.bias.shape, generator=generator))
        model.linears[1].weight.mul_(2.0**-14)
        model.linears[1].bias.mul_(2.0**-14)
    state = torch.randint(-9, 9, (45, 3), generator=generator).float()
    engine = CpuEngine(model, SampleRequest(n_chains=45))
    got = engine.advance(torch.arange(45), state, 0, 1, None, lambda _: None).state
    with torch.no_grad():
        want = model.double()(state.double())
    assert_states_close(got, want, atol=2e-7, what=f"{n_out} hidden")
    assert make_fp32_tile(model.spec, 2 * LANES).state.ctypes.data % 64 == 0


@settings(max_examples=40, deadline=None)
@given(
    burn_in=st.integers(0, 5),
    n_draws=st.integers(1, 4),
    thin=st.integers(1, 4),
    settle=st.integers(0, 4),
    jitter=st.sampled_from([0.0, 0.3]),
    noise=st.sampled_from(["normal", "uniform", "upstream"]),
    init=st.sampled_from(["uniform", "normal"]),
    first_chain=st.sampled_from([0, 2**32 - 3, 2**40 + 1]),
    seed=st.integers(0, 2**64 - 1),
)
def test_schedule_and_noise_agree_with_the_reference(**options):
    request = SampleRequest(n_chains=7, **options)
    precision, _, rtol = FP32_RUN
    steps = request.schedule.n_steps
    # every step multiplies a difference by at most the network's slope, about 2 for this one
    assert_same_run(MODEL, request, (precision, 1e-6 * 2 ** min(steps, 10), rtol))


def test_uniform_start_noise_has_the_bits_of_the_reference():
    chains = torch.cat((torch.arange(700), torch.tensor([2**32 - 1, 2**32, 2**62 - 1])))
    for seed in (0, 2**31, 2**63 + 5, 2**64 - 1):
        request = SampleRequest(n_chains=1, seed=seed)
        assert torch.equal(CpuEngine(MODEL, request).start(chains), reference(MODEL, request).start(chains))


def test_start_noise_of_a_flow_is_within_a_few_ulp_and_is_not_clamped():
    request = SampleRequest(n_chains=1, sampler="flow", seed=9)
    chains = torch.arange(20_000)
    got, want = CpuEngine(MODEL, request).start(chains), reference(MODEL, request).start(chains)
    assert_states_close(got, want, atol=3e-7, rtol=5e-7, what="start noise of a flow")
    assert float(got.abs().max()) > 3.0


def test_normal_start_noise_is_within_a_few_ulp():
    request = SampleRequest(n_chains=1, init="normal", seed=9)
    chains = torch.arange(20_000)
    got, want = CpuEngine(MODEL, request).start(chains), reference(MODEL, request).start(chains)
    assert_states_close(got, want, atol=3e-7, rtol=5e-7, what="normal start noise")
    assert float(got.abs().max()) == 1.0, "N(0, 1) is clipped to the data range"


@pytest.mark.parametrize("bound", ["tanh", "sigmoid"])
def test_bound_is_accurate_on_the_whole_line(bound):
    model = KaleidoMLP(ModelSpec((1, 1), bound=bound, bias=(False,)))
    with torch.no_grad():
        model.linears[0].weight.fill_(1.0)
    x = torch.cat((torch.linspace(-30, 30, 40_001), torch.logspace(-30, 30, 4001), -torch.logspace(-30, 30, 4001)))
    x = torch.cat((x, torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])))[:, None]
    got = CpuEngine(model, SampleRequest(n_chains=len(x))).advance(torch.arange(len(x)), x, 0, 1, None, lambda _: None)
    assert_states_close(got.state, getattr(torch, bound)(x.double()), atol=2e-7, what=bound)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hidden_activations_are_accurate(activation):
    model = KaleidoMLP(ModelSpec((1, 1, 1), activation=activation, bias=(False, False)))
    with torch.no_grad():
        for layer in model.linears:
            layer.weight.fill_(1.0)
    x = torch.cat((torch.linspace(-12, 12, 40_001), torch.logspace(-30, 4, 2001), -torch.logspace(-30, 4, 2001)))[
        :, None
    ]
    got = CpuEngine(model, SampleRequest(n_chains=len(x))).advance(torch.arange(len(x)), x, 0, 1, None, lambda _: None)
    with torch.no_grad():
        want = model.double()(x.double())
    assert_states_close(got.state, want, atol=6e-7, what=activation)


@pytest.mark.parametrize("jitter", [0.0, 0.4])
@pytest.mark.parametrize("n", [1, 31, 32, 33, 127, 128, 129, 600])
def test_a_chain_has_the_same_bits_in_any_company(n, jitter):
    request = SampleRequest(n_chains=700, burn_in=5, n_draws=2, jitter=jitter, seed=2)
    engine = CpuEngine(MODEL, request)
    whole = run(engine, torch.arange(700))
    chosen = torch.randperm(700, generator=torch.Generator().manual_seed(n))[:n]
    assert_same_bits(run(engine, chosen), [values[chosen] for values in whole], f"{n} chains, shuffled")


@settings(max_examples=60, deadline=None)
@given(
    widths=st.lists(st.integers(1, 130), min_size=1, max_size=4),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    n=st.integers(1, 70),
)
def test_few_chains_have_the_bits_of_many(widths, activation, bias, n):
    """Up to eight chains are computed with outputs in the lanes of vectors, more with chains in them."""
    model = random_mlp(*widths, widths[0], activation=activation, bias=(bias,) * len(widths))
    request = SampleRequest(n_chains=128, burn_in=1, n_draws=2, jitter=0.1, seed=6)
    engine = CpuEngine(model, request)
    whole, few = run(engine, torch.arange(128)), run(engine, torch.arange(n))
    assert_same_bits(few, [values[:n] for values in whole], f"{n} chains of {model.spec.widths} {activation}")


@settings(max_examples=20, deadline=None)
@given(first=st.integers(1, 7), jitter=st.sampled_from([0.0, 0.3]), noise=st.sampled_from(["normal", "upstream"]))
def test_any_split_in_time_gives_the_same_bits(first, jitter, noise):
    request = SampleRequest(n_chains=50, burn_in=3, n_draws=2, thin=3, jitter=jitter, noise=noise)
    engine, chains = CpuEngine(MODEL, request), torch.arange(50)
    whole = run(engine, chains)
    early, state, _ = run(engine, chains, last=first)
    late, final, residual = run(engine, chains, state, first)
    assert_same_bits((torch.where(early.isnan(), late, early), final, residual), whole, f"split at {first}")


def test_calls_of_few_steps_give_the_same_bits(monkeypatch):
    """Long runs are cut so that they can be interrupted; a cut must not show."""
    from kaleido_fast.engines import cpu

    request = SampleRequest(n_chains=300, burn_in=6, n_draws=2, jitter=0.2)
    whole = run(CpuEngine(MODEL, request), torch.arange(300))
    monkeypatch.setattr(cpu, "steps_per_call", lambda *_: 3)
    counted: list[int] = []
    cut = run(CpuEngine(MODEL, request), torch.arange(300), report=counted.append)
    assert_same_bits(cut, whole, "three steps a call")
    assert sum(counted) == 300 * 8


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_number_of_threads_changes_no_bit_and_report_stays_in_the_calling_thread(threads):
    request = SampleRequest(n_chains=5000, burn_in=20, jitter=0.1)
    engine, runs, reporters = CpuEngine(MODEL, request), [], set()
    for count in (1, 2, 5):
        threads(count)
        counted: list[int] = []

        def report(steps, counted=counted):
            counted.append(steps)
            reporters.add(threading.get_ident())

        runs.append(run(engine, torch.arange(5000), report=report))
        assert sum(counted) == 5000 * 21
    for other in runs[1:]:
        assert_same_bits(other, runs[0], "threads")
    assert reporters == {threading.get_ident()}


@pytest.mark.parametrize("count", [1, 3])
def test_report_can_stop_a_run_on_all_threads(threads, count):
    threads(count)
    n = 200_000  # seconds of work: on a busy machine the thread that reports may wait for its turn
    engine = CpuEngine(MODEL, SampleRequest(n_chains=n, burn_in=2000))
    draws = torch.full((n, 1, 5), torch.nan)

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.advance(torch.arange(n), None, 0, 2001, draws, stop)
    left = draws.clone()
    time.sleep(0.3)
    same = (draws == left) | (draws.isnan() & left.isnan())
    assert same.all(), "a thread went on after the run had been stopped"
    unfinished = int(draws.isnan().any(dim=2).sum())
    assert unfinished > n // 2, f"{n - unfinished} chains were run to their end"


def test_residual_is_nan_where_one_value_is():
    model = KaleidoMLP(ModelSpec((2, 2), bias=(False,)))
    for nan_row in (0, 1):
        with torch.no_grad():
            model.linears[0].weight[nan_row] = torch.tensor([math.inf, -math.inf])
            model.linears[0].weight[1 - nan_row] = torch.tensor([0.5, 0.25])
        end = CpuEngine(model, SampleRequest(n_chains=1)).advance(
            torch.zeros(1, dtype=torch.int64), torch.ones(1, 2), 0, 1, None, lambda _: None
        )
        assert end.state.isnan().tolist() == [[nan_row == 0, nan_row == 1]]
        assert end.residual.isnan().all()


@pytest.mark.parametrize("noise", ["normal", "uniform", "upstream"])
def test_nan_stays_in_its_own_chain(noise):
    request = SampleRequest(n_chains=100, burn_in=3, jitter=0.1, noise=noise, settle=0)
    engine, chains = CpuEngine(MODEL, request), torch.arange(100)
    state = torch.rand(100, 5) - 0.5
    clean = run(engine, chains, state)
    state[37, 2] = torch.nan
    draws, final, residual = run(engine, chains, state)
    others = chains != 37
    assert draws[37].isnan().all() and final[37].isnan().all() and residual[37].isnan()
    assert_same_bits((draws[others], final[others], residual[others]), [v[others] for v in clean], "beside a NaN")


def test_layers_without_bias_and_a_narrow_data_range():
    model = random_mlp(5, 11, 9, 5, bias=(True, False, False), low=-0.5, high=0.75)
    for noise in ("normal", "uniform", "upstream"):
        request = SampleRequest(n_chains=40, burn_in=2, jitter=0.2, noise=noise, init="normal")
        assert_same_run(model, request, FP32_RUN)


def test_given_states_are_not_written_to():
    state = torch.rand(40, 5) - 0.5
    before = state.clone()
    run(CpuEngine(MODEL, SampleRequest(n_chains=40)), torch.arange(40), state)
    assert torch.equal(state, before)


@pytest.mark.parametrize("form", ["strided", "float64", "none"])
def test_draws_may_lie_anywhere(form):
    request = SampleRequest(n_chains=40, burn_in=1, n_draws=3)
    engine, chains = CpuEngine(MODEL, request), torch.arange(40)
    want, final, _ = run(engine, chains)
    if form == "none":
        assert torch.equal(engine.advance(chains, None, 0, 4, None, lambda _: None).state, final)
        return
    draws = torch.zeros(3, 40, 5).transpose(0, 1) if form == "strided" else torch.zeros(40, 3, 5, dtype=torch.float64)
    engine.advance(chains, None, 0, 4, draws, lambda _: None)
    assert torch.equal(draws.float(), want)


def test_philox_words_of_the_loops_are_those_of_the_torch_code():
    """Through the uniforms: u = (word >> 8) 2^-24, so 24 of the 32 bits of each word, of four neighbouring dims."""
    from kaleido_fast.noise import uniforms

    model = KaleidoMLP(ModelSpec((9, 9), bound="sigmoid"))
    got = CpuEngine(model, SampleRequest(n_chains=1, seed=77)).start(torch.arange(1000))
    assert np.array_equal(got.numpy(), uniforms(77, torch.arange(1000), 9, 0).numpy())


NARROW_VECTORS = """
import sys
import torch
from kaleido_fast.engines.loops import processor
processor.VECTOR, processor.VECTORS, processor.MAX_OUTPUTS, processor.LANES, processor.ROW_BYTES = 4, 2, 6, 8, 32
import test_cpu as tests
torch.save(tests.run_of_every_part(), sys.argv[1])
"""


def run_of_every_part():
    request = SampleRequest(n_chains=45, burn_in=4, n_draws=2, jitter=0.3, init="normal", seed=8)
    flow = SampleRequest(n_chains=45, n_draws=2, sampler="flow", steps=5, seed=8)
    models = [random_mlp(5, 11, 13, 5, activation=name, bound="sigmoid") for name in ACTIVATIONS]
    pairs = [(MODEL, flow), *((model, request) for model in [MODEL, *models])]
    return [run(CpuEngine(model, asked), torch.arange(45)) for model, asked in pairs]


@pytest.mark.slow
def test_the_width_of_vectors_changes_no_bit(tmp_path):
    """A processor with narrower vectors, and so other register blocks and tiles, computes the same chains."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", NARROW_VECTORS, str(tmp_path / "narrow.pt")]
    result = subprocess.run(command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert VECTOR > 4
    for i, (got, want) in enumerate(zip(torch.load(tmp_path / "narrow.pt"), run_of_every_part(), strict=True)):
        assert_same_bits(got, want, f"model {i}")
