"""`kaleido-fast evaluate`: what it compares with what, on models whose attractors are known; bad input."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import call, random_mlp
from PIL import Image

from kaleido_fast import InputError, KaleidoMLP, ModelCard, ModelSpec, load_checkpoint, load_dataset, save_checkpoint
from kaleido_fast.errors import SamplerWarning
from kaleido_fast.evaluating.attractors import recovered
from kaleido_fast.evaluating.diagnostics import stable_examples
from kaleido_fast.evaluating.evaluation import FLOW_NOTE, REAL, SAMPLES, WITHOUT_JITTER, evaluate
from kaleido_fast.evaluating.reference import Reference, find_reference
from kaleido_fast.evaluating.sheet import look_sheet
from kaleido_fast.presets import find_preset
from kaleido_fast.showing.pictures import image_grid
from kaleido_fast.training.trainer import train


def four_corners(low: float = -0.5, high: float = 0.5) -> KaleidoMLP:
    """A map of the square that sends each quadrant to a corner of a smaller square: steep hidden tanh."""
    model = KaleidoMLP(ModelSpec((2, 2, 2), activation="tanh"))
    ends = torch.atanh(torch.tensor([low, high]))
    with torch.no_grad():
        first, last = model.linears
        first.weight.copy_(400 * torch.eye(2))
        first.bias.zero_()
        last.weight.copy_(float(ends[1] - ends[0]) / 2 * torch.eye(2))
        last.bias.fill_(float(ends.sum()) / 2)
    return model.eval()


CORNERS = torch.tensor([[x, y] for x in (-0.5, 0.5) for y in (-0.5, 0.5)])


def run(monkeypatch, capsys, *args: object) -> tuple[int, str, str]:
    return call(monkeypatch, capsys, "evaluate", *args)


def test_recovery_of_known_basins():
    """From a corner of (0.5, 0.5) a normal step of sigma stays in its quadrant with probability Phi(0.5 / sigma)^2."""
    model = four_corners()
    examples = CORNERS.repeat(500, 1)
    assert recovered(model, examples, 0.0).all()
    for sigma in (0.1, 0.5, 1.0):
        inside = 0.5 * (1 + torch.erf(torch.tensor(0.5 / sigma / 2**0.5)))
        assert float(recovered(model, examples, sigma).double().mean()) == pytest.approx(float(inside**2), abs=0.05)
    assert not recovered(model, torch.tensor([[0.1, 0.1]]), 0.0).any()


def test_recovery_without_noise_is_stability():
    model = random_mlp(4, 16, 4, scale=1.5, seed=3)
    examples = torch.rand((60, 4), generator=torch.Generator().manual_seed(0)) * 2 - 1
    ends = examples
    for _ in range(400):
        ends = model(ends).detach()
    examples = torch.cat([examples, ends])
    assert torch.equal(recovered(model, examples, 0.0), stable_examples(model, examples))


def test_recovery_of_a_negative_noise_is_refused():
    with pytest.raises(InputError, match="sigma is -1"):
        recovered(four_corners(), CORNERS, -1)


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Data of 2 x 2 pictures with classes, and a model that was trained on some of them; paths of both."""
    folder = tmp_path_factory.mktemp("squares")
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.arange(400) % 4)
    images = np.full((400, 2, 2), 40.0)
    images[np.arange(400), labels // 2, labels % 2] = 200
    images = (images + generator.normal(0, 12, images.shape)).clip(0, 255).astype(np.uint8)
    np.savez(folder / "squares.npz", data=images, labels=labels)
    data = load_dataset(folder / "squares.npz", limit=300)
    recipe = find_preset("digits", "attractors").recipe
    changed = type(recipe)(**{**asdict(recipe), "steps": 250, "held_out": 50, "noise": 0.3, "batch_size": 64})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 250 steps do not make every example stable
        result = train(data, spec=ModelSpec((4, 32, 32, 4), sample_shape=(2, 2)), recipe=changed)
    save_checkpoint(folder / "squares.safetensors", result.model, result.card)
    return folder / "squares.npz", folder / "squares.safetensors"


def test_unseen_examples_are_those_left_out_and_kept_back(squares):
    data, model = squares
    found = find_reference(load_checkpoint(model), data)
    assert found.train is not None and found.held_out is not None
    assert (len(found.train), len(found.held_out), found.notes) == (250, 150, ())
    everything = load_dataset(data)
    together = torch.cat((found.train.data, found.held_out.data))
    labels = torch.cat((found.train.labels, found.held_out.labels))
    assert sorted(map(tuple, torch.cat((together, labels[:, None]), 1).tolist())) == sorted(
        map(tuple, torch.cat((everything.data, everything.labels[:, None]), 1).tolist())
    )
    limited, kept = load_dataset(data, limit=300).split(50)
    assert torch.equal(found.train.data, limited.data) and torch.equal(found.held_out.data[:50], kept.data)


def test_every_figure_of_a_model_of_pictures(squares):
    data, model = squares
    checkpoint = load_checkpoint(model)
    reference = find_reference(checkpoint, data)
    found = evaluate(checkpoint, reference, n_chains=200, sampling={"burn_in": 20, "jitter": 0.3}, sigmas=(0.05, 2.0))
    assert list(found.sets) == [SAMPLES, WITHOUT_JITTER, REAL]
    assert found.runs[SAMPLES]["jitter"] == 0.3 and found.runs[WITHOUT_JITTER]["jitter"] == 0
    assert found.runs[WITHOUT_JITTER]["burn_in"] == 299
    for scores in found.sets.values():
        assert None not in (scores.coverage, scores.nearest, scores.authentic, scores.blank, scores.entropy)
        assert sum(scores.class_shares.values()) == pytest.approx(1)
    real = found.sets[REAL]
    assert real.precision > 0.9 and real.coverage > 0.9 and real.entropy > 0.99 and real.copying_z is None
    assert found.recovery["0.05"] >= found.recovery["2"]
    assert found.compared_with == "held-out examples" and found.n_compared == 150
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_flow_is_not_judged_by_attractors(squares, tmp_path):
    data, model = squares
    trained = load_checkpoint(model)
    card = replace(trained.card, sampling={"sampler": "flow", "steps": 3})
    save_checkpoint(tmp_path / "flow.safetensors", trained.model, card)
    checkpoint = load_checkpoint(tmp_path / "flow.safetensors")
    reference = find_reference(checkpoint, data)
    found = evaluate(checkpoint, reference, n_chains=40, classes=False)
    assert list(found.sets) == [SAMPLES, REAL]
    assert (found.stable_share, found.recovery, found.spectral_radius_median, found.mixing) == (None, {}, None, None)
    assert FLOW_NOTE in found.notes
    ran = found.runs[SAMPLES]
    assert (ran["sampler"], ran["steps"]) == ("flow", 3) and "jitter" not in ran
    with pytest.warns(SamplerWarning, match="card recommends sampler flow"):
        attracting = evaluate(checkpoint, reference, n_chains=40, classes=False, sampling={"sampler": "kaleidoscope"})
    assert list(attracting.sets) == [SAMPLES, WITHOUT_JITTER, REAL] or attracting.runs[SAMPLES]["burn_in"] >= 299
    assert attracting.stable_share is not None and FLOW_NOTE not in attracting.notes
    assert "steps" not in attracting.runs[SAMPLES]


def test_frechet_distances_of_samples_and_of_real_data(squares):
    """Held-out pictures of the same law: as many real ones come nearest, and classes=False asks for no judge."""
    data, model = squares
    checkpoint = load_checkpoint(model)
    train = load_dataset(data)
    moved = (train.data + 0.05 * torch.randn(train.data.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    reference = Reference(train, replace(train, data=moved, sha256=""))
    found = evaluate(checkpoint, reference, n_chains=150, sampling={"burn_in": 20, "jitter": 0.3})
    low, high = found.sets[REAL].frechet_range
    assert low <= found.sets[REAL].frechet <= high < found.sets[SAMPLES].frechet
    assert (found.frechet["n_taught"], found.frechet["n_compared"]) == (200, 200) and found.frechet["accuracy"] == 1
    without = evaluate(checkpoint, reference, n_chains=150, classes=False)
    assert without.frechet is None and without.sets[REAL].frechet is None
    assert without.notes == ()


def test_figures_repeat_and_follow_the_seed(squares):
    data, model = squares
    checkpoint = load_checkpoint(model)
    reference = find_reference(checkpoint, data)
    first, again, other = (
        evaluate(checkpoint, reference, n_chains=60, seed=seed, classes=False).to_dict() for seed in (1, 1, 2)
    )
    assert first == again != other


def test_command_writes_figures_and_a_sheet(squares, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data, model = squares
    status, out, err = run(monkeypatch, capsys, model, "--data", data, "--chains", 45, "--no-classes")
    assert status == 0, err
    assert "coverage" in out and "stable attractors" in out and "evaluation.png" in out and "entropy" not in out
    assert "sampling 45 chains" in err
    facts = json.loads((tmp_path / "evaluation.json").read_text())
    assert facts["n_compared"] == 150 and facts["sets"][SAMPLES]["n"] == 45
    assert (tmp_path / "evaluation.png").is_file()
    again = (model, "--data", data, "--chains", 45, "--no-classes", "--json")
    status, out, err = run(monkeypatch, capsys, *again)
    assert (status, out) == (2, "") and "evaluation.json is there already" in err
    status, out, _ = run(monkeypatch, capsys, *again, "--overwrite")
    assert json.loads(out)["sets"] == facts["sets"]


def test_sheet_has_the_nearest_example_below_each_sample(squares):
    _, model = squares
    checkpoint = load_checkpoint(model)
    spec = checkpoint.model.spec
    train_ = torch.tensor([[1.0, -1, -1, -1], [-1, -1, -1, 1]])
    samples = train_[[0, 1, 1]] * 0.9
    sheet = look_sheet(samples, train_, spec, checkpoint.card.scaling)
    rows = torch.cat((samples, train_[[0, 1, 1]]))
    assert np.array_equal(sheet, image_grid(rows, spec, checkpoint.card.scaling, columns=3))


def test_points_are_compared_with_their_training_data(tmp_path, monkeypatch, capsys):
    """Two values a sample: no sheet, no classes, nothing held out; a small k."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint("corners.safetensors", four_corners(), ModelCard())
    np.save("corners.npy", CORNERS.numpy())
    asked = ("corners.safetensors", "--data", "corners.npy", "--chains", 400, "--k", 2)
    status, out, err = run(monkeypatch, capsys, *asked)
    assert status == 0, err
    assert "100% are stable attractors" in out and "note: no held-out examples" in out
    assert "does not say what it was trained on" in " ".join(out.split())
    assert not (tmp_path / "evaluation.png").exists()
    scores = json.loads((tmp_path / "evaluation.json").read_text())["sets"][SAMPLES]
    assert scores["coverage"] == scores["precision"] == 1 and scores["nearest"]["100%"] < 1e-6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--k": 400}, "k = 400 neighbours"),
        ({"--data": "unlabelled.npy", "--classes": None}, "no labels"),
        ({"--data": "other.npy"}, "not what"),
        ({"--data": "large.npy"}, "examples of shape (3, 3)"),
        ({"--data": "nowhere.npy"}, "does not exist"),
        ({"--data": None}, "not at hand"),
        ({"--sigma": -0.5}, "sigma is -0.5"),
        ({"--out": "no/where.json"}, "does not exist"),
        ({"--chains": 3}, "k = 5 neighbours among"),
        ({"--jitter": "nan"}, "jitter"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(squares, tmp_path, monkeypatch, capsys, change, said):
    monkeypatch.chdir(tmp_path)
    data, model = squares
    images = np.load(data)["data"]
    np.save("unlabelled.npy", images)
    np.save("other.npy", images[::-1])
    np.save("large.npy", np.zeros((400, 3, 3), np.uint8))
    asked: dict[str, object] = {"--data": data, "--chains": 30, **change}
    dropped = [name for name, value in asked.items() if value is None and name == "--data"]
    words = [word for name, value in asked.items() if name not in dropped for word in (name, value) if word is not None]
    status, _, err = run(monkeypatch, capsys, model, *words)
    lines = [line for line in err.splitlines() if line.startswith("kaleido-fast: ")]
    assert status == 2 and len(lines) == 1 and said in lines[0], err
    assert "Traceback" not in err and not (tmp_path / "evaluation.json").exists()


def test_a_sheet_of_points_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("corners.safetensors", four_corners(), ModelCard())
    np.save("corners.npy", CORNERS.numpy())
    status, _, err = run(monkeypatch, capsys, "corners.safetensors", "--data", "corners.npy", "--sheet", "a.png")
    assert status == 2 and "not pictures" in err and "show" in err


def test_a_value_range_is_that_of_held_out_examples_beside_known_data(tmp_path):
    pytest.importorskip("sklearn")
    images = np.random.default_rng(0).random((20, 8, 8))
    np.save(tmp_path / "unseen.npy", images)
    found = find_reference(load_checkpoint("digits"), held_out=tmp_path / "unseen.npy", value_range=(0, 1))
    assert found.train is not None and len(found.train) == 1297
    assert found.held_out is not None
    assert np.allclose(found.held_out.data.numpy(), images.reshape(20, 64) * 2 - 1, atol=1e-6)


def test_samples_that_are_nan_are_named(squares, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data, model = squares
    checkpoint = load_checkpoint(model)
    with torch.no_grad():
        checkpoint.model.linears[0].weight.fill_(3e38)
        checkpoint.model.linears[1].weight.fill_(3e38)
        checkpoint.model.linears[2].weight.copy_(torch.tensor([1.0, -1.0]).repeat(4, 16))
    save_checkpoint("huge.safetensors", checkpoint.model, checkpoint.card)
    status, _, err = run(monkeypatch, capsys, "huge.safetensors", "--data", data, "--chains", 30, "--no-classes")
    assert status == 2 and "of 30 samples hold NaN or infinite values" in err and "Traceback" not in err
    assert not (tmp_path / "evaluation.json").exists()


def test_held_out_alone(squares, tmp_path, monkeypatch):
    """Without training data: no distances to it, and it is said."""
    data, model = squares
    found = find_reference(load_checkpoint(model), held_out=data)
    assert found.train is None and len(found.held_out) == 400
    measured = evaluate(load_checkpoint(model), found, n_chains=50)
    assert measured.sets[SAMPLES].nearest is None and measured.stable_share is None and REAL not in measured.sets
    assert any("no training data" in note for note in measured.notes)


def test_colour_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(1)
    np.save("colours.npy", generator.integers(0, 256, (60, 2, 3, 3), dtype=np.uint8))
    save_checkpoint("c.safetensors", random_mlp(18, 9, 18, sample_shape=(2, 3, 3)), ModelCard())
    status, _, err = run(monkeypatch, capsys, "c.safetensors", "--data", "colours.npy", "--chains", 20)
    assert status == 0, err
    facts = json.loads((tmp_path / "evaluation.json").read_text())
    assert facts["sets"][SAMPLES]["blob"] is not None and facts["sets"][SAMPLES]["entropy"] is None
    assert Image.open(tmp_path / "evaluation.png").mode == "RGB"
