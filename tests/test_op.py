"""Sampling as an operator of torch: called, compiled and exported."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same, needs, random_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kaleido_fast import InputError, KaleidoMLP, ModelSpec, fast_sample, op, sample_op
from kaleido_fast.op import SampledChains, _sample_chains, sample
from kaleido_fast.planning.request import SampleRequest
from kaleido_fast.running.packed import layers_of

MODEL = random_mlp(6, 11, 13, 6)
FIELDS = SampledChains._fields
ENGINES = ["reference", "cpu", "triton"]


SETTINGS = {
    "sampler": "kaleidoscope",
    "burn_in": 3,
    "n_draws": 1,
    "thin": 1,
    "init": "uniform",
    "noise": "normal",
    "jitter": 0.0,
    "settle": 2,
    "steps": 20,
    "noise_from": 0.9,
    "noise_to": 0.1,
    "tol": None,
    "patience": 1,
    "check_every": 4,
    "max_period": 64,
    "retire_cycles": False,
    "precision": "fp32",
    "polish": 0,
    "engine": "auto",
    "kernel": "auto",
    "block_chains": None,
}


def op_arguments(model: KaleidoMLP, n: int, z0: torch.Tensor | None = None, **options) -> tuple:
    """Arguments of the bare operator."""
    return (*layers_of(model), z0, model.spec.to_json(), json.dumps(SETTINGS | options), n, 0, 0)


class Asked(Exception):
    """Ends a call where its request is known."""


def request_of(monkeypatch, **options) -> tuple[SampleRequest, int | None]:
    """The request that `sample_op` makes, and the chains at work at once."""

    def stop(request, spec, weights, biases, z0, block_chains):
        assert spec == MODEL.spec
        asked.append((request, block_chains))
        raise Asked

    asked: list[tuple[SampleRequest, int | None]] = []
    with monkeypatch.context() as patch, pytest.raises(Asked):
        patch.setattr(op, "_sample_chains", stop)
        sample_op(MODEL, **options)
    return asked[0]


CHANGED = {
    "first_chain": 2**40 + 1,
    "burn_in": 11,
    "n_draws": 2,
    "thin": 12,
    "seed": 2**64 - 3,
    "init": "normal",
    "noise": "uniform",
    "jitter": 0.1 + 0.2,
    "settle": 1,
    "patience": 3,
    "check_every": 5,
    "max_period": 7,
    "retire_cycles": True,
    "precision": "bf16",
    "polish": 4,
    "engine": "triton",
    "kernel": "narrow",
}
OF_FLOW = {"sampler": "flow", "steps": 7, "noise_from": 0.8, "noise_to": 0.1 + 0.2}


def test_every_option_arrives_at_the_request(monkeypatch):
    assert {*CHANGED, *OF_FLOW, "n_chains", "tol", "block_chains"} == {*op.NUMBERS, *op.TEXT_OPTIONS}
    plain = SampleRequest(n_chains=3, tol=None)
    assert request_of(monkeypatch, n_chains=3) == (plain, None)
    for name, value in (CHANGED | OF_FLOW).items():
        assert value != getattr(plain, name), name
    common = {name: CHANGED[name] for name in ("first_chain", "n_draws", "seed", "precision", "engine", "kernel")}
    flow = {**OF_FLOW, **common}
    assert request_of(monkeypatch, n_chains=3, **flow) == (SampleRequest(n_chains=3, tol=None, **flow), None)
    assert request_of(monkeypatch, n_chains=3, **CHANGED) == (SampleRequest(n_chains=3, tol=None, **CHANGED), None)
    assert request_of(monkeypatch, n_chains=3, tol=1e-300, block_chains=9) == (SampleRequest(3, tol=1e-300), 9)


@given(
    jitter=st.floats(0, allow_infinity=False),
    tol=st.floats(0, exclude_min=True, allow_infinity=False),
    whole=st.integers(0, 2**31 - 400),
    kind=st.sampled_from([int, np.int64, np.uint32, torch.tensor]),
)
def test_numbers_arrive_exactly(jitter, tol, whole, kind):
    with pytest.MonkeyPatch.context() as patch:
        assert request_of(patch, n_chains=3, jitter=jitter)[0].jitter.hex() == jitter.hex()
        assert request_of(patch, n_chains=3, tol=np.float64(tol))[0].tol.hex() == tol.hex()
        request = request_of(patch, n_chains=3, burn_in=kind(whole), jitter=np.float32(0.1))[0]
        assert (request.burn_in, request.jitter) == (whole, float(np.float32(0.1)))


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 50),
    first=st.integers(0, 2**40),
    seed=st.integers(0, 2**64 - 1),
    burn_in=st.integers(0, 12),
    n_draws=st.integers(1, 3),
    thin=st.integers(1, 4),
    jitter=st.sampled_from([0.0, 0.3]),
    tol=st.sampled_from([None, 1e-2]),
    engine=st.sampled_from(["reference", "cpu"]),
)
def test_the_operator_gives_the_bits_of_fast_sample(n, first, seed, burn_in, n_draws, thin, jitter, tol, engine):
    options = {"n_chains": n, "first_chain": first, "seed": seed, "burn_in": burn_in, "n_draws": n_draws, "thin": thin}
    options |= {"jitter": jitter, "tol": None if jitter else tol, "engine": engine, "settle": thin - 1}
    assert_same(sample_op(MODEL, **options), fast_sample(MODEL, **options))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_engine_and_precision_gives_the_bits_of_fast_sample(engine, precision):
    needs(engine)
    if engine == "cpu" and precision == "bf16":
        pytest.skip("not on every processor")
    options = {
        "n_chains": 21,
        "burn_in": 3,
        "engine": engine,
        "precision": precision,
        "polish": 2 * (precision != "fp32"),
    }
    assert_same(sample_op(MODEL, **options), fast_sample(MODEL, tol=None, **options))


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 50),
    seed=st.integers(0, 2**64 - 1),
    n_draws=st.integers(1, 3),
    steps=st.integers(1, 6),
    noise_to=st.floats(1e-6, 0.89),
    engine=st.sampled_from(["reference", "cpu"]),
)
def test_the_operator_gives_the_bits_of_fast_sample_for_a_flow(n, seed, n_draws, steps, noise_to, engine):
    needs(engine)
    options = {"n_chains": n, "seed": seed, "n_draws": n_draws, "steps": steps, "noise_to": noise_to, "engine": engine}
    assert_same(sample_op(MODEL, sampler="flow", **options), fast_sample(MODEL, sampler="flow", **options))


def test_the_sampler_is_a_constant_of_a_compiled_program():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def program(seed: int, steps: int, noise_to: float) -> torch.Tensor:
        return sample_op(MODEL, n_chains=5, sampler="flow", steps=steps, noise_to=noise_to, seed=seed).final

    for seed, steps, noise_to in ((1, 4, 0.1), (2, 4, 0.1), (2, 5, 0.1), (2, 5, 0.3)):
        options = {"sampler": "flow", "steps": steps, "noise_to": noise_to, "seed": seed}
        assert torch.equal(program(seed, steps, noise_to), fast_sample(MODEL, n_chains=5, **options).final), options


def test_options_of_an_earlier_version_are_those_of_a_kaleidoscope():
    """A program that was exported before there were samplers."""
    earlier = {name: value for name, value in SETTINGS.items() if name not in OF_FLOW}
    arguments = (*layers_of(MODEL), None, MODEL.spec.to_json(), json.dumps(earlier), 5, 0, 0)
    for got, want in zip(sample(*arguments), sample(*op_arguments(MODEL, 5)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampler": "flow", "burn_in": 0},
        {"tol": 1e-3, "burn_in": 20},
        {"jitter": 0.2, "n_draws": 2, "thin": 3},
        {"precision": "fp64"},
    ],
    ids=str,
)
@pytest.mark.parametrize("trained", [False, True])
def test_opcheck_passes(options, trained):
    model = random_mlp(6, 11, 6, bias=(True, False)).requires_grad_(trained)
    torch.library.opcheck(sample, op_arguments(model, 5, **options))
    torch.library.opcheck(sample, op_arguments(model, 5, torch.rand(5, 6), **options))


def test_a_compiled_program_has_one_graph_and_the_same_bits():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def program(x: torch.Tensor, seed: int) -> torch.Tensor:
        return 2 * sample_op(MODEL, z0=x / 2, burn_in=4, jitter=0.1, seed=seed).final

    x = torch.rand(9, 6)
    for seed in (3, 5, 2**40, 9):
        want = 2 * fast_sample(MODEL, n_chains=9, z0=x / 2, burn_in=4, jitter=0.1, seed=seed).final
        assert torch.equal(program(x, seed), want)
    assert counter.frame_count <= 2, "the seed is a number of the graph, not a reason to compile again"


def test_other_options_are_constants_of_a_compiled_program():
    """A new value compiles it again; it never goes on with the old one."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def program(n: int, first: int, burn_in: int, jitter: float, tol: float | None) -> torch.Tensor:
        options: dict[str, Any] = {"burn_in": burn_in, "jitter": jitter, "tol": tol}
        return sample_op(MODEL, n_chains=n, first_chain=first, n_draws=1, **options).final

    for n, first, burn_in, jitter, tol in ((5, 0, 3, 0.1, None), (6, 2, 4, 0.25, None), (7, 3, 4, 0.5, None)):
        want = fast_sample(MODEL, n_chains=n, first_chain=first, burn_in=burn_in, jitter=jitter, tol=tol).final
        assert torch.equal(program(n, first, burn_in, jitter, tol), want)
    for tol in (0.1, 0.01):
        want = fast_sample(MODEL, n_chains=5, burn_in=9, tol=tol).final
        assert torch.equal(program(5, 0, 9, 0.0, tol), want)


def test_a_compiled_program_tells_specifications_apart():
    """Also where weights have the same shapes."""
    program = torch.compile(
        lambda model: sample_op(model, n_chains=5, burn_in=3).draws, fullgraph=True, backend="eager"
    )
    layers = random_mlp(4, 9, 4).linears
    for options in ({}, {"activation": "tanh"}, {"low": -0.5}, {"bound": "sigmoid"}, {"activation": "leaky_relu"}):
        model = KaleidoMLP(ModelSpec((4, 9, 4), **options), layers)
        assert torch.equal(program(model), fast_sample(model, n_chains=5, burn_in=3, tol=None).draws), options


def test_a_compiled_program_looks_at_every_model_and_takes_plain_ones_alone():
    """Also one that is no global of the program, and one that comes when the program is compiled already."""
    plain, hooked = random_mlp(4, 9, 4), random_mlp(4, 9, 4)
    hooked.layers[0].register_forward_hook(lambda module, given, found: 2 * found)
    want = fast_sample(plain, n_chains=5, burn_in=3, tol=None).draws
    closed = torch.compile(lambda: sample_op(plain, n_chains=5, burn_in=3).draws, backend="eager", fullgraph=True)
    assert torch.equal(closed(), want)
    program = torch.compile(
        lambda model: sample_op(model, n_chains=5, burn_in=3).draws, backend="eager", fullgraph=True
    )
    assert torch.equal(program(plain), want)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="InputError"):
        program(hooked)


@pytest.mark.slow
def test_a_program_compiled_to_machine_code_has_the_same_bits():
    program = torch.compile(lambda x: sample_op(MODEL, z0=x / 2, burn_in=4).final + 1, fullgraph=True)
    x = torch.rand(9, 6)
    assert torch.equal(program(x), fast_sample(MODEL, n_chains=9, z0=x / 2, burn_in=4, tol=None).final + 1)


def test_a_compiled_program_sees_new_weights():
    model = random_mlp(4, 9, 4)
    program = torch.compile(lambda: sample_op(model, n_chains=5, burn_in=3).draws, fullgraph=True, backend="aot_eager")
    before = program()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        model(torch.rand(8, 4)).square().sum().backward()
        optimiser.step()
        after = program()
        assert not torch.equal(after, before)
        assert torch.equal(after, fast_sample(model, n_chains=5, burn_in=3, tol=None).draws)
        before = after


def test_fast_sample_breaks_a_graph_and_says_what_to_call():
    def program(x: torch.Tensor) -> torch.Tensor:
        return x + fast_sample(MODEL, n_chains=3, burn_in=2).final.sum()

    x = torch.ones(2)
    assert torch.equal(torch.compile(program, backend="eager")(x), program(x))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="sample_op"):
        torch.compile(program, backend="eager", fullgraph=True)(x)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_leaves_the_seed_open_and_keeps_its_options(strict):
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = MODEL

        def forward(self, x: torch.Tensor, seed: int) -> torch.Tensor:
            return sample_op(self.network, z0=x, burn_in=4, jitter=0.1 + 0.2, seed=seed).final

    x, dynamic = torch.rand(7, 6), (None, torch.export.Dim.DYNAMIC)
    program = torch.export.export(Noisy(), (x, 5), dynamic_shapes=dynamic, strict=strict)
    for seed in (5, 9, 2**40):
        want = fast_sample(MODEL, n_chains=7, z0=x, burn_in=4, jitter=0.1 + 0.2, seed=seed).final
        assert torch.equal(program.module()(x, seed), want)


def test_an_exported_program_takes_any_number_of_chains():
    class Clean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = MODEL

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sample_op(self.network, z0=x, burn_in=4).final

    program = torch.export.export(Clean(), (torch.rand(7, 6),), dynamic_shapes=({0: torch.export.Dim("n")},))
    assert "kaleido_fast.sample" in str(program.graph)
    for n in (1, 7, 30):
        x = torch.rand(n, 6)
        assert torch.equal(program.module()(x), fast_sample(MODEL, n_chains=n, z0=x, burn_in=4, tol=None).final)


def test_no_gradient_flows_and_none_is_asked_for():
    model = random_mlp(4, 9, 4).requires_grad_(True)
    z0 = torch.rand(3, 4, requires_grad=True)
    chains = sample_op(model, z0=z0, burn_in=2)
    assert not any(getattr(chains, name).requires_grad for name in FIELDS)
    scale = torch.ones((), requires_grad=True)
    (scale * chains.draws).sum().backward()
    assert scale.grad is not None and z0.grad is None


def test_the_operator_stays_out_of_cuda_graphs_of_the_compiler():
    assert torch.Tag.cudagraph_unsafe in torch.ops.kaleido_fast.sample.default.tags


# Start states and bad input.


@pytest.mark.parametrize("engine", ENGINES)
def test_start_states_of_any_type_and_layout(engine):
    needs(engine)
    z0 = (2 * torch.rand(6, 9) - 1).half()
    want = sample_op(MODEL, z0=z0.t().float().contiguous(), burn_in=2, engine=engine)
    for given_z0 in (z0.t(), z0.t().contiguous(), z0.t().double(), z0.t().repeat(1, 2)[:, :6]):
        assert_same(sample_op(MODEL, z0=given_z0, burn_in=2, engine=engine), want)
        assert_same(fast_sample(MODEL, n_chains=9, z0=given_z0, burn_in=2, tol=None, engine=engine), want)
    assert torch.equal(z0, z0.clone()), "start states are not written to"


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Tanh()), {"n_chains": 3}, "KaleidoMLP.from_sequential"),
        (MODEL, {}, "pass one of them"),
        (MODEL, {"n_chains": 3, "z0": torch.zeros(4, 6)}, r"z0 has shape \(4, 6\)"),
        (MODEL, {"z0": torch.zeros(4, 5)}, r"\(4, 6\) is needed"),
        (MODEL, {"z0": torch.zeros(4, 6, dtype=torch.int64)}, "floating-point"),
        (MODEL, {"n_chains": 0}, "n_chains is 0"),
        (MODEL, {"n_chains": 3, "seed": -1}, "seed is -1"),
        (MODEL, {"n_chains": 3, "seed": 2**64}, "from 0 to 2"),
        (MODEL, {"n_chains": 3, "precision": "fp23"}, "unknown precision"),
        (MODEL, {"n_chains": 3, "engine": "gpu"}, "unknown engine"),
        (MODEL, {"n_chains": 3, "block_chains": 0}, "block_chains is 0"),
        (MODEL, {"n_chains": 3, "tol": 1e-3, "jitter": 0.1}, "a jittered chain never arrives"),
        (MODEL, {"n_chains": 3, "steps": 5}, "steps 5 with sampler 'kaleidoscope'.*pass sampler='flow'"),
        *(
            (MODEL, {"n_chains": 3, "sampler": "flow", name: value}, f"^{name} {value} with sampler 'flow'")
            for name, value in (("tol", 1e-4), ("thin", 3), ("jitter", 0.1), ("settle", 1), ("max_period", 3))
        ),
        (MODEL, {"n_chains": 3, "sampler": "flow", "steps": 0}, "steps is 0"),
        (MODEL, {"n_chains": 3, "sampler": "flow", "noise_from": 1.5}, "noise_from is 1.5.*at most 1"),
        (MODEL, {"n_chains": 3, "sampler": "flow", "noise_to": 0.9}, "noise_to is 0.9.*below noise_from"),
    ],
)
def test_bad_input_is_named(model, options, text):
    with pytest.raises(InputError, match=text) as caught:
        sample_op(model, **options)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_refused():
    model = random_mlp(3, 5, 3)
    sample_op(model, n_chains=2, burn_in=1)
    with torch.no_grad():
        model.linears[0].weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN or infinite"):
        sample_op(model, n_chains=2, burn_in=1)


def test_start_states_elsewhere_than_the_model_are_refused():
    weights, biases = layers_of(MODEL)
    request = SampleRequest(n_chains=3, tol=None)
    with pytest.raises(InputError, match="z0 is on meta, the model on cpu"):
        _sample_chains(request, MODEL.spec, weights, biases, torch.zeros(3, 6, device="meta"), None)


# On a GPU.


def test_a_compiled_program_and_the_operator_itself_refuse_weights_that_are_no_layers():
    model = random_mlp(4, 7, 4)
    spec = ModelSpec((4, 7, 4), bias=False)
    tail = [None, spec.to_json(), json.dumps(SETTINGS | {"burn_in": 0, "settle": 0, "max_period": 1}), 2, 0, 0]
    first, last = torch.randn(7, 4), torch.randn(4, 7)
    assert torch.ops.kaleido_fast.sample([first, last], [None, None], *tail)[0].shape == (2, 1, 4)
    for weights, biases, text in (
        ([first, torch.randn(4, 6)], [None, None], "layer 1 takes 6 values but gets 7"),
        ([first, last], [torch.randn(3), None], r"layer 0 has weights of shapes \(7, 4\), \(3,\)"),
        ([first, last.to(torch.complex64)], [None, None], r"layer 1 has a weight in torch\.complex64"),
    ):
        with pytest.raises(InputError, match=text):
            torch.ops.kaleido_fast.sample(weights, biases, *tail)
    for weights, biases, text in (
        ([first], [None], "1 layers of weights, but the specification has 2"),
        ([first, last], [None, torch.randn(4)], "layer 1 gives 4 values with a bias: its specification has 4 without"),
        ([first, torch.randn(5, 7)], [None, None], "layer 1 gives 5 values without a bias: its specification has 4"),
    ):
        with pytest.raises(InputError, match=text):
            torch.ops.kaleido_fast.sample(weights, biases, *tail)
    for options in ("[]", "{}", json.dumps(SETTINGS | {"tile_chains": 4})):
        with pytest.raises(InputError, match="give a JSON object of sampler, burn_in, n_draws"):
            torch.ops.kaleido_fast.sample([first, last], [None, None], None, spec.to_json(), options, 2, 0, 0)
    weight = model.layers[0].weight.detach().to(torch.complex64)
    model.layers[0].weight = nn.Parameter(weight)
    with pytest.raises(InputError, match=r"layer 0 has a weight in torch\.complex64"):
        torch.compile(lambda: sample_op(model, n_chains=2, burn_in=0), backend="eager")()
