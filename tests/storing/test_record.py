"""Records: what bits depend on sets runs apart, and nothing else does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from conftest import random_mlp
from hypothesis import given
from hypothesis import strategies as st

from kaleido_fast import Scaling, fast_sample, sample_to
from kaleido_fast.planning.options import ADDED_LATER
from kaleido_fast.sampling import prepare_run
from kaleido_fast.storing.encoding import Encoding
from kaleido_fast.storing.record import as_begun, difference, make_record, planned_record, short_record, stored_record
from kaleido_fast.storing.store_metadata import read_metadata

MODEL = random_mlp(3, 5, 3)
OPTIONS: dict[str, Any] = {"n_chains": 7, "burn_in": 2, "seed": 3, "device": "cpu"}
SCALINGS = (None, Scaling(2.0, 1.0))


@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_run_is_known_by_its_record_before_it_is_run(engine, scaling):
    run = prepare_run(MODEL, **OPTIONS, engine=engine)
    result = fast_sample(MODEL, **OPTIONS, engine=engine)
    made = make_record(result, MODEL.spec, scaling)
    assert difference(made, planned_record(run, scaling)) == ""
    other = next(one for one in SCALINGS if one != scaling)
    assert difference(made, planned_record(run, other)).startswith("scaling.offset was ")
    assert short_record(made) == result.record()


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_both_kinds_of_record_agree_where_both_speak(engine):
    run = prepare_run(MODEL, **OPTIONS, engine=engine)
    stored = stored_record(run, Encoding(), None)
    made = make_record(fast_sample(MODEL, **OPTIONS, engine=engine), MODEL.spec, None)
    assert {**made, "versions": None} == {name: stored[name] for name in made} | {"versions": None}
    assert stored["versions"].items() >= made["versions"].items()


def leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all plain values in nested dictionaries."""
    if not isinstance(value, dict):
        return [path]
    return [leaf for name, inner in value.items() for leaf in leaves(inner, (*path, name))]


RECORD = stored_record(prepare_run(MODEL, **OPTIONS, engine="reference"), Encoding(), Scaling(2.0, 1.0))
IGNORED = (("format",), ("version",), ("versions", "python"), ("versions", "numpy"))


@given(st.sampled_from(leaves(RECORD)))
def test_every_value_on_which_bits_depend_sets_records_apart(path):
    changed = copy.deepcopy(RECORD)
    inner = changed
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = "something else"
    found = difference(RECORD, changed)
    if path in IGNORED:
        assert found == ""
    else:
        assert found.startswith(f"{'.'.join(path)} was ") and found.endswith("is now something else")


def test_more_than_three_differences_are_counted():
    n_stated = sum(value is not None for name, value in RECORD["request"].items() if name not in ADDED_LATER)
    assert difference(RECORD, {**RECORD, "request": {}}).endswith(f"is now None and {n_stated - 3} more")


@pytest.mark.parametrize("began", [1, 2, None])
@pytest.mark.parametrize("now", [1, None])
def test_a_run_goes_on_with_the_threads_of_its_record_where_they_count(began, now):
    """On a CPU the reference engine's bits depend on them; older records, and those of elsewhere, do not name them."""
    bare = {name: value for name, value in RECORD.items() if name != "threads"}
    stored, asked = (bare if n is None else {**bare, "threads": n} for n in (began, now))
    refused = began is not None and now is None
    assert (difference(stored, as_begun(asked, stored)) != "") == refused


def test_a_kernel_in_words_counts_as_unknown():
    """Earlier versions recorded the kernel that was planned before the weights were looked at."""
    run: dict[str, Any] = {"engine": "triton", "request": {"precision": "fp32"}}
    now, words = {**run, "kernels": {"from step 0": {"kernel": "wide", "rows": 64}}}, {"kernel": "narrow 64 chains"}
    assert difference({**run, **words}, now) == "" == difference(now, {**run, **words})
    assert difference({**run, **words, "engine": "cpu"}, now).startswith("engine was cpu")
    other = {**now, "kernels": {"from step 0": {"kernel": "wide", "rows": 128}}}
    assert difference(other, now) == "kernels.from step 0.rows was 128, is now 64"
    assert difference(run, now), "a record that says nothing of a kernel is not of an earlier version"


def test_tf32_of_an_earlier_version_does_not_go_on():
    """It rounded weights half-way between two values away from zero, not to even."""
    run = {"engine": "triton", "request": {"precision": "tf32"}}
    earlier, now = {**run, "kernel": "narrow"}, {**run, "kernels": {"from step 0": {"kernel": "narrow"}}}
    assert "tf32" in difference(earlier, now)
    assert difference(now, now) == difference(earlier, earlier) == ""


def test_records_of_networks_are_as_they_were(tmp_path):
    """Stores begun by earlier versions go on."""
    pytest.importorskip("zarr")
    sample_to(tmp_path / "a.zarr", random_mlp(3, 5, 3), n_chains=5, burn_in=1, device="cpu")
    record = read_metadata(tmp_path / "a.zarr")["record"]
    names = {"format", "version", "request", "model_hash", "engine", "device", "versions", "encoding", "model"}
    assert set(record) == names
    assert record["model_hash"] == "a41d55789fe2ee135dbe2c3da6be5cc7b5c5dfadf8acfe9ff850bb7d37d1cb88"
