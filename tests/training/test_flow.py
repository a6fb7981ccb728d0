"""Trainings of flows: what is kept, resumed, recommended and told of them."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch
from small_training import StopAt

from kaleido_fast import fast_sample, load_checkpoint, save_checkpoint
from kaleido_fast.errors import InputError
from kaleido_fast.model import KaleidoMLP, ModelSpec, model_hash
from kaleido_fast.presets import FLOW_SAMPLING, TrainingRecipe
from kaleido_fast.reading.datasets import Dataset
from kaleido_fast.training import run as training_run
from kaleido_fast.training.loop import TrainingInterruptedError
from kaleido_fast.training.objective import NOISE_LEVELS
from kaleido_fast.training.run import TrainingRun
from kaleido_fast.training.trainer import request_of, train, training_request

FLOW = TrainingRecipe(
    kind="flow",
    steps=60,
    batch_size=16,
    learning_rate=3e-3,
    warmup=5,
    held_out=8,
    average=0.9,
    weight_decay=0.1,
    shift=0.4,
)
SPEC = ModelSpec((16, 23, 19, 16), "silu", sample_shape=(4, 4))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures() -> Dataset:
    """Sloping 4 x 4 pictures."""
    generator = torch.Generator().manual_seed(5)
    slopes = torch.rand((50, 2), generator=generator) - 0.5
    places = torch.arange(4) / 2 - 0.75
    data = (slopes[:, :1, None] * places[:, None] + slopes[:, 1:, None] * places).flatten(1)
    return Dataset("slopes", data.contiguous(), sample_shape=(4, 4))


def trained(pictures, recipe=FLOW, **options):
    """Warnings are errors: a flow is not judged by stable examples."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return train(pictures, spec=SPEC, recipe=recipe, seed=3, **options)


def own_errors(model: KaleidoMLP, examples: Dataset | None) -> list[float]:
    """By other noise than the card's."""
    assert examples is not None
    clean = examples.data.repeat(400, 1)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return [float((model((1 - u) * clean + u * noise) - clean).square().mean()) for u in NOISE_LEVELS]


def test_card_of_a_flow(pictures):
    train_part, held_out = pictures.split(8)
    result = trained(pictures, replace(FLOW, steps=300))
    card = result.card
    assert card.sampling == FLOW_SAMPLING
    assert set(card.diagnostics) == {"denoising_error", "novelty"}
    errors = card.diagnostics["denoising_error"]
    assert errors["noise"] == list(NOISE_LEVELS)
    assert errors["held_out"] == pytest.approx(own_errors(result.model, held_out), rel=0.25)
    assert errors["training"] == pytest.approx(own_errors(result.model, train_part), rel=0.25)
    assert json.loads(card.to_json())["diagnostics"] == card.diagnostics
    assert "computed_in" not in card.recipe
    assert trained(pictures, replace(FLOW, held_out=0)).card.diagnostics["denoising_error"]["held_out"] is None


def test_training_makes_the_errors_small(pictures):
    first = trained(pictures, replace(FLOW, steps=2)).card.diagnostics["denoising_error"]["held_out"]
    last = trained(pictures, replace(FLOW, steps=400, shift=0.0)).card.diagnostics["denoising_error"]["held_out"]
    assert all(late < 0.4 * early for early, late in zip(first, last, strict=True)), (first, last)


@pytest.mark.parametrize("loss", ["squared", "bce"])
def test_what_is_kept_is_the_average_at_its_best(pictures, loss):
    recipe = replace(FLOW, loss=loss)
    result = trained(pictures, recipe)
    run = TrainingRun(pictures, SPEC, recipe, 3, CPU)
    measured = training_run.held_out_measure(run.fixed, result.model)
    assert measured == pytest.approx(min(entry.held_out for entry in result.history), rel=1e-6)
    assert result.card.final_loss == pytest.approx(measured, rel=1e-6)
    plain = trained(pictures, replace(recipe, average=0.0))
    assert model_hash(plain.model) != model_hash(result.model)


@pytest.mark.parametrize("change", [{"weight_decay": 0.0}, {"shift": 0.0}, {"loss": "bce"}, {"average": 0.5}])
def test_every_setting_acts(pictures, change):
    assert model_hash(trained(pictures, replace(FLOW, **change)).model) != model_hash(trained(pictures).model)


def test_decay_is_that_of_adamw(pictures):
    """Full batches without noise of their own kind: the same steps by torch's AdamW."""
    recipe = replace(FLOW, steps=4, average=0.0, shift=0.0, weight_decay=0.3, schedule="constant", warmup=0)
    run = TrainingRun(pictures, SPEC, recipe, 0, CPU)
    model = KaleidoMLP(SPEC)
    model.load_state_dict(run.model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.3)
    for _ in range(4):
        run.advance()
        for mine, theirs in zip(model.parameters(), run.model.parameters(), strict=True):
            assert theirs.grad is not None
            mine.grad = theirs.grad.clone()
        optimizer.step()
    for mine, theirs in zip(model.parameters(), run.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("step", [1, 9, 10, 11, 37, 59, 60])
def test_a_resumed_flow_has_the_same_bits(pictures, tmp_path, step):
    recipe = replace(FLOW, loss="bce", weights="fp16", init="principal", sample_variance=0.3)
    whole = trained(pictures, recipe)
    with pytest.raises(TrainingInterruptedError):
        trained(pictures, recipe, state=tmp_path / "s", callback=StopAt(step))
    resumed = trained(pictures, recipe, state=tmp_path / "s")
    assert resumed.history == whole.history and resumed.card == whole.card
    assert model_hash(resumed.model) == model_hash(whole.model)


def test_a_state_with_another_measure_is_measured_anew(pictures, tmp_path, monkeypatch):
    """One of an earlier version, whose measure was always less: no later weights would ever be the best."""
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "MEASURE", "another")
        patch.setattr(training_run, "held_out_measure", lambda *_: 1e-9)
        with pytest.raises(TrainingInterruptedError):
            trained(pictures, state=tmp_path / "s", callback=StopAt(20))
    with pytest.warns(UserWarning, match="measured the best weights in another way"):
        resumed = train(pictures, spec=SPEC, recipe=FLOW, seed=3, state=tmp_path / "s")
    assert resumed.card.recipe["best_step"] > 20
    assert model_hash(resumed.model) == model_hash(trained(pictures).model)


def test_a_run_goes_on_in_the_precision_that_it_was_begun_with(pictures, tmp_path, monkeypatch):
    """Also where it would now be chosen otherwise, as on another processor."""
    recipe = replace(FLOW, precision="auto")
    in_bf16 = trained(pictures, replace(FLOW, precision="bf16"))
    in_fp32 = trained(pictures)
    assert model_hash(in_bf16.model) != model_hash(in_fp32.model)
    monkeypatch.setattr(training_run, "faster_precision", lambda *_: "bf16")
    with pytest.raises(TrainingInterruptedError):
        trained(pictures, recipe, state=tmp_path / "s", callback=StopAt(20))
    monkeypatch.setattr(training_run, "faster_precision", lambda *_: "fp32")
    resumed = trained(pictures, recipe, state=tmp_path / "s")
    assert resumed.card.recipe["computed_in"] == "bf16" and resumed.card.recipe["precision"] == "auto"
    assert model_hash(resumed.model) == model_hash(in_bf16.model)
    assert model_hash(trained(pictures, recipe).model) == model_hash(in_fp32.model)


def test_weights_are_judged_as_they_are_stored(pictures, tmp_path):
    result = trained(pictures, replace(FLOW, weights="fp16"))
    path = tmp_path / "half.safetensors"
    stored = save_checkpoint(path, result.model, result.card)
    checkpoint = load_checkpoint(path)
    assert stored == model_hash(result.model) == checkpoint.model_hash, "what was trained is what is read"
    assert all(tensor.dtype == torch.float32 for tensor in checkpoint.model.state_dict().values())
    full = trained(pictures)
    assert save_checkpoint(tmp_path / "full.safetensors", full.model, full.card) != stored
    n_bytes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("half", "full")]
    assert n_bytes[1] - n_bytes[0] > 1.8 * SPEC.n_parameters
    run = TrainingRun(pictures, SPEC, FLOW, 3, CPU)
    assert result.card.final_loss == pytest.approx(training_run.held_out_measure(run.fixed, checkpoint.model), rel=1e-6)


def test_a_checkpoint_answers_for_its_request_and_is_sampled_as_it_says(pictures, tmp_path):
    recipe = replace(FLOW, weights="fp16", precision="auto")
    result = trained(pictures, recipe)
    save_checkpoint(tmp_path / "x.safetensors", result.model, result.card)
    checkpoint = load_checkpoint(tmp_path / "x.safetensors")
    assert request_of(checkpoint) == training_request(pictures, spec=SPEC, recipe=recipe, seed=3)
    assert checkpoint.card == result.card
    options = {"n_chains": 5, "engine": "reference", "device": "cpu"}
    usual = fast_sample(checkpoint, **options)
    assert torch.equal(usual.draws, fast_sample(result.model, **FLOW_SAMPLING, **options).draws)
    settings = checkpoint.card.settings(n_draws=2)
    assert settings == {**FLOW_SAMPLING, "n_draws": 2}
    kaleidoscope = checkpoint.card.settings(sampler="kaleidoscope", n_draws=1)
    assert "steps" not in kaleidoscope and kaleidoscope["sampler"] == "kaleidoscope"
    assert fast_sample(result.model, **settings, **options).draws.shape == (5, 2, 16)
    fast_sample(result.model, **kaleidoscope, **options)


@pytest.mark.parametrize(
    ("sampling", "text"),
    [
        ({"sampler": "flow", "jitter": 0.3}, "jitter 0.3 with sampler 'flow'"),
        ({"steps": 20}, "steps 20 with sampler 'kaleidoscope'"),
        ({"sampler": "flow", "noise_from": 0.1, "noise_to": 0.2}, "noise_to is 0.2"),
        ({"sampler": "flow", "steps": 0}, "steps is 0"),
        ({"sampler": "flows"}, "flows"),
        ({"step": 3}, "step"),
    ],
)
def test_settings_that_no_run_could_follow_are_not_recommended(pictures, sampling, text):
    with pytest.raises(InputError) as caught:
        train(pictures, spec=SPEC, recipe=FLOW, sampling=sampling)
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_a_loss_that_is_not_finite_is_refused(pictures):
    with pytest.raises(InputError, match=r"training diverged: after .* lower learning_rate"):
        broken = KaleidoMLP(SPEC)
        with torch.no_grad():
            broken.linears[0].weight.fill_(torch.inf)
        run = TrainingRun(pictures, SPEC, FLOW, 0, CPU)
        run.model.load_state_dict(broken.state_dict())
        while True:
            run.advance()
