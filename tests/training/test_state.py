"""The state of an unfinished training: exact, and refused where it is damaged or of another run."""

from __future__ import annotations

from dataclasses import replace

import earlier
import pytest
import torch
from conftest import assert_states_close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_training import SHORT, SMALL, StopAt

from kaleido_fast.errors import InputError
from kaleido_fast.model import ModelSpec, model_hash
from kaleido_fast.progress import TrainingProgress
from kaleido_fast.reading.datasets import Dataset
from kaleido_fast.training.loop import TrainingInterruptedError
from kaleido_fast.training.trainer import train

pytestmark = pytest.mark.filterwarnings("ignore::kaleido_fast.training.trainer.UnstableModelWarning")


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


def test_an_unfinished_training_of_an_earlier_version_goes_on(tmp_path):
    earlier.unpack(tmp_path)
    steps: list[int] = []
    whole = earlier.train_points(tmp_path)
    state = tmp_path / earlier.STATE
    continued = earlier.train_points(tmp_path, state=state, callback=lambda state: steps.append(state.step))
    assert steps == list(range(13, earlier.RECIPE["steps"] + 1))
    assert [entry.step for entry in continued.history] == [entry.step for entry in whole.history]
    for name, tensor in whole.model.state_dict().items():  # to the bit on the machine that began it
        assert_states_close(continued.model.state_dict()[name], tensor, atol=1e-5, what=name)
