"""Numbers of numpy and torch are numbers wherever Python's are; truth values are none."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from kaleido_fast import (
    Dataset,
    ModelCard,
    ModelSpec,
    SampleRequest,
    Scaling,
    Trace,
    attractors,
    fast_sample,
    load_checkpoint,
    load_dataset,
    sample_op,
    train,
)
from kaleido_fast.errors import InputError
from kaleido_fast.evaluating.attractors import recovered
from kaleido_fast.evaluating.evaluation import evaluate
from kaleido_fast.evaluating.quality import manifold_scores
from kaleido_fast.evaluating.reference import find_reference
from kaleido_fast.presets import TrainingRecipe
from kaleido_fast.scalars import plain_number

WHOLE = [np.int8, np.uint8, np.int64, np.uint64, np.array, torch.tensor]
COUNTS = ("first_chain", "burn_in", "n_draws", "thin", "seed", "settle", "patience", "check_every", "max_period")


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_numbers_of_any_library(kind):
    given = {name: kind(value) for name, value in zip(COUNTS, range(3, 12), strict=True)}
    plain = dict(zip(COUNTS, range(3, 12), strict=True))
    request = SampleRequest(kind(7), jitter=np.float32(0.5), tol=None, trace=Trace((kind(4),), (kind(2),)), **given)
    assert request == SampleRequest(7, jitter=0.5, tol=None, trace=Trace((4,), (2,)), **plain)
    assert {type(value) for value in request.as_dict().values()} <= {int, float, str, bool, type(None), dict}
    json.dumps(request.as_dict())
    assert ModelSpec((kind(4), kind(9), kind(4)), sample_shape=(kind(2), kind(2))) == ModelSpec(
        (4, 9, 4), sample_shape=(2, 2)
    )
    assert asdict(TrainingRecipe(steps=kind(5))) == asdict(TrainingRecipe(steps=5))


def test_arrays_of_whole_numbers():
    assert ModelSpec(np.array([4, 9, 4])).to_json() == ModelSpec((4, 9, 4)).to_json()
    assert Trace(np.arange(3), torch.arange(2)) == Trace((0, 1, 2), (0, 1))


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.float16(0.5), Fraction(1, 2), np.array(0.5)])
def test_real_numbers_of_any_library(value):
    assert type(plain_number(value)) is float
    assert SampleRequest(3, jitter=value, tol=None).jitter == 0.5
    assert Scaling(value, value) == Scaling(0.5, 0.5)
    assert ModelSpec((2, 2), bound="sigmoid", low=value).low == 0.5
    assert load_dataset("points1d", value_range=(-value - 1, value + 1)).scaling.scale == pytest.approx(2 / 3)


@pytest.mark.parametrize("truth", [True, False, np.True_, torch.tensor(True), np.array(False)])
def test_truth_values_are_no_numbers(truth):
    model, points = load_checkpoint("digits").model, load_dataset("points1d")
    result = fast_sample(model, n_chains=2, burn_in=0)
    for name in ("n_chains", "burn_in", "seed", "jitter", "tol", "polish"):
        with pytest.raises(InputError, match=f"{name} is"):
            SampleRequest(**{"n_chains": 1, name: truth})
        with pytest.raises(InputError, match=f"{name} is"):
            sample_op(model, **{"n_chains": 1, name: truth})
    for call in (
        lambda: ModelSpec((truth, truth)),
        lambda: load_dataset("points1d", limit=truth),
        lambda: load_dataset("points1d", value_range=(truth, 2)),
        lambda: points.split(truth),
        lambda: train(points, recipe=TrainingRecipe(steps=truth)),
        lambda: train(points, recipe=TrainingRecipe(noise=truth)),
        lambda: train(points, seed=truth),
        lambda: attractors(result, model, distance=truth),
        lambda: recovered(model, points.data, truth),
        lambda: manifold_scores(points.data, points.data, k=truth),
        lambda: Scaling(truth, 1.0),
    ):
        with pytest.raises(InputError):
            call()


def test_other_things_are_no_numbers():
    for value in ("3", 3.5, None, [3], np.array([3]), np.array("x"), 1j, np.datetime64("2020-01-01")):
        with pytest.raises(InputError, match="n_chains is"):
            SampleRequest(value)


@pytest.mark.filterwarnings("ignore::kaleido_fast.training.trainer.UnstableModelWarning")
def test_training_with_numbers_of_numpy_is_the_same_training():
    spec = ModelSpec((1, 8, 1))
    recipe = TrainingRecipe(steps=6, noise=0.25, held_out=1)
    ours = replace(recipe, steps=np.int64(6), noise=np.float32(0.25), held_out=np.uint8(1))
    plain, other = (train("points1d", spec=spec, recipe=r, seed=s) for r, s in ((recipe, 3), (ours, np.int64(3))))
    assert plain.card.to_json() == other.card.to_json()
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name


def test_evaluation_with_numbers_of_numpy_can_be_written():
    checkpoint = load_checkpoint("digits")
    small = replace(find_reference(checkpoint), train=None)
    small = replace(small, held_out=small.held_out.take(torch.arange(20)))
    found = evaluate(checkpoint, small, n_chains=np.int64(9), n_compared=np.int32(15), k=np.int64(3), seed=np.uint8(1))
    assert json.loads(json.dumps(found.to_dict()))["k"] == 3


def test_cards_hold_numbers_of_numpy():
    card = ModelCard(recipe={"noise": np.float32(0.5), "steps": np.int64(3)}, final_loss=np.float32(0.25))
    assert json.loads(card.to_json())["recipe"] == {"noise": 0.5, "steps": 3}
    with pytest.raises(InputError, match="cannot be written as JSON"):
        ModelCard(recipe={"noise": object()}).to_json()


def test_limits_and_splits_take_numbers_of_numpy():
    digits = load_dataset("digits", limit=np.int64(100))
    assert len(digits) == 100
    kept = digits.split(np.int16(30))[1]
    assert isinstance(kept, Dataset)
    assert len(kept) == 30
