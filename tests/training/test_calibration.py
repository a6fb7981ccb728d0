"""The variance that samples are given after training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kaleido_fast import fast_sample
from kaleido_fast.errors import InputError
from kaleido_fast.model import KaleidoMLP, ModelSpec, model_hash
from kaleido_fast.presets import FLOW_SAMPLING, TrainingRecipe
from kaleido_fast.reading.datasets import Dataset
from kaleido_fast.training import calibration
from kaleido_fast.training.calibration import HIGHEST_GAIN, LastLayer, calibrate, calibration_line, find_gain
from kaleido_fast.training.loop import Loop, TrainingInterruptedError
from kaleido_fast.training.objective import held_out_measure
from kaleido_fast.training.parallel import TrainingWorkers
from kaleido_fast.training.run import TrainingRun
from kaleido_fast.training.trainer import PaleSamplesWarning, train

FLOW = TrainingRecipe(kind="flow", steps=150, batch_size=32, learning_rate=3e-3, warmup=5, init="principal")
SPEC = ModelSpec((16, 24, 24, 16), "silu", sample_shape=(4, 4))
LINE = {"gain": 1.0625, "before": 0.8123, "after": 0.9502}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pictures() -> Dataset:
    """4 x 4 pictures, each of one of three patterns at one of many strengths."""
    patterns = torch.randn((3, 16), generator=seeded(1)).sign()
    strength = torch.rand((90, 1), generator=seeded(2)) * 0.6 + 0.3
    return Dataset("patterns", (strength * patterns.repeat(30, 1)).contiguous(), sample_shape=(4, 4))


def variance(model: KaleidoMLP, seed: int, n: int = 1000) -> float:
    return float(fast_sample(model, n_chains=n, seed=seed, device="cpu", **FLOW_SAMPLING).final.var(0).sum())


def test_samples_get_the_variance_that_was_asked_for(pictures):
    """Measured by starts that the trainer did not use."""
    of_data = float(pictures.data.var(0).sum())
    for share in (0.9, 1.0):
        result = train(pictures, spec=SPEC, recipe=replace(FLOW, sample_variance=share), seed=1)
        found = result.card.diagnostics["calibration"]
        assert found["before"] < 0.89, "training reached it by itself: this run cannot tell"
        assert found["after"] == pytest.approx(share, abs=0.02)
        assert variance(result.model, seed=5, n=4000) / of_data == pytest.approx(share, abs=0.06)


def test_without_it_the_network_is_as_it_was_trained(pictures):
    plain = train(pictures, spec=SPEC, recipe=FLOW, seed=1)
    given_more = train(pictures, spec=SPEC, recipe=replace(FLOW, sample_variance=0.95), seed=1)
    assert "calibration" not in plain.card.diagnostics
    gain = given_more.card.diagnostics["calibration"]["gain"]
    last = len(SPEC.widths) - 2
    for i, (a, b) in enumerate(zip(plain.model.linears, given_more.model.linears, strict=True)):
        torch.testing.assert_close(b.weight, a.weight * (gain if i == last else 1), rtol=1e-6, atol=0)
        assert torch.equal(a.bias, b.bias) == (i != last)


def test_the_card_speaks_of_the_network_that_is_kept(pictures):
    """Errors and the measure of the best weights are those after the last layer was stretched, and rounded."""
    recipe = replace(FLOW, sample_variance=0.95, weights="fp16", held_out=20)
    result = train(pictures, spec=SPEC, recipe=recipe, seed=1)
    assert all(torch.equal(p, p.half().float()) for p in result.model.parameters())
    assert result.card.diagnostics["calibration"]["gain"] > 1
    run = TrainingRun(pictures, SPEC, recipe, 1, torch.device("cpu"))
    run.model.load_state_dict(result.model.state_dict())
    assert result.card.diagnostics["denoising_error"] == run.flow_errors().to_dict()["denoising_error"]
    assert result.card.final_loss == held_out_measure(run.fixed, run.model)


@settings(max_examples=30, deadline=None)
@given(gains=st.lists(st.floats(0.5, 2), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_stretching_is_around_the_mean_and_of_the_layer_as_it_was(gains, seed):
    torch.manual_seed(seed)
    model = KaleidoMLP(SPEC)
    x = torch.randn((20, 16), generator=seeded(seed))
    with torch.no_grad():
        before = model.before_bound(x).clone()
        last = LastLayer(model, x.tanh(), seeded(seed))
        for gain in gains:
            last.stretch(gain)
        wanted = last.mean + gains[-1] * (before - last.mean)
        torch.testing.assert_close(model.before_bound(x), wanted, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(before=st.floats(0.3, 1.2), slope=st.floats(0.2, 6), share=st.floats(0.5, 1))
def test_the_gain_that_is_found(before, slope, share):
    def reached(gain: float) -> float:
        return before + slope * (gain - 1)

    gain, after = find_gain(reached, before, share)
    assert 1 <= gain <= HIGHEST_GAIN
    assert after == pytest.approx(reached(gain), abs=1e-12)
    if before >= share:
        assert gain == 1, "a network is never made paler"
    elif reached(HIGHEST_GAIN) >= share + 0.02:
        assert after == pytest.approx(share, abs=0.02)
    else:
        assert gain > HIGHEST_GAIN - 0.1


def test_what_cannot_be_measured_is_left_alone(pictures):
    model = KaleidoMLP(SPEC)
    one = pictures.data[:1]
    before = model_hash(model)
    assert calibrate(model, one, FLOW_SAMPLING, 0.95, seeded()) is None
    assert model_hash(model) == before
    with torch.no_grad():
        for layer in model.linears:
            layer.weight.mul_(1e30)  # fp32 cannot hold what comes of it
    before = model_hash(model)
    assert calibrate(model, pictures.data, FLOW_SAMPLING, 0.95, seeded()) is None
    assert model_hash(model) == before


def test_ctrl_c_while_it_is_measured_loses_nothing(pictures, tmp_path, monkeypatch):
    recipe = replace(FLOW, sample_variance=0.95, weights="fp16")
    whole = train(pictures, spec=SPEC, recipe=recipe, seed=1)

    calls = []

    def stopped(*args, **options):
        calls.append(1)
        if len(calls) == 4:  # by then the layer is stretched
            raise KeyboardInterrupt
        return fast_sample(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(calibration, "fast_sample", stopped)
        with pytest.raises(TrainingInterruptedError, match="150 of 150"):
            train(pictures, spec=SPEC, recipe=recipe, seed=1, state=tmp_path / "s")
    resumed = train(pictures, spec=SPEC, recipe=recipe, seed=1, state=tmp_path / "s")
    assert model_hash(resumed.model) == model_hash(whole.model)
    assert resumed.card == whole.card


def test_the_mean_is_that_of_outputs_at_all_shares_of_noise(pictures):
    """By other noise; stretching around 0 would take ink away."""
    model = train(pictures, spec=SPEC, recipe=FLOW, seed=1).model
    last = LastLayer(model, pictures.data, seeded())
    clean = pictures.data.repeat(200, 1)
    shares = torch.rand((len(clean), 1), generator=seeded(3))
    with torch.no_grad():
        outputs = model.before_bound((1 - shares) * clean + shares * torch.randn(clean.shape, generator=seeded(4)))
    spread = outputs.std(0).mean()
    assert float((last.mean - outputs.mean(0)).abs().max()) < 0.4 * float(spread)
    assert float(outputs.mean(0).abs().max()) > 0.5 * float(spread), "the mean is 0: this network cannot tell"


def test_another_worker_stretches_by_what_the_first_has_found(pictures, tmp_path):
    recipe = replace(FLOW, steps=40, sample_variance=0.95)
    runs = [TrainingRun(pictures, SPEC, recipe, 1, torch.device("cpu")) for _ in range(2)]
    loops = [Loop(run, None, 60.0, None) for run in runs]
    for run, loop in zip(runs, loops, strict=True):
        loop.finish()
        run.take_best()
    found = loops[0].calibrate(FLOW_SAMPLING)
    assert found["calibration"]["gain"] > 1

    class Second(TrainingWorkers):
        rank = 1

        def broadcast(self, key, compute):
            return found

    runs[1].workers = Second()
    assert loops[1].calibrate(FLOW_SAMPLING) == found
    assert model_hash(runs[0].model) == model_hash(runs[1].model)


def test_what_was_not_reached_is_said(pictures):
    with pytest.warns(PaleSamplesWarning, match=r"samples have .* of the data, not 100% .* train with more steps"):
        result = train(pictures, spec=SPEC, recipe=replace(FLOW, steps=5, init="kaiming", sample_variance=1.0), seed=1)
    assert len(result.warnings) == 1
    plain = replace(SPEC, bias=False)
    with pytest.warns(PaleSamplesWarning, match="a last layer with biases"):
        result = train(pictures, spec=plain, recipe=replace(FLOW, steps=5, init="kaiming", sample_variance=1.0), seed=1)
    assert "calibration" not in result.card.diagnostics


def test_it_belongs_to_a_flow(pictures):
    with pytest.raises(InputError, match=r"sample_variance = 0\.9 with kind 'attractors'.*leave it out"):
        train(pictures, spec=SPEC, recipe=TrainingRecipe(steps=2, sample_variance=0.9))
    with pytest.raises(InputError, match=r"sample_variance = 1\.5: give a number from 0 to 1"):
        train(pictures, spec=SPEC, recipe=replace(FLOW, sample_variance=1.5))


def test_line():
    assert calibration_line({**LINE, "gain": 1.0}) == "samples have 95% of the variance of the data as trained"
    assert calibration_line(LINE) == (
        "samples have 95% of the variance of the data; 81% before the last layer was stretched by 1.062"
    )
