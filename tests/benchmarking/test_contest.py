"""Contestants: what they start from, and what is refused."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from kaleido_fast.benchmarking import contest
from kaleido_fast.errors import InputError

from conftest import random_mlp  # isort: skip
from small_bench import CPU


def test_start_states_do_not_depend_on_how_many_are_made(monkeypatch):
    model = random_mlp(6, 9, 6)
    assert torch.equal(contest.start_states(model, 100, CPU)[:7], contest.start_states(model, 7, CPU))


def test_a_peer_that_gives_nan_or_another_shape_is_refused():
    model = random_mlp(4, 5, 4)
    z0 = contest.start_states(model, 8, CPU)
    expected = contest.reference_states(model, z0)
    for wrong, text in ((lambda z, n: z * torch.nan, "by nan"), (lambda z, n: z[:, :2], "shape")):
        with pytest.raises(InputError, match=text):
            contest.check_contestant(contest.Contestant(wrong), z0, expected, model.spec.n_layers)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_engines_run_on_their_public_path_and_report_packing_apart(engine):
    if engine == "cpu" and importlib.util.find_spec("numba") is None:
        pytest.skip("the cpu engine needs numba")
    model = random_mlp(6, 11, 6)
    z0 = contest.start_states(model, 20, CPU)
    entry = contest.engine_contestant(model, engine, "fp32", CPU)
    found = contest.check_contestant(entry, z0, contest.reference_states(model, z0), model.spec.n_layers)
    assert found.error < 1e-5, str(found)
    assert entry.uncounted() > 0
    assert contest.resolve_engine(model, engine, "fp32", CPU) == engine


def test_references_are_computed_once_and_any_number_of_rows_is_given(monkeypatch):
    model, made = random_mlp(4, 5, 4), []
    z0 = contest.start_states(model, 8, CPU)
    compute = contest.reference_states
    monkeypatch.setattr(contest, "reference_states", lambda *args, **more: made.append(args) or compute(*args, **more))
    references = contest.References(model, z0)
    whole = references.states("fp32", {}, 8)
    for rows in (8, 3, 3):
        part = references.states("fp32", {}, rows)
        assert all(torch.equal(a[:rows], b) for a, b in zip(whole, part, strict=True))
    assert len(made) == 1
    assert all(len(one) == 5 for one in references.states("bf16", {}, 5)) and len(made) == 2
