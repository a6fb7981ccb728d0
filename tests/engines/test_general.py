"""The engine of modules: the same bits in any split and tile, answers checked before they are trusted."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_states_close
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_modules import DIM, RANGE, Mapped, convolutional, normed, place_dependent, sample, with_statistics
from torch import nn

from kaleido_fast import InputError, SamplingMemoryError, fast_sample, sample_to
from kaleido_fast.engines.general import ModuleEngine
from kaleido_fast.noise import start_noise
from kaleido_fast.planning.blocks import full_module_tile
from kaleido_fast.planning.request import SampleRequest, Trace


def test_a_module_may_write_into_its_input_and_return_one_memory():
    memory = torch.zeros(5, DIM)
    want = sample(Mapped(lambda x: 0.5 * x)).draws
    assert torch.equal(sample(Mapped(lambda x: x.mul_(0.5))).draws, want)
    assert torch.equal(sample(Mapped(lambda x: memory.copy_(0.5 * x))).draws, want)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-7), (torch.bfloat16, 0.0), (torch.float16, 0.0)])
def test_a_module_computes_in_the_type_of_its_weights(dtype, atol):
    module = normed(lambda layer: layer).to(dtype)
    start = start_noise(0, torch.arange(5), DIM, "uniform", *RANGE)
    with torch.no_grad():
        want = module(start.to(dtype)).double()
    assert_states_close(sample(module, burn_in=0).final, want, atol=atol, what=str(dtype))
    exact = sample(module, burn_in=0, precision="fp64")
    with torch.no_grad():
        want = module.double()(start.double())
    assert_states_close(exact.final, want, atol=1e-15, what=f"fp64 of {dtype}")


@pytest.mark.parametrize(
    ("module", "options", "text"),
    [
        (Mapped(lambda x: (x, x)), {}, "Mapped returned a tuple of 2"),
        (Mapped(lambda x: x[:, :1]), {}, r"float32 of shape \(5, 1\) on cpu for float32 of shape \(5, 6\)"),
        (Mapped(lambda x: x.view(-1, 1, 2, 3)), {}, r"append torch.nn.Flatten\(\)"),
        (Mapped(lambda x: x.int()), {}, "returned int32"),
        (Mapped(lambda x: x.to("meta")), {}, "on meta"),
        (Mapped(lambda x: x * torch.nan), {}, "NaN or infinite values alone"),
        (Mapped(lambda x: x * 3), {}, r"outside of data_range \(-1, 1\).*Hardtanh"),
        (Mapped(lambda x: 1.2 * x), {"z0": torch.full((5, DIM), 0.7)}, "outside of data_range"),
        (nn.Sequential(nn.Linear(7, 7), nn.PReLU(), nn.Tanh()), {}, "Sequential raised RuntimeError .*dim="),
        (Mapped(lambda x: F.dropout(x, 0.5) / 2), {}, "draws random numbers"),
        (Mapped(lambda x: torch.tanh(x - x.mean(0))), {}, "beside other chains"),
        (nn.Sequential(nn.BatchNorm1d(DIM, track_running_stats=False)), {}, "BatchNorm1d 0 of a Sequential keeps no"),
        (nn.Sequential(nn.LazyLinear(DIM), nn.PReLU(), nn.Tanh()), {}, "no values yet for 0.weight"),
        (nn.Tanh(), {"precision": "bf16"}, "computes in the type of its weights"),
        (nn.Tanh(), {"tile_chains": 0}, "tile_chains is 0"),
        (nn.Tanh(), {"dim": 0}, "dim is 0"),
        (nn.Tanh(), {"dim": 2.5}, "dim is 2.5"),
        (nn.Tanh(), {"data_range": (1, -1)}, r"data_range is \(1.0, -1.0\)"),
        (nn.Tanh(), {"data_range": (0, float("inf"))}, "two finite numbers"),
        (nn.Tanh(), {"data_range": (1.0, 1.0 + 1e-12)}, "two finite numbers"),
        (nn.Tanh(), {"data_range": 3}, "data_range is 3"),
        (nn.Tanh(), {"data_range": (0, 1, 2)}, "two finite numbers"),
    ],
)
def test_what_cannot_be_sampled_is_refused_in_one_line(module, options, text):
    random = torch.get_rng_state()
    with pytest.raises(InputError, match=text) as caught:
        sample(module, **options)
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), random)


def test_random_numbers_without_effect_leave_torch_alone():
    module = Mapped(lambda x: 0.5 * x + 0 * torch.randn(1))
    random = torch.get_rng_state()
    assert torch.equal(sample(module).draws, sample(Mapped(lambda x: 0.5 * x)).draws)
    assert torch.equal(torch.get_rng_state(), random)


def test_random_numbers_of_another_thread_are_not_taken_back():
    """Those of a training beside it: torch's generator is one for all threads."""
    module, numbers, over = convolutional(), [], threading.Event()

    def draw() -> None:
        while not over.is_set():
            numbers.append(tuple(torch.randn(4).tolist()))

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for seed in range(10):
            sample(module, 33, burn_in=5, seed=seed)
    finally:
        over.set()
        thread.join()
    assert len(numbers) == len(set(numbers)), f"{len(numbers) - len(set(numbers))} of {len(numbers)} came again"


def test_rounding_at_the_bound_is_put_inside():
    result = sample(Mapped(lambda x: torch.sign(x) * (1 + 2**-23)))
    assert set(result.draws.unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("module", [with_statistics(), convolutional(), place_dependent(2.0**-24)])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_split_gives_the_same_bits(module, data):
    """Chains and steps in any parts and order; with one tile size the bits are those of any other run too."""
    n, tile = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([1, 4, 7]))
    request = SampleRequest(n_chains=n, burn_in=4, n_draws=2, jitter=0.3, seed=5)
    cpu = torch.device("cpu")
    engine = ModuleEngine(module, request, dim=DIM, data_range=(-2.0, 2.0), tile_rows=tile, device=cpu)
    chains, draws = torch.arange(n) + 3, torch.full((n, 2, DIM), torch.nan)
    whole = engine.advance(chains, None, 0, 6, draws, lambda _: None)
    order = torch.tensor(data.draw(st.permutations(range(n))))[: data.draw(st.integers(1, n))]
    cut = data.draw(st.integers(1, 5))
    pieces = torch.full((len(order), 2, DIM), torch.nan)
    part = engine.advance(chains[order], None, 0, cut, pieces, lambda _: None)
    last = engine.advance(chains[order], part.state, cut, 6, pieces, lambda _: None)
    assert torch.equal(last.state, whole.state[order])
    assert torch.equal(last.residual, whole.residual[order])
    assert torch.equal(pieces, draws[order])


@pytest.mark.parametrize("module", [with_statistics(), place_dependent(2.0**-24)])
def test_one_tile_size_gives_the_same_bits_in_any_run(module):
    """Frozen neighbours, other chains, other blocks, traces: none of them shows."""
    options = {"burn_in": 60, "tol": 1e-3, "tile_chains": 7, "data_range": (-2.0, 2.0)}
    many = sample(module, 100, **options)
    few = sample(module, 9, first_chain=41, **options)
    assert torch.equal(few.draws, many.draws[41:50])
    assert torch.equal(few.steps, many.steps[41:50])
    assert torch.equal(sample(module, 100, block_chains=5, **options).draws, many.draws)
    traced = sample(module, 100, trace=Trace((41, 99), (61,)), **options | {"tol": None})
    assert torch.equal(traced.trace[:, 0], traced.final[[41, 99]])


def test_the_choice_of_rows_is_a_part_of_the_request():
    assert sample(nn.Tanh(), 1).request.tile_chains == 1
    many = sample(nn.Tanh(), 5000)
    assert many.request.tile_chains == full_module_tile(DIM, "cpu") == many.plan.tile_rows
    assert fast_sample("digits", n_chains=2, burn_in=0).request.tile_chains is None
    with pytest.raises(InputError, match="tile_chains is for modules"):
        fast_sample("digits", n_chains=2, tile_chains=4)


def test_few_chains_do_not_pay_for_rows_that_nobody_asked_for():
    rows = []
    sample(Mapped(lambda x: rows.append(len(x)) or 0.5 * x), 3, burn_in=9)
    assert set(rows) == {3}
    assert len(rows) == 10 + 2, "two looks besides the steps"


def test_too_little_memory_names_the_rows_at_once():
    class Greedy(nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(SamplingMemoryError, match="pass tile_chains=4, or block_chains="):
        sample(Greedy(), 8)


def test_stored_draws_are_those_of_memory_and_say_how_many_rows(tmp_path):
    options: dict[str, Any] = {"burn_in": 3, "dim": DIM, "data_range": RANGE, "device": "cpu", "tol": None}
    module = place_dependent(2.0**-24)
    whole = sample(module, 50, tile_chains=7, data_range=RANGE)
    path = tmp_path / "draws.npy"
    stored = sample_to(path, module, n_chains=50, tile_chains=7, chunk_chains=14, **options)
    assert torch.equal(torch.from_numpy(np.load(path)), whole.draws)
    assert stored is not None
    assert stored.stored["request"]["tile_chains"] == 7
    with pytest.raises(InputError, match="tile_chains"):
        sample_to(path, module, n_chains=50, tile_chains=14, **options)
