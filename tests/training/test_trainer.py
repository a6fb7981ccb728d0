"""The trainer: toy presets succeed, runs resume exactly, the best weights are kept, unsuitable input is refused."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kaleido_fast.checkpoint import load_checkpoint, save_checkpoint
from kaleido_fast.errors import InputError
from kaleido_fast.evaluating.diagnostics import Diagnostics, diagnose, growth_rates, spectral_radii, stable_examples
from kaleido_fast.model import KaleidoMLP, ModelSpec, model_hash
from kaleido_fast.presets import PRESETS, PUBLISHED_RECIPE, TrainingRecipe
from kaleido_fast.progress import TrainingProgress
from kaleido_fast.reading.datasets import Dataset, load_dataset
from kaleido_fast.sampling import fast_sample
from kaleido_fast.training.loop import TrainingInterruptedError
from kaleido_fast.training.recipe import default_recipe, default_spec, find_recipe, recommended_sampling
from kaleido_fast.training.run import Batches, TrainingRun, corrupt, initialise, learning_rate, stream_seed
from kaleido_fast.training.trainer import UnstableModelWarning, train

SMALL = ModelSpec((5, 17, 13, 5))
SHORT = TrainingRecipe(steps=60, batch_size=7, learning_rate=2e-3, noise=0.3, warmup=10)

pytestmark = pytest.mark.filterwarnings("ignore::kaleido_fast.training.trainer.UnstableModelWarning")


@pytest.fixture
def points() -> Dataset:
    """23 points in 5 dimensions."""
    data = torch.rand((23, 5), generator=torch.Generator().manual_seed(3)) * 1.6 - 0.8
    return Dataset("points", data)


class StopAt:
    """A callback that acts like Ctrl-C after a step."""

    def __init__(self, step: int, attempt: int = 0) -> None:
        self.step, self.attempt = step, attempt

    def __call__(self, progress: TrainingProgress) -> None:
        if (progress.attempt, progress.step) == (self.attempt, self.step):
            raise KeyboardInterrupt


# --- presets


@pytest.mark.parametrize(("name", "seed"), [("points1d", 0), ("points1d", 1), ("points2d", 0), ("points2d", 12345)])
def test_toy_presets_from_any_seed(name, seed, tmp_path):
    """All four points are stable, and chains from noise end on all of them and nowhere else."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnstableModelWarning)
        result = train(preset=name, seed=seed)
    figures = result.card.diagnostics
    assert figures["max_error"] < 0.02
    assert figures["spectral_radius_max"] < 1
    assert figures["stable_share"] == 1
    assert result.warnings == ()
    save_checkpoint(tmp_path / "toy.safetensors", result.model, result.card)
    final = fast_sample(tmp_path / "toy.safetensors", n_chains=200, seed=seed).final
    targets = load_dataset(PRESETS[name].dataset, bound=PRESETS[name].network.bound).data
    distance, nearest = torch.cdist(final.float(), targets).min(dim=1)
    assert float(distance.max()) < 0.03, f"chain {int(distance.argmax())} ended {float(distance.max())} off all points"
    shares = nearest.bincount(minlength=4) / 200
    assert float(shares.min()) > 0.05, f"basins hold {shares.tolist()}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["points1d", "points2d"])
@pytest.mark.parametrize("seed", range(2, 12))
def test_toy_presets_from_many_seeds(name, seed, tmp_path):
    test_toy_presets_from_any_seed(name, seed, tmp_path)


def test_attempts_go_on_until_accepted(points):
    """A recipe that cannot succeed uses all of its attempts, each with weights of its own."""
    result = train(points, spec=SMALL, recipe=replace(SHORT, steps=5, attempts=3))
    assert result.card.recipe["attempt"] == 2
    assert [entry.attempt for entry in result.history] == [0] * 5 + [1] * 5 + [2] * 5
    assert len({entry.held_out for entry in result.history}) == 15
    assert len(result.warnings) == 1


def test_every_preset_fits_its_data_and_network():
    for name, preset in PRESETS.items():
        assert preset.network.widths[0] == preset.network.widths[-1] == int(np.prod(preset.network.sample_shape)), name
        assert find_recipe(name) == preset.recipe


# --- same seed, same bits


def test_same_seed_same_bits_and_global_random_state_untouched(points):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = train(points, spec=SMALL, recipe=replace(SHORT, pair_mix=0.3, held_out=6), seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    np.random.seed(3)
    second = train(points, spec=SMALL, recipe=replace(SHORT, pair_mix=0.3, held_out=6), seed=5)
    assert model_hash(first.model) == model_hash(second.model)
    assert first.history == second.history
    assert first.card == second.card
    other = train(points, spec=SMALL, recipe=replace(SHORT, pair_mix=0.3, held_out=6), seed=6)
    assert model_hash(first.model) != model_hash(other.model)


@pytest.mark.parametrize("step", [1, 17, 59, 60])
def test_resume_is_exact(points, tmp_path, step):
    recipe = replace(SHORT, pair_mix=0.3, held_out=6)
    whole = train(points, spec=SMALL, recipe=recipe, seed=9)
    state = tmp_path / "run.training"
    with pytest.raises(TrainingInterruptedError) as caught:
        train(points, spec=SMALL, recipe=recipe, seed=9, state=state, callback=StopAt(step))
    assert (caught.value.step, caught.value.steps, caught.value.state) == (step, 60, state)
    resumed = train(points, spec=SMALL, recipe=recipe, seed=9, state=state)
    assert resumed.history == whole.history
    assert resumed.card == whole.card
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_resume_in_a_later_attempt(points, tmp_path):
    recipe = replace(SHORT, steps=12, attempts=3)
    whole = train(points, spec=SMALL, recipe=recipe)
    for stop in (StopAt(5, attempt=1), StopAt(3, attempt=2)):
        with pytest.raises(TrainingInterruptedError):
            train(points, spec=SMALL, recipe=recipe, state=tmp_path / "s", callback=stop)
    resumed = train(points, spec=SMALL, recipe=recipe, state=tmp_path / "s")
    assert resumed.history == whole.history
    assert model_hash(resumed.model) == model_hash(whole.model)


def test_finished_state_trains_no_further(points, tmp_path):
    first = train(points, spec=SMALL, recipe=SHORT, state=tmp_path / "s")
    steps: list[TrainingProgress] = []
    second = train(points, spec=SMALL, recipe=SHORT, state=tmp_path / "s", callback=steps.append)
    assert steps == []
    assert second.card == first.card


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_signal_stops_between_steps(points, tmp_path, number, word):
    assert threading.current_thread() is threading.main_thread()

    def interrupt(progress: TrainingProgress) -> None:
        if progress.step == 11:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    text = rf"{word} after 1[12] of 60 training steps; run the same"
    with pytest.raises(TrainingInterruptedError, match=text) as caught:
        train(points, spec=SMALL, recipe=SHORT, state=tmp_path / "s", callback=interrupt)
    assert caught.value.terminated is (number == signal.SIGTERM)
    assert signal.getsignal(number) is before
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_clock_and_host_name_have_no_effect(points, tmp_path, monkeypatch):
    whole = train(points, spec=SMALL, recipe=SHORT)
    with pytest.raises(TrainingInterruptedError):
        train(points, spec=SMALL, recipe=SHORT, state=tmp_path / "s", callback=StopAt(20))
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    for clock in ("time.time", "time.monotonic"):
        monkeypatch.setattr(clock, lambda: 0.0)
    resumed = train(points, spec=SMALL, recipe=SHORT, state=tmp_path / "s")
    assert resumed.history == whole.history
    assert resumed.card == whole.card
    assert model_hash(resumed.model) == model_hash(whole.model)


def test_interrupt_without_state_says_so(points):
    with pytest.raises(TrainingInterruptedError, match="nothing was kept"):
        train(points, spec=SMALL, recipe=SHORT, callback=StopAt(2))


def test_states_of_other_runs_are_refused(points, tmp_path):
    with pytest.raises(TrainingInterruptedError):
        train(points, spec=SMALL, recipe=SHORT, state=tmp_path / "s", callback=StopAt(5))
    other_data = Dataset("points", points.data * 0.5)
    for change, part in (
        ({"seed": 1}, "seed was 0, now 1"),
        ({"recipe": replace(SHORT, noise=0.2)}, "recipe was"),
        ({"spec": ModelSpec((5, 17, 5))}, "network was"),
        ({"dataset": other_data}, "data was"),
    ):
        options = {"dataset": points, "spec": SMALL, "recipe": SHORT, "state": tmp_path / "s", **change}
        with pytest.raises(InputError, match=part):
            train(**options)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1), change=st.integers(1, 255), cut=st.booleans())
def test_damaged_states_are_refused(points, tmp_path, place, change, cut):
    whole = tmp_path / "whole"
    if not whole.exists():
        with pytest.raises(TrainingInterruptedError):
            train(points, spec=SMALL, recipe=SHORT, state=whole, callback=StopAt(5))
    content = whole.read_bytes()
    at = int(place * (len(content) - 1))
    damaged = content[:at] if cut else content[:at] + bytes([content[at] ^ change]) + content[at + 1 :]
    (tmp_path / "damaged").write_bytes(damaged)
    with pytest.raises(InputError) as caught:
        train(points, spec=SMALL, recipe=SHORT, state=tmp_path / "damaged")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "damaged").read_bytes() == damaged


# --- best weights


def test_kept_weights_are_those_of_the_least_held_out_error(points):
    """A learning rate far too high at the end of no schedule makes the last weights worse than earlier ones."""
    recipe = replace(SHORT, steps=200, learning_rate=0.05, schedule="constant", held_out=6)
    result = train(points, spec=SMALL, recipe=recipe, seed=1)
    errors = [entry.held_out for entry in result.history]
    best = int(np.argmin(errors))
    assert best < len(errors) - 1, "the last weights were the best: this run cannot tell"
    assert result.card.final_loss == errors[best]
    assert result.card.recipe["best_step"] == result.history[best].step
    run = TrainingRun(points, SMALL, recipe, 1, torch.device("cpu"))
    with torch.no_grad():
        measured = float((result.model(run.fixed_inputs) - run.fixed_targets).square().mean())
    assert measured == pytest.approx(errors[best], rel=1e-6)


def test_held_out_examples_are_not_trained_on(points):
    train_part, held_out = points.split(6)
    assert held_out is not None
    run = TrainingRun(points, SMALL, replace(SHORT, held_out=6), 0, torch.device("cpu"))
    assert torch.equal(run.data, train_part.data)
    measured = {tuple(row) for row in run.fixed_targets.tolist()}
    assert measured == {tuple(row) for row in held_out.data.tolist()}


def test_evaluation_is_the_same_every_time_and_many_draws(points):
    run = TrainingRun(points, SMALL, SHORT, 0, torch.device("cpu"))
    again = TrainingRun(points, SMALL, SHORT, 0, torch.device("cpu"))
    assert torch.equal(run.fixed_inputs, again.fixed_inputs)
    assert len(run.fixed_inputs) >= 1000
    assert len(torch.unique(run.fixed_inputs, dim=0)) == len(run.fixed_inputs)


# --- parts


@pytest.mark.parametrize(("n", "size"), [(4, 16), (23, 7), (5, 5), (1, 3), (10, 128)])
def test_batches_are_shuffles_end_to_end(n, size):
    batches = Batches(n, size, seed=4)
    steps = 3 * n
    row = torch.cat([batches.rows(step) for step in range(steps)])
    assert len(row) == steps * size
    for epoch in row[: len(row) // n * n].view(-1, n):
        assert sorted(epoch.tolist()) == list(range(n))
    late = Batches(n, size, seed=4).rows(steps - 1)
    assert torch.equal(late, row[-size:])


def test_streams_are_apart():
    seeds = {stream_seed(seed, word, step) for seed in range(5) for word in range(5) for step in range(2000)}
    assert len(seeds) == 50_000
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_corruption(points):
    generator = torch.Generator().manual_seed(0)
    clean = points.data.repeat(400, 1)
    plain = corrupt(clean, points.data, SMALL, replace(SHORT, noise=0.0), generator)
    assert torch.equal(plain, clean)
    noisy = corrupt(clean * 0, points.data, SMALL, replace(SHORT, noise=0.1), generator)
    assert float(noisy.std()) == pytest.approx(0.1, rel=0.02)
    narrow = replace(SMALL, bound="sigmoid", low=0.0, high=1.0)
    inside = corrupt(clean.abs(), points.data, narrow, replace(SHORT, noise=2.0), generator)
    assert (float(inside.min()), float(inside.max())) == (0.0, 1.0)
    mixed = corrupt(clean, points.data, SMALL, replace(SHORT, noise=0.0, pair_mix=0.4), generator)
    reach = (mixed - clean).norm(dim=1) / torch.cdist(clean, points.data).amax(dim=1)
    assert 0.2 < float(reach.max()) <= 0.4 + 1e-6


def test_learning_rates():
    recipe = replace(SHORT, steps=1000, warmup=100, learning_rate=2.0)
    rates = [learning_rate(recipe, step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.02, rel=1e-3)
    assert np.argmax(rates) in range(95, 105)
    assert all(late < early for early, late in pairwise(rates[110:]))
    assert rates[-1] == pytest.approx(0.02, rel=0.01)
    assert {learning_rate(replace(recipe, schedule="constant", warmup=0), step) for step in (0, 500, 999)} == {2.0}


@pytest.mark.parametrize("init", ["kaiming", "default"])
def test_initialisation(init):
    model = KaleidoMLP(ModelSpec((300, 400, 500, 300)))
    initialise(model, init, seed=1)
    for i, layer in enumerate(model.linears):
        fan_in = layer.in_features
        gain = {"kaiming": 2.0 if i < 2 else 1.0, "default": 1 / 3}[init]
        assert float(layer.weight.detach().var()) == pytest.approx(gain / fan_in, rel=0.02), f"layer {i}"
        assert float(layer.bias.detach().abs().max()) <= (0 if init == "kaiming" else fan_in**-0.5)


def test_published_recipe_is_plain(points):
    """No noise, torch's own initialisation, a constant rate: the first step is that of a plain torch trainer."""
    assert find_recipe("published") == PUBLISHED_RECIPE
    recipe = replace(PUBLISHED_RECIPE, steps=3, batch_size=23)
    result = train(points, spec=SMALL, recipe=recipe, seed=2)
    model = KaleidoMLP(SMALL)
    initialise(model, "default", seed=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    for _ in range(3):  # full batches, so that their order does not matter
        optimizer.zero_grad()
        (model(points.data) - points.data).square().mean().backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    assert result.card.sampling == {}


# --- diagnostics


def linear_map(matrix: torch.Tensor) -> KaleidoMLP:
    """tanh(A x): its Jacobian at 0 is A."""
    n = len(matrix)
    model = KaleidoMLP(ModelSpec((n, n), bias=(False,)))
    with torch.no_grad():
        model.linears[0].weight.copy_(matrix)
    return model


@pytest.mark.parametrize("n", [1, 2, 33, 96])
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_spectral_radius_of_known_matrices(n, scale):
    matrix = torch.randn((n, n), generator=torch.Generator().manual_seed(n)) * scale / n**0.5
    exact = float(np.abs(np.linalg.eigvals(matrix.double().numpy())).max())
    model, origin = linear_map(matrix), torch.zeros(3, n)
    torch.testing.assert_close(spectral_radii(model, origin).float(), torch.full((3,), exact), rtol=1e-4, atol=1e-6)
    estimate = growth_rates(model, origin)
    assert float((estimate / exact - 1).abs().max()) < 0.15, f"exact {exact}, estimated {estimate.tolist()}"


def test_growth_rate_of_a_rotation():
    """A complex pair: lengths under one product swing between 0.09 and 8.1, the radius is 0.9."""
    matrix = torch.tensor([[0.0, 8.1], [-0.1, 0.0]])
    assert float(growth_rates(linear_map(matrix), torch.zeros(1, 2))) == pytest.approx(0.9, rel=0.02)


def test_zero_jacobian():
    assert float(growth_rates(linear_map(torch.zeros(3, 3)), torch.zeros(2, 3)).max()) < 1e-30
    assert float(spectral_radii(linear_map(torch.zeros(3, 3)), torch.zeros(2, 3)).max()) == 0


def test_large_models_are_measured_without_their_jacobian():
    digits = linear_map(torch.eye(200) * 0.7)
    figures = diagnose(digits, torch.zeros(5, 200))
    assert figures.spectral_radius_median == pytest.approx(0.7, rel=1e-4)


def test_stable_examples():
    halving = linear_map(torch.eye(4) * 0.5)  # everything goes to 0
    points = torch.tensor([[0.0] * 4, [0.1] * 4, [0.5] * 4])
    assert stable_examples(halving, points).tolist() == [True, True, False]
    doubling = linear_map(torch.eye(4) * 2.0)  # 0 repels, +-0.9575 attracts
    points = torch.tensor([[0.0] * 4, [1e-3] * 4, [0.95] * 4, [-0.95] * 4])
    assert stable_examples(doubling, points).tolist() == [False, False, True, True]
    flipping = linear_map(torch.eye(4) * -2.0)  # a cycle of period 2
    assert stable_examples(flipping, torch.full((1, 4), 0.9575)).tolist() == [False]


def test_unstable_models_warn(points):
    with pytest.warns(UnstableModelWarning, match=r"model points: only \d+% of the training examples are stable"):
        result = train(points, spec=SMALL, recipe=replace(SHORT, steps=3))
    assert len(result.warnings) == 1
    assert result.card.sampling["jitter"] == pytest.approx(1.25 * 0.3)
    assert "as the recommended settings do" in result.warnings[0]
    stable = Diagnostics(0.3, 0.9, 0.97, 0.01, 24, 256)
    assert stable.problem() is None
    assert recommended_sampling(SHORT, stable)["jitter"] == 0
    for bad in (replace(stable, stable_share=0.4), replace(stable, spectral_radius_median=1.2)):
        assert bad.problem() is not None


# --- the result, and bad input


def test_result_makes_a_checkpoint(points, tmp_path):
    result = train(points, spec=SMALL, recipe=SHORT)
    save_checkpoint(tmp_path / "m.safetensors", result.model, result.card)
    back = load_checkpoint(tmp_path / "m.safetensors")
    assert back.card == result.card
    assert back.card.dataset == {"name": "points", "sha256": points.sha256, "n_examples": 23}
    assert asdict(SHORT).items() <= back.card.recipe.items()
    assert not result.model.training
    assert not any(parameter.grad is not None for parameter in result.model.parameters())


def test_progress(points):
    seen: list[TrainingProgress] = []
    result = train(points, spec=SMALL, recipe=SHORT, callback=seen.append)
    assert [progress.step for progress in seen] == list(range(1, 61))
    assert {progress.steps for progress in seen} == {60}
    assert seen[-1].last == result.history[-1]
    assert seen[-1].seconds_left == 0
    assert seen[30].learning_rate == learning_rate(SHORT, 30)


def test_defaults_from_data(points):
    assert default_spec(points).widths == (5, 256, 256, 256, 256, 256, 5)
    assert default_spec(points).bound == "tanh"
    large = Dataset("large", torch.rand(3, 784), sample_shape=(28, 28))
    assert default_spec(large).widths[1] == 512
    assert default_spec(large).bound == "sigmoid"
    assert default_spec(large).sample_shape == (28, 28)
    assert default_recipe(large).pair_mix > 0
    assert default_recipe(points).pair_mix == 0


def test_training_by_path(tmp_path):
    np.save(tmp_path / "x.npy", np.linspace(-0.9, 0.9, 12).reshape(6, 2))
    result = train(tmp_path / "x.npy", spec=ModelSpec((2, 9, 2)), recipe=SHORT)
    assert result.card.dataset["name"] == "x.npy"
    assert result.card.dataset["n_examples"] == 6


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({}, "nothing to train on"),
        ({"preset": "digitz"}, "did you mean 'digits'"),
        ({"preset": "points1d", "recipe": "publishd"}, "did you mean 'published'"),
        ({"preset": "points1d", "seed": -1}, "seed"),
        ({"preset": "points1d", "seed": 2**64}, "seed"),
        ({"preset": "points1d", "seed": 1.0}, "seed"),
        ({"preset": "points1d", "device": "gpu"}, "device"),
        ({"preset": "points1d", "spec": SMALL}, "5"),
        ({"dataset": "points2d", "preset": "points1d"}, "2 values"),
        ({"preset": "points1d", "state": "."}, "folder"),
        ({"preset": "points1d", "state": "no/such/state"}, "does not exist"),
    ],
)
def test_refused_arguments(options, part):
    with pytest.raises(InputError, match=part):
        train(**options)


def test_data_outside_of_the_network_range(points):
    with pytest.raises(InputError, match="bound='sigmoid'"):
        train(points, spec=replace(SMALL, bound="sigmoid", low=0.0, high=1.0))
    with pytest.raises(InputError, match="held_out"):
        train(points, spec=SMALL, recipe=replace(SHORT, held_out=23))


RECIPE_FIELDS = {
    "steps": st.integers(max_value=0) | st.floats() | st.booleans(),
    "batch_size": st.integers(max_value=0) | st.none(),
    "warmup": st.integers(max_value=-1),
    "held_out": st.integers(max_value=-1),
    "attempts": st.integers(max_value=0),
    "learning_rate": st.floats(max_value=0) | st.floats(min_value=1, exclude_min=True) | st.text(),
    "noise": st.floats(max_value=0, exclude_max=True) | st.floats(min_value=10, exclude_min=True),
    "pair_mix": st.floats(min_value=1, exclude_min=True),
    "init": st.text(),
    "schedule": st.text(),
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(sorted(RECIPE_FIELDS)))
def test_refused_recipes(points, data, name):
    value = data.draw(RECIPE_FIELDS[name])
    with pytest.raises(InputError) as caught:
        train(points, spec=SMALL, recipe=replace(SHORT, **{name: value}))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_divergence_is_said(points):
    """Weights as large as fp32 holds give an infinite hidden layer, and NaN after it."""
    run = TrainingRun(points, SMALL, SHORT, 0, torch.device("cpu"))
    with torch.no_grad():
        for layer in run.model.linears:
            layer.weight.fill_(3e38)
    with pytest.raises(
        InputError, match=r"training diverged: after 1 steps .* held-out error nan; lower learning_rate"
    ):
        run.advance()


@pytest.mark.gpu
def test_training_on_a_gpu(points, tmp_path):
    whole = train(points, spec=SMALL, recipe=SHORT, device="cuda")
    with pytest.raises(TrainingInterruptedError):
        train(points, spec=SMALL, recipe=SHORT, device="cuda", state=tmp_path / "s", callback=StopAt(31))
    resumed = train(points, spec=SMALL, recipe=SHORT, device="cuda", state=tmp_path / "s")
    assert resumed.history == whole.history
    assert model_hash(resumed.model) == model_hash(whole.model)
