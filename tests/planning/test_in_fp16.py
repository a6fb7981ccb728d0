"""What a run in fp32 says of fp16: only where it is known, and no more than the model promises."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import random_mlp
from hypothesis import given
from hypothesis import strategies as st

from kaleido_fast import Checkpoint, ModelCard, ModelSpec, SampleRequest
from kaleido_fast.cli import sample
from kaleido_fast.planning.facts import H200, DeviceFacts
from kaleido_fast.planning.in_fp16 import (
    BY_PARTS,
    in_fp16,
    kernel_seconds,
)
from kaleido_fast.planning.low_precision import CLEARLY_FASTER, MOST_POLISH, low_request, low_words
from kaleido_fast.planning.plan import make_plan
from kaleido_fast.presets import NETWORKS
from kaleido_fast.system import devices
from kaleido_kernels.precision import USUAL, WeightsRange
from kaleido_kernels.proving.trials import expected_milliseconds
from kaleido_kernels.tile import GpuFacts

INTERPRETED = DeviceFacts("cpu", "laptop", has_triton=True, interpreter=True)
A100 = replace(H200, name="A100", gpu=GpuFacts(166_912, (8, 0), n_sm=108))
ALL_STEPS: dict[str, Any] = {"n_chains": 100_000, "tol": None}
"""100,000 chains x 300 steps, none of which is frozen."""


def spec_of(name: str) -> ModelSpec:
    shape = NETWORKS[name]
    return ModelSpec(shape.widths, bound=shape.bound, sample_shape=shape.sample_shape)


def modelled(request: SampleRequest, spec: ModelSpec) -> float:
    """What the model says of a run on an H200."""
    plan = make_plan(request, spec, H200, spec.dim)
    found = kernel_seconds(plan.phases, spec, H200.gpu, request.n_chains, plan.block_chains)
    assert found is not None
    return found


def line_of(
    name: str = "mnist",
    facts: DeviceFacts = H200,
    weights: WeightsRange = USUAL,
    seconds: float | None = None,
    **options,
) -> str | None:
    """The line of a run that took as long as the model says, or ``seconds``."""
    spec, request = spec_of(name), SampleRequest(**{**ALL_STEPS, **options})
    plan = make_plan(request, spec, facts, spec.dim, weights=weights)
    seconds = modelled(SampleRequest(**ALL_STEPS), spec) if seconds is None else seconds
    return in_fp16(request, plan, spec, facts, weights, n_chains=request.n_chains, seconds=seconds)


def said(line: str | None) -> float:
    assert line is not None
    before, number, unit, *_ = line.split()
    assert (before, unit) == ("about", "s,")
    return float(number.replace(",", ""))


@pytest.mark.parametrize("name", ["points2d", "deep128", "digits", "mnist", "cifar"])
def test_it_says_what_the_model_says_of_the_run_that_the_flags_ask_for(name):
    line = line_of(name)
    assert line is not None and "estimated, by --precision fp16 --polish 50 (" in line and "chains then differ" in line
    polished = SampleRequest(**ALL_STEPS, precision="fp16", polish=50)
    assert said(line) == pytest.approx(modelled(polished, spec_of(name)), rel=0.06)  # two digits are said


def test_steps_after_the_first_draw_are_in_fp32_and_gain_nothing():
    several: dict[str, Any] = {"burn_in": 190, "n_draws": 11, "thin": 10}  # 300 steps, 200 before the first draw
    assert said(line_of(**several)) > 1.3 * said(line_of())
    assert line_of(burn_in=9, n_draws=291) is None


def test_a_flow_has_no_polish_and_is_said_without():
    line = line_of(sampler="flow", n_draws=15)
    assert line is not None and "--precision fp16: draws then differ" in line and "polish" not in line
    whole = modelled(SampleRequest(**ALL_STEPS, precision="fp16"), spec_of("mnist"))
    assert said(line) == pytest.approx(BY_PARTS * whole, rel=0.06)


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("chains are frozen", {"tol": 1e-4}),
        ("it is in fp16", {"precision": "fp16"}),
        ("it is in bf16", {"precision": "bf16"}),
        ("another engine ran it", {"engine": "reference"}),
        ("a GPU that is not modelled", {"facts": A100}),
        ("the interpreter ran it", {"facts": INTERPRETED, "engine": "triton"}),
        ("fp16 does not hold the weights", {"weights": WeightsRange(7e4, 1.0)}),
        ("fp16 does not, and no other engine may", {"weights": WeightsRange(7e4, 1.0), "engine": "triton"}),
        ("plain fp32 products, which were not compared", {"weights": WeightsRange(1.0, 2.0**-7)}),
        ("a kernel that was not compared", {"kernel": "graph"}),
        ("no step is left for fp16", {"burn_in": 2}),
        ("nothing was measured", {"seconds": 0.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_nothing_is_said_where(what, options):
    assert line_of() is not None and line_of(**options) is None, what


@given(st.floats(1e-6, 1e6))
def test_no_more_is_saved_than_the_model_gives_to_the_kernels(seconds):
    exact = modelled(SampleRequest(**ALL_STEPS), spec_of("mnist"))
    polished = modelled(SampleRequest(**ALL_STEPS, precision="fp16", polish=50), spec_of("mnist"))
    line, left = line_of(seconds=seconds), seconds - min(1.0, seconds / exact) * (exact - polished)
    assert (line is None) == (seconds < CLEARLY_FASTER * left)
    assert line is None or said(line) == pytest.approx(left, rel=0.06)


def test_nothing_is_said_where_all_chains_were_there_before():
    spec, request = spec_of("mnist"), SampleRequest(**ALL_STEPS)
    plan = make_plan(request, spec, H200, spec.dim)
    assert in_fp16(request, plan, spec, H200, USUAL, n_chains=0, seconds=1.0) is None


def test_a_run_that_spent_its_time_elsewhere_says_nothing():
    """Such as one that waited for its disk: fp16 would not have helped."""
    assert line_of(seconds=10.0) is None


@given(st.integers(0, 1000), st.integers(1, 50), st.integers(1, 5))
def test_the_run_that_is_proposed_can_be_asked_for(burn_in, thin, n_draws):
    request = SampleRequest(n_chains=7, burn_in=burn_in, thin=thin, n_draws=n_draws, tol=None)
    other = low_request(request, "fp16")
    if burn_in + thin < 4:
        assert other is None
        return
    assert other is not None and 1 <= other.polish <= min(MOST_POLISH, (burn_in + thin) // 4)
    assert replace(other, precision="fp32", polish=0) == request


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32", "fp64"])
def test_nothing_is_proposed_for_runs_in_another_precision(precision):
    assert low_request(SampleRequest(n_chains=7, tol=None), "fp16") is not None
    assert low_request(SampleRequest(n_chains=7, tol=None, precision=precision), "fp16") is None


def test_blocks_are_launches_of_their_own():
    spec = spec_of("digits")
    plan = make_plan(SampleRequest(**ALL_STEPS), spec, H200, spec.dim)
    (phase,) = plan.phases
    assert phase.kernel is not None
    tile, precision = phase.kernel.choice.tile, phase.kernel.precision
    each = [
        expected_milliseconds(spec, precision, tile, H200.gpu, n_chains=n, n_steps=300)
        for n in (16_384, 100_000 % 16_384)
    ]
    assert kernel_seconds(plan.phases, spec, H200.gpu, 100_000, 16_384) == pytest.approx((6 * each[0] + each[1]) / 1e3)
    assert kernel_seconds(plan.phases, spec, H200.gpu, 16_384, 16_384) == pytest.approx(each[0] / 1e3)
    assert kernel_seconds((replace(phase, kernel=None),), spec, H200.gpu, 9, 9) is None


def test_one_step_of_polish_is_one_step():
    assert "--polish 1 (the last step before" in low_words(SampleRequest(n_chains=1, precision="fp16", polish=1), 1.0)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.0314, "0.031 s"), (0.59, "0.59 s"), (2.94, "2.9 s"), (72.6, "73 s"), (5400.0, "5,400 s")]
)
def test_seconds_are_said_with_two_digits_or_whole(seconds, words):
    assert low_words(SampleRequest(n_chains=1), seconds).startswith(f"about {words}, estimated")


@pytest.fixture
def finished(tmp_path):
    """A checkpoint, and its run as an H200 would have ended it: all but the figures that the table prints."""
    checkpoint = Checkpoint(random_mlp(64, *[256] * 24, 64), ModelCard("m"), "", tmp_path / "m.safetensors")
    spec, request = checkpoint.model.spec, SampleRequest(**ALL_STEPS)
    stats = SimpleNamespace(device="cuda:0", seconds=4.5, compile_seconds=4.0, n_chains=100_000)
    return SimpleNamespace(request=request, plan=make_plan(request, spec, H200, spec.dim), stats=stats), checkpoint


def test_the_command_asks_about_the_gpu_that_ran_it_and_leaves_compiling_out(finished, monkeypatch):
    result, checkpoint = finished
    asked: list[torch.device] = []

    def facts_of(device: torch.device) -> DeviceFacts:
        asked.append(device)
        return H200

    monkeypatch.setattr(devices, "device_facts", facts_of)
    line = sample._cheaper_row(result, checkpoint, alone=False)
    assert asked == [torch.device("cuda:0")]
    spec = checkpoint.model.spec
    size: dict[str, Any] = {"n_chains": 100_000, "seconds": 0.5}
    assert (
        line is not None
        and line[0] == "in fp16"
        and line[1] == in_fp16(result.request, result.plan, spec, H200, USUAL, **size)
    )
    result.stats.new_chains = 100  # the others were there before
    assert sample._cheaper_row(result, checkpoint, alone=False) is None


def test_the_command_says_nothing_of_shared_runs_and_without_a_gpu(finished, monkeypatch):
    result, checkpoint = finished
    monkeypatch.setattr(devices, "device_facts", lambda device: H200)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sample._cheaper_row(result, checkpoint, alone=False) is None
    assert sample._cheaper_row(result, checkpoint, alone=True) is not None
    result.stats.device = "cpu"  # the interpreter, or the emulator
    assert sample._cheaper_row(result, checkpoint, alone=True) is None


def test_the_table_has_the_line_beside_the_speed(tmp_path, capsys):
    from kaleido_fast import fast_sample

    result = fast_sample(random_mlp(3, 5, 3), n_chains=4, burn_in=2, device="cpu")
    sample.report(result, [tmp_path / "x.npy"], as_json=False, quiet=False, cheaper=("in fp16", "about 3 s, estimated"))
    lines = capsys.readouterr().out.splitlines()
    (place,) = [place for place, line in enumerate(lines) if line.startswith("in fp16")]
    assert lines[place].endswith(" about 3 s, estimated") and lines[place - 1].startswith("speed")
    sample.report(result, [tmp_path / "x.npy"], as_json=False, quiet=False)
    assert "fp16" not in capsys.readouterr().out
