"""What a run in fp32 on a CPU says of bf16: where the processor has AMX, and by the model's ratio alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from conftest import random_mlp
from hypothesis import given
from hypothesis import strategies as st

from kaleido_fast import Checkpoint, ModelCard, ModelSpec, SampleRequest
from kaleido_fast.benchmarking.cases import network_spec
from kaleido_fast.cli import sample
from kaleido_fast.engines import available
from kaleido_fast.planning.in_bf16 import in_bf16, step_seconds
from kaleido_fast.planning.low_precision import CLEARLY_FASTER


def said(line: str | None) -> float:
    assert line is not None
    return float(line.split()[1].replace(",", ""))


@pytest.mark.parametrize("name", ["points2d", "digits", "deep128", "mnist", "cifar"])
def test_it_shortens_the_steps_before_the_polish_by_the_model_s_ratio(name):
    spec, request = network_spec(name), SampleRequest(n_chains=9, burn_in=299, tol=None)
    line = in_bf16(request, spec, seconds=1000.0)
    assert line is not None and "estimated, by --precision bf16 --polish 50 (" in line and "chains then differ" in line
    ratio = step_seconds(spec, "fp32") / step_seconds(spec, "bf16")
    assert said(line) == pytest.approx(1000 * (50 + 250 / ratio) / 300, rel=0.01)


def test_a_flow_needs_no_polish_and_gains_all():
    spec, request = network_spec("mnist"), SampleRequest(n_chains=9, sampler="flow", steps=20, tol=None)
    line = in_bf16(request, spec, seconds=1000.0)
    assert line is not None and "--polish" not in line and "draws then differ" in line
    assert said(line) == pytest.approx(1000 * step_seconds(spec, "bf16") / step_seconds(spec, "fp32"), rel=0.01)


@pytest.mark.parametrize(
    "options",
    [{"precision": "bf16"}, {"precision": "fp64"}, {"tol": 1e-4}, {"burn_in": 1}],
    ids=["bf16 already", "fp64", "freezes", "too short for a polish"],
)
def test_it_says_nothing_where_it_does_not_know(options):
    request = SampleRequest(**{"n_chains": 9, "burn_in": 299, "tol": None, **options})
    assert in_bf16(request, network_spec("mnist"), seconds=10.0) is None


def test_it_says_nothing_of_networks_that_gain_nothing():
    request = SampleRequest(n_chains=9, burn_in=299, tol=None)
    assert in_bf16(request, network_spec("points1d"), seconds=10.0) is None


@given(
    widths=st.lists(st.integers(1, 3000), min_size=1, max_size=6),
    activation=st.sampled_from(["relu", "silu", "gelu"]),
    jitter=st.sampled_from([0.0, 0.1]),
    seconds=st.floats(0.01, 1e5),
)
def test_what_is_said_is_clearly_faster(widths, activation, jitter, seconds):
    spec = ModelSpec((*widths, widths[0]), activation=activation)
    request = SampleRequest(n_chains=9, burn_in=299, tol=None, jitter=jitter)
    line = in_bf16(request, spec, seconds=seconds)
    assert line is None or said(line) * CLEARLY_FASTER <= seconds * 1.06  # two digits are said


@pytest.mark.parametrize(("instructions", "told"), [("AMX", True), ("AVX-512", False), ("AVX2", False), ("", False)])
def test_the_command_says_it_where_the_processor_has_amx(tmp_path, monkeypatch, instructions, told):
    checkpoint = Checkpoint(random_mlp(64, 256, 256, 64), ModelCard("m"), "", tmp_path / "m.safetensors")
    stats = SimpleNamespace(device="cpu", seconds=4.5, compile_seconds=0.5, n_chains=100)
    request = SampleRequest(n_chains=100, burn_in=299, tol=None)
    result = SimpleNamespace(request=request, plan=SimpleNamespace(engine="cpu"), stats=stats)
    monkeypatch.setattr(available, "instruction_set", lambda: instructions)
    row = sample._cheaper_row(result, checkpoint, alone=True)
    want = ("in bf16", in_bf16(request, checkpoint.model.spec, seconds=4.0))
    assert row == (want if told else None)
    result.plan.engine = "reference"
    assert sample._cheaper_row(result, checkpoint, alone=True) is None
