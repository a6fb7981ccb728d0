"""The plan is a pure function of model, request and device facts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import random_mlp
from hypothesis import given
from hypothesis import strategies as st

from kaleido_fast import InputError, ModelSpec, SampleRequest
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.planning.facts import DeviceFacts
from kaleido_fast.planning.merging import merge_options
from kaleido_fast.planning.plan import make_plan, plan_kernel
from kaleido_fast.presets import NETWORKS
from kaleido_fast.running.subject import resolve_subject
from kaleido_fast.system.versions import library_versions
from kaleido_kernels.precision import WeightsRange
from kaleido_kernels.schedule import Schedule
from kaleido_kernels.tile import GpuFacts, Tile
from kaleido_kernels.tuned import tile_to_json

LAPTOP = DeviceFacts("cpu", "laptop", has_numba=True, has_triton=True)
BARE = DeviceFacts("cpu", "bare")
H200 = DeviceFacts("cuda", "H200", memory=2**37, has_triton=True, gpu=GpuFacts(232_448, (9, 0), n_sm=132))
A100 = DeviceFacts("cuda", "A100", memory=2**35, has_triton=True, gpu=GpuFacts(166_912, (8, 0), n_sm=108))
OLD = DeviceFacts("cuda", "P100", memory=2**34, has_triton=True, gpu=GpuFacts(49_152, (6, 0), n_sm=56))


def spec_of(name: str) -> ModelSpec:
    shape = NETWORKS[name]
    return ModelSpec(shape.widths, bound=shape.bound, sample_shape=shape.sample_shape)


def plan_for(facts: DeviceFacts, name: str = "digits", **options):
    spec = spec_of(name)
    return make_plan(SampleRequest(**{"n_chains": 100_000, **options}), spec, facts, spec.dim)


@pytest.mark.parametrize(
    ("facts", "options", "engine", "reason"),
    [
        (LAPTOP, {}, "cpu", "fastest on laptop"),
        (BARE, {}, "reference", "numba is not installed"),
        (LAPTOP, {"precision": "fp64"}, "reference", "no fp64"),
        (LAPTOP, {"precision": "fp16"}, "reference", "fp32"),
        (H200, {}, "triton", "fastest on H200"),
        (OLD, {}, "reference", "compute capability 8.0"),
        (H200, {"engine": "reference"}, "reference", "by name"),
    ],
)
def test_auto_takes_the_fastest_that_can_run_and_says_why(facts, options, engine, reason):
    plan = plan_for(facts, **options)
    assert plan.engine == engine
    assert reason in plan.explain()


@pytest.mark.parametrize(
    ("facts", "options", "text"),
    [
        (LAPTOP, {"engine": "triton"}, "there is no GPU"),
        (BARE, {"engine": "triton"}, "Triton is not installed"),
        (BARE, {"engine": "cpu"}, r"pip install 'kaleido-fast\[cpu\]'"),
        (H200, {"engine": "cpu"}, "pass device='cpu'"),
        (LAPTOP, {"engine": "cpu", "precision": "fp16"}, "computes in fp32 or bf16, not fp16"),
        (OLD, {"engine": "triton"}, r"has 6\.0"),
        (LAPTOP, {"n_chains": 10**10}, "pass at most about"),
    ],
)
def test_an_engine_asked_for_by_name_runs_or_says_what_is_missing(facts, options, text):
    with pytest.raises(InputError, match=text) as caught:
        plan_for(facts, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("facts", [H200, A100], ids=["H200", "A100"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "tf32"])
@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("points1d", ("narrow",)),
        ("points2d", ("narrow", "stream")),
        ("digits", ("onchip", "stream", "wide")),
        ("deep128", ("onchip", "stream", "wide")),
        ("mnist", ("onchip", "wide")),
        ("cifar", ("wide",)),
    ],
)
def test_every_reference_network_has_a_kernel(facts, precision, name, kernels):
    plan = plan_for(facts, name, precision=precision)
    assert plan.engine == "triton"
    assert plan.kernel.startswith(kernels), plan.kernel


@given(burn_in=st.integers(0, 30), n_draws=st.integers(1, 9), thin=st.integers(1, 9), settle=st.integers(0, 9))
def test_schedule_agrees_with_its_definition(burn_in, n_draws, thin, settle):
    schedule = Schedule(burn_in, n_draws, thin, settle, 0.5, "normal")
    ends = [burn_in + (i + 1) * thin for i in range(n_draws)]
    assert schedule.n_steps == ends[-1]
    for done in range(schedule.n_steps + 1):
        assert schedule.draw_after(done) == (ends.index(done) if done in ends else None)
        assert schedule.draws_done(done) == sum(end <= done for end in ends)
    for step in range(schedule.n_steps):
        to_next = min(end - step for end in ends if end > step)
        assert schedule.is_jittered(step) == (step > 0 and to_next > settle)


def test_a_tuned_tile_wins_and_a_bad_table_is_passed_over(tmp_path):
    from kaleido_fast.system.tuned import tuned_tiles
    from kaleido_kernels.tile import Tile
    from kaleido_kernels.tuned import tile_to_json, tuned_key

    key = tuned_key(spec_of("points2d"), "bf16")
    versions = library_versions("triton")
    table = {"device": "My GPU", "triton": versions["triton"], "tiles": {key: tile_to_json(Tile("narrow", 128, 8))}}
    (tmp_path / "My_GPU.json").write_text(json.dumps(table))
    tuned = replace(H200, tuned=tuned_tiles("My GPU", [tmp_path]))
    assert "narrow 128 chains (8 warps" in plan_for(tuned, "points2d", precision="bf16").kernel
    assert "narrow 64 chains" in plan_for(H200, "points2d", precision="bf16").kernel
    assert tuned_tiles("Other GPU", [tmp_path]) == {}
    (tmp_path / "My_GPU.json").write_text("{")
    with pytest.warns(UserWarning, match="is no tuned table"):
        assert tuned_tiles("My GPU", [tmp_path]) == {}


def test_explicit_options_win_over_recommended_ones():
    assert merge_options({"burn_in": 3}, {"burn_in": 9, "jitter": 0.5, "moon": 1}) == {"burn_in": 3, "jitter": 0.5}


@given(st.integers(1, 10**7), st.sampled_from(sorted(NETWORKS)))
def test_blocks_are_whole_tiles_and_memory_counts_the_draws(n_chains, name):
    facts = DeviceFacts("cpu", memory=2**60)
    plan = plan_for(facts, name, n_chains=n_chains)
    assert plan.block_chains % plan.tile_rows == 0
    assert plan.draws_bytes >= n_chains * NETWORKS[name].dim * 4


@given(
    st.integers(1, 10**6),
    st.sampled_from(sorted(NETWORKS)),
    st.sampled_from(["fp32", "fp16", "bf16"]),
    st.integers(0, 3),
)
def test_a_gpu_runs_no_more_waves_in_blocks_than_in_one_launch(n_chains, name, precision, polish):
    """Waves of programs, each of which takes as long as the slowest: the time of a launch."""
    polish = 0 if precision == "fp32" else polish
    plan = plan_for(H200, name, n_chains=n_chains, precision=precision, polish=polish, tol=None)
    assert plan.engine == "triton"
    block, (first, *_) = plan.block_chains, plan.phases
    wave = first.kernel.choice.tile.chains * H200.gpu.n_sm

    def waves(chains: int) -> int:
        return -(-chains // wave)

    whole, rest = divmod(n_chains, block)
    assert whole * waves(block) + waves(rest) == waves(n_chains)


def with_faint_layer() -> KaleidoMLP:
    """One layer so small that split fp16 loses bits of it: fp32 runs by plain products, which narrow does not take."""
    model = random_mlp(64, 128, 128, 128, 64)
    with torch.no_grad():
        model.linears[1].weight.mul_(2.0**-10)
    return model


def test_one_plan_says_what_runs_and_runs():
    """Plan, engine, explanation, record and doctor give one answer for weights that decide the kernel."""
    from kaleido_fast.cli import doctor
    from kaleido_fast.engines.triton import TritonEngine

    subject = resolve_subject(with_faint_layer())
    request = SampleRequest(n_chains=100_000, engine="triton")
    plan = make_plan(request, subject.spec, H200, subject.dim, weights=subject.weights_range)
    (phase,) = plan.phases
    assert phase.kernel.precision == "ieee" and phase.kernel.choice.kernel == "wide"
    engine = TritonEngine(subject.module, request, phase.kernel, torch.device("cpu"))
    assert engine.plan is phase.kernel
    assert plan.kernel in plan.explain() and plan.kernel.startswith("wide 64x64x16")
    assert plan.kernels["from step 0"] == {**tile_to_json(phase.kernel.choice.tile), "precision": "ieee"}
    said = doctor._kernels(subject.spec, subject.weights_range, H200)
    assert said["fp32 on H200"] == plan.kernel
    usual = make_plan(request, subject.spec, H200, subject.dim)
    assert usual.phases[0].kernel.precision == "fp16x3" and usual.kernel.startswith("narrow")


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32", "fp32"])
@pytest.mark.parametrize("largest", [1.0, 1e6, float("inf")])
@pytest.mark.parametrize("engine", ["auto", "triton", "reference"])
def test_weights_that_round_to_infinity_are_refused_by_every_engine(precision, largest, engine):
    spec = spec_of("points2d")
    request = SampleRequest(n_chains=100, precision=precision, engine=engine)
    if largest < (6e4 if precision == "fp16" else float("inf")):
        make_plan(request, spec, H200, spec.dim, weights=WeightsRange(largest, 1.0))
        return
    with pytest.raises(InputError, match=f"precision '{precision}': the largest weight is .*, at most .* fits"):
        make_plan(request, spec, H200, spec.dim, weights=WeightsRange(largest, 1.0))


def test_auto_falls_back_where_a_kernel_would_lose_bits_and_a_name_is_refused():
    spec, request = spec_of("points2d"), SampleRequest(n_chains=100, precision="fp16")
    small = WeightsRange(1.0, 1e-7)
    plan = make_plan(request, spec, H200, spec.dim, weights=small)
    assert plan.engine == "reference" and "triton cannot run this" in plan.reason and "weight" in plan.reason
    with pytest.raises(InputError, match="engine 'triton' cannot run this"):
        make_plan(replace(request, engine="triton"), spec, H200, spec.dim, weights=small)


@given(st.integers(1, 40), st.integers(0, 40), st.integers(1, 3), st.integers(1, 5))
def test_phases_cover_every_step_once_and_the_polish_is_fp32(burn_in, polish, n_draws, thin):
    polish = min(polish, burn_in + thin)
    options = {"burn_in": burn_in, "n_draws": n_draws, "thin": thin, "polish": polish}
    plan = plan_for(H200, "points2d", precision="bf16", **options)
    steps = [step for phase in plan.phases for step in range(phase.first, phase.last)]
    assert steps == list(range(burn_in + n_draws * thin))
    exact = [phase.precision for phase in plan.phases for step in range(phase.first, phase.last)]
    assert (
        exact == ["bf16"] * (burn_in + thin - polish) + ["fp32"] * (len(steps) - burn_in - thin + polish) or not polish
    )
    assert all(phase.kernel.precision == ("bf16" if phase.precision == "bf16" else "fp16x3") for phase in plan.phases)


def test_a_polish_counts_in_memory():
    """Both phases' weights and scratch lie there at once."""
    plain = plan_for(H200, "cifar", precision="bf16")
    both = plan_for(H200, "cifar", precision="bf16", polish=10)
    scratch = both.phases[1].kernel.scratch_bytes
    assert scratch > 0
    assert both.working_bytes - plain.working_bytes == scratch + 4 * spec_of("cifar").n_parameters


def test_a_tile_that_is_named_runs_or_is_refused():
    tuned = replace(H200, tuned={"any": "thing"})
    tile = Tile("narrow", 128, 8)
    spec = spec_of("points2d")
    assert plan_kernel(spec, "fp16", tuned, tile=tile).choice.tile == tile
    with pytest.raises(ValueError, match="at most 128"):
        plan_kernel(spec_of("digits"), "fp16", tuned, tile=tile)
    turing = replace(H200, gpu=replace(H200.gpu, capability=(7, 5)))
    with pytest.raises(ValueError, match=r"needs compute capability 8\.0"):
        plan_kernel(spec, "fp16", turing, tile=tile)


def test_a_tile_that_is_named_is_said_to_be_asked_for():
    """It is neither the first that fits nor measured."""
    said = plan_kernel(spec_of("points2d"), "fp16", H200, tile=Tile("narrow", 128, 8)).explain()
    assert said == "narrow 128 chains (8 warps, 1 stages), asked for"
