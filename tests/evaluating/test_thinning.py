"""How far apart draws of a chain have to be: measured on networks whose mixing is known."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from kaleido_fast import KaleidoMLP, fast_sample, load_checkpoint, save_checkpoint
from kaleido_fast.checkpoint import ModelCard
from kaleido_fast.cli import cli
from kaleido_fast.evaluating.thinning import N_CHAINS, N_DRAWS, main, measure_thin, thin_problem, with_thin
from kaleido_fast.model import ModelSpec, model_hash
from kaleido_fast.presets import TrainingRecipe
from kaleido_fast.reading.datasets import Dataset
from kaleido_fast.training.trainer import SlowMixingWarning, UnstableModelWarning, train

JITTERED = {"burn_in": 99, "jitter": 0.01, "settle": 2}  # small enough for tanh to be straight


def map_of(slope: float, dim: int = 3) -> KaleidoMLP:
    """x <- tanh(slope x): near 0 an autoregression; above a slope of 1, two places a value for noise to leave."""
    model = KaleidoMLP(ModelSpec((dim, dim)))
    with torch.no_grad():
        model.linears[0].weight.copy_(slope * torch.eye(dim))
        model.linears[0].bias.zero_()
    return model.eval()


def test_a_contraction_needs_the_steps_that_theory_says():
    """Draws are an autoregression of 0.9^thin: half of them are effective from 10.4 steps on."""
    found = measure_thin(map_of(0.9), JITTERED)
    assert found.mixes
    assert 10 <= found.thin <= 14, found
    assert (found.settle, found.jitter) == (2, 0.01)
    for thin, share in found.tried.items():
        assert share == pytest.approx((1 - 0.9**thin) / (1 + 0.9**thin), abs=0.12), thin
    quick = measure_thin(map_of(0.2), JITTERED)
    assert quick.thin == 6 and list(quick.tried) == [6], "the shortest that is tried"
    more = measure_thin(map_of(0.9), {**JITTERED, "settle": 9})
    assert more.mixes and more.thin > 9


def test_what_is_recommended_holds_in_a_run_of_the_caller(tmp_path):
    model = map_of(0.9)
    save_checkpoint(
        tmp_path / "m.safetensors",
        model,
        with_thin(ModelCard(sampling=JITTERED), measure_thin(model, JITTERED).to_dict()),
    )
    assert fast_sample(tmp_path / "m.safetensors", n_chains=64, n_draws=50, seed=5).stats.mixing.r_hat < 1.05


def test_a_network_that_does_not_mix_says_so_and_gives_no_false_hope():
    found = measure_thin(map_of(2.0), JITTERED)
    assert not found.mixes
    assert found.thin == 2 + 128 == max(found.tried)
    facts = found.to_dict()
    json.dumps(facts, allow_nan=False)
    assert facts["mixes"] is False and facts["r_hat"] > 2
    assert "do not become independent within 130 steps at jitter 0.01" in thin_problem(facts)
    card = with_thin(ModelCard(sampling=JITTERED), facts)
    assert card.sampling["thin"] == 130 and card.diagnostics["mixing"]["mixes"] is False


@pytest.mark.parametrize("sampling", [{}, {"burn_in": 99, "jitter": 0.0, "tol": 1e-4}])
def test_chains_without_jitter_are_not_measured(sampling):
    assert measure_thin(map_of(0.5), sampling) is None
    assert thin_problem(None) is None
    old = ModelCard(sampling=sampling, diagnostics={"max_error": 1.0, "mixing": {"thin": 9}})
    assert with_thin(old, None).diagnostics == {"max_error": 1.0}


def test_the_measure_is_cheap_and_stops_when_it_has_found(monkeypatch):
    steps = []

    def counting(model, **options):
        result = fast_sample(model, **options)
        steps.append(result.stats.chain_steps)
        return result

    monkeypatch.setattr("kaleido_fast.evaluating.thinning.fast_sample", counting)
    measure_thin(map_of(2.0), JITTERED)
    assert len(steps) == 6
    assert sum(steps) == N_CHAINS * sum(99 + N_DRAWS * (2 + jittered) for jittered in (4, 8, 16, 32, 64, 128))


def test_the_module_puts_the_measure_on_a_card_and_leaves_weights_alone(tmp_path, capsys):
    path = tmp_path / "m.safetensors"
    model = map_of(0.5)
    save_checkpoint(path, model, ModelCard("m", sampling=JITTERED))
    before = path.read_bytes()
    assert main([str(path)]) == 0
    assert path.read_bytes() == before
    assert main([str(path), "--write"]) == 0
    written = load_checkpoint(path)
    assert written.model_hash == model_hash(model)
    assert written.card.sampling == {**JITTERED, "thin": written.card.diagnostics["mixing"]["thin"]}
    again = path.read_bytes()
    assert main([str(path), "--write"]) == 0
    assert path.read_bytes() == again, "the same bytes each time"
    capsys.readouterr()
    save_checkpoint(path, model, ModelCard("m"))
    assert main([str(path)]) == 2
    assert "recommends no jitter" in capsys.readouterr().err


@pytest.fixture
def points() -> Dataset:
    generator = torch.Generator().manual_seed(3)
    return Dataset("points", torch.rand((23, 4), generator=generator) * 1.6 - 0.8, sample_shape=(4,))


SMALL = ModelSpec((4, 16, 4))
SHORT = TrainingRecipe(steps=6, batch_size=16, learning_rate=1e-2, noise=0.3, warmup=2)


def test_the_trainer_recommends_what_it_has_measured(points):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnstableModelWarning)
        result = train(points, spec=SMALL, recipe=SHORT)
    card = result.card
    assert card.sampling["jitter"] == 0.375
    want = measure_thin(result.model, {name: card.sampling[name] for name in ("burn_in", "jitter", "settle")})
    assert card.diagnostics["mixing"] == want.to_dict()
    assert card.sampling["thin"] == want.thin > card.sampling["settle"]
    assert ModelCard.from_json(card.to_json()) == card


def test_settings_can_be_given_and_a_network_that_does_not_mix_warns(points):
    two = Dataset("two", torch.tensor([[0.8], [-0.8]]).expand(2, 4).contiguous(), sample_shape=(4,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnstableModelWarning)
        with pytest.warns(SlowMixingWarning, match="do not become independent within 130 steps at jitter 0.01"):
            result = train(two, spec=SMALL, recipe=replace(SHORT, steps=200), sampling=JITTERED)
        assert any("independent" in text for text in result.warnings)
        assert result.card.diagnostics["mixing"]["mixes"] is False
        assert train(points, spec=SMALL, recipe=SHORT, sampling={}).card.sampling == {}


def test_the_end_table_of_training_says_how_draws_mix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("sklearn")
    arguments = [
        "train",
        "--preset",
        "digits",
        "--recipe",
        "attractors",
        "--steps",
        "2",
        "--hidden",
        "8",
        "--limit",
        "600",
        "--out",
        "m.safetensors",
    ]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "mixing       draws" in done.output
    card = load_checkpoint("m.safetensors").card
    assert set(card.sampling) == {"burn_in", "thin", "jitter", "settle"}
    assert card.sampling["jitter"] == 0.5 == card.diagnostics["mixing"]["jitter"]


@pytest.mark.slow
def test_the_card_of_the_bundled_digits_holds_what_is_measured():
    checkpoint = load_checkpoint("attractors")
    found = measure_thin(checkpoint.model, checkpoint.card.sampling)
    assert found.thin == checkpoint.card.sampling["thin"]
    assert found.to_dict()["ess_share"] == pytest.approx(checkpoint.card.diagnostics["mixing"]["ess_share"], rel=0.2)
