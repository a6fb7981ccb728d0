"""Draws of a chain: what lies between them, what is refused, and what the end figures say of them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import random_mlp
from hypothesis import given, settings
from hypothesis import strategies as st

from kaleido_fast import InputError, fast_sample, load_checkpoint, open_draws, sample_op, sample_to
from kaleido_fast.checkpoint import ModelCard, save_checkpoint
from kaleido_fast.cli import cli
from kaleido_fast.evaluating.evaluation import evaluate
from kaleido_fast.evaluating.reference import find_reference
from kaleido_fast.names import DEFAULT_JITTERED_STEPS, NOISES
from kaleido_fast.planning.spacing import default_thin, recommended_options, refuse_copies
from kaleido_fast.sampling import prepare_run
from kaleido_fast.storing.record import make_record
from kaleido_kernels.schedule import Schedule

MODEL = random_mlp(4, 9, 4)
MEASURED = ModelCard(
    sampling={"burn_in": 7, "jitter": 0.4, "settle": 2, "thin": 12}, diagnostics={"mixing": {"thin": 12}}
)
OLD = ModelCard(sampling={"burn_in": 7, "jitter": 0.4, "settle": 2, "thin": 1})
BY_HAND = ModelCard(sampling={"burn_in": 0, "jitter": 0.4, "settle": 2, "thin": 20})

schedules = st.builds(
    Schedule,
    burn_in=st.integers(0, 9),
    n_draws=st.integers(1, 5),
    thin=st.integers(1, 9),
    settle=st.integers(0, 9),
    jitter=st.sampled_from([0.0, 0.3]),
    noise=st.sampled_from(NOISES),
)


def counted(schedule: Schedule, draw: int) -> int:
    """Jittered steps up to a draw, one by one."""
    first = 0 if draw == 0 else schedule.draw_end(draw - 1)
    if schedule.noise == "upstream" and schedule.jitter:
        return schedule.draw_end(draw) - first  # after each step
    return sum(schedule.is_jittered(step) for step in range(first, schedule.draw_end(draw)))


@given(schedules)
def test_jittered_steps_are_those_that_the_schedule_names(schedule):
    for draw in range(schedule.n_draws):
        assert schedule.jittered_steps(draw) == counted(schedule, draw), (schedule, draw)


@given(schedules)
def test_refused_is_jitter_that_no_step_between_draws_has_and_nothing_else(schedule):
    copies = schedule.n_draws > 1 and schedule.jitter > 0 and counted(schedule, 1) == 0
    given = (schedule.n_draws, schedule.thin, schedule.settle, schedule.jitter, schedule.noise)
    if not copies:
        return refuse_copies(*given)
    with pytest.raises(InputError) as refused:
        refuse_copies(*given)
    text = str(refused.value)
    assert f"max(0, {schedule.thin} - {schedule.settle}) = 0 jittered steps" in text
    assert f"thin={schedule.settle + 1} or more" in text
    refuse_copies(schedule.n_draws, schedule.settle + 1, schedule.settle, schedule.jitter, schedule.noise)
    return refuse_copies(schedule.n_draws, schedule.thin, schedule.thin - 1, schedule.jitter, schedule.noise)


@settings(max_examples=200)
@given(
    card=st.sampled_from([ModelCard(), MEASURED, OLD, BY_HAND]),
    n_draws=st.integers(1, 4),
    explicit=st.fixed_dictionaries(
        {},
        optional={
            "settle": st.integers(0, 40),
            "jitter": st.sampled_from([0.0, 0.2]),
            "noise": st.sampled_from(NOISES),
        },
    ),
)
def test_a_thin_that_nobody_passed_is_never_refused(card, n_draws, explicit):
    if explicit.get("noise") == "upstream" and explicit.get("jitter", 1):
        explicit = {**explicit, "settle": 0}  # any other is refused: that noise leaves no step clean
    options = card.settings(n_draws=n_draws, **explicit)
    request = prepare_run(MODEL, n_chains=1, **options).request
    assert request.n_draws == 1 or request.jitter == 0 or request.schedule.jittered_steps(1) > 0


def test_several_draws_lie_as_many_jittered_steps_apart_as_were_measured():
    assert MEASURED.settings(n_draws=2)["thin"] == 12
    assert MEASURED.settings(n_draws=2, settle=6)["thin"] == 16, "clean steps do not count"
    assert MEASURED.settings(n_draws=2, thin=5)["thin"] == 5
    assert MEASURED.settings()["thin"] == MEASURED.settings(n_draws=2, jitter=0.0)["thin"] == 1
    assert MEASURED.settings(n_draws=2, noise="upstream")["thin"] == 1
    assert OLD.settings(n_draws=2)["thin"] == 2 + DEFAULT_JITTERED_STEPS
    assert BY_HAND.settings()["thin"] == BY_HAND.settings(n_draws=2)["thin"] == 20
    assert BY_HAND.settings(n_draws=2, settle=20)["thin"] == 20 + DEFAULT_JITTERED_STEPS
    assert default_thin({"settle": "two", "jitter": 0.1}, 2, "normal") == 1, "the request names what is no number"


def test_one_draw_of_a_chain_does_not_wait_for_the_next(tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, MODEL, MEASURED)
    one = fast_sample(path, n_chains=5)
    assert one.stats.n_steps == 8
    assert torch.equal(one.draws, fast_sample(MODEL, n_chains=5, burn_in=7, thin=1, jitter=0.4, settle=2).draws)
    assert fast_sample(path, n_chains=5, n_draws=3).stats.n_steps == 7 + 3 * 12


@pytest.mark.parametrize("kind", [np.array, torch.tensor, np.float32])
def test_numbers_of_any_library_lie_as_far_apart(kind):
    options = {"jitter": kind(0.5), "settle": torch.tensor(3), "n_draws": np.array(4)}
    plain = {"jitter": 0.5, "settle": 3, "n_draws": 4}
    requests = [prepare_run("attractors", n_chains=2, **given).request for given in (options, plain)]
    assert requests[0] == requests[1]


def test_the_bundled_digits_give_draws_that_mix():
    card = load_checkpoint("attractors").card
    thin = card.diagnostics["mixing"]["thin"]
    assert prepare_run("attractors", n_chains=1, n_draws=50).request.thin == thin > 2
    assert prepare_run("attractors", n_chains=1, n_draws=50, settle=5).request.thin == thin + 3
    assert prepare_run("attractors", n_chains=1).request.schedule.n_steps == 20
    assert recommended_options(card.sampling, card.diagnostics)["jittered_steps"] == thin - 2


@pytest.mark.parametrize("sample", [fast_sample, sample_op], ids=["fast_sample", "sample_op"])
def test_explicit_settings_without_jitter_between_draws_are_refused(sample):
    for options in ({"thin": 2}, {"thin": 1, "settle": 1}, {"thin": 7, "settle": 9}):
        with pytest.raises(InputError, match="0 jittered steps between two draws"):
            sample(MODEL, n_chains=3, n_draws=2, jitter=0.3, **options)
    for allowed in ({"thin": 2, "n_draws": 1}, {"thin": 2, "jitter": 0.0}, {"thin": 3}, {"thin": 1, "settle": 0}, {}):
        sample(MODEL, **{"n_chains": 3, "burn_in": 1, "n_draws": 2, "jitter": 0.3, **allowed})
    drawn = sample(MODEL, n_chains=3, burn_in=1, n_draws=2, jitter=0.3, settle=4).draws
    want = sample(MODEL, n_chains=3, burn_in=1, n_draws=2, jitter=0.3, settle=4, thin=4 + DEFAULT_JITTERED_STEPS).draws
    assert torch.equal(drawn, want)


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, MODEL, MEASURED)
    return str(path)


def run(*arguments: str) -> str:
    done = CliRunner().invoke(cli, [*arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_the_command_refuses_before_anything_is_written(checkpoint, tmp_path):
    out = tmp_path / "draws.npy"
    with pytest.raises(InputError, match=r"max\(0, 2 - 2\) = 0 jittered steps"):
        run("sample", "--model", checkpoint, "--draws", "5", "--thin", "2", "--out", str(out))
    assert not list(tmp_path.glob("draws*"))


def test_the_end_table_says_how_far_apart_and_how_independent_draws_are(checkpoint, tmp_path):
    sample = ("sample", "--model", checkpoint, "--chains", "70", "--out")
    text = run(*sample, str(tmp_path / "a.npy"), "--draws", "12")
    assert "draws 12 a chain, 12 steps apart, 10 with noise" in text
    assert "mixing R-hat " in text and " of 768 draws effective" in text
    text = run(*sample, str(tmp_path / "b.npz"), "--draws", "12", "--jitter", "0")
    assert "12 a chain, 1 step apart, 0 with noise" in text
    assert "without noise they must" in text
    text = run(*sample, str(tmp_path / "c.npz"), "--draws", "3")
    assert "mixing not computed: it takes 4 draws a chain" in text
    text = run(*sample, str(tmp_path / "e.npz"), "--draws", "5", "--thin", "3")
    assert "mixing R-hat " in text and "of so few draws a chain it says little" in text
    text = run(*sample, str(tmp_path / "d.npz"), "--burn-in", "0")
    assert "mixing" not in text
    assert "1 steps, jitter 0.4 on no step: all are clean" in text


def test_figures_in_json_are_the_same_whatever_is_written(checkpoint, tmp_path):
    want = fast_sample(checkpoint, n_chains=300, n_draws=12).stats.mixing.to_dict()
    for name in ("a.npy", "a.npz"):
        out = str(tmp_path / name)
        text = run("sample", "--model", checkpoint, "--chains", "300", "--draws", "12", "--out", out, "--json")
        assert json.loads(text, parse_constant=pytest.fail)["mixing"] == want, name


def test_a_store_of_small_chunks_and_one_that_was_resumed_have_the_figures_too(checkpoint, tmp_path):
    pytest.importorskip("zarr")
    want = fast_sample(checkpoint, n_chains=5000, n_draws=12).stats.mixing
    out = tmp_path / "s.zarr"
    options = {"n_chains": 5000, "n_draws": 12}
    assert sample_to(out, checkpoint, **options).stats.mixing == want
    from kaleido_fast.storing.zarr_output import ZarrOutput

    output = ZarrOutput.open(out, writable=True)
    output.forget(output.layout.n_blocks - 1)
    assert sample_to(out, checkpoint, **options).stats.mixing == want
    rounded = sample_to(tmp_path / "u.zarr", checkpoint, dtype="uint8", **options).stats.mixing
    assert rounded != want, "of what is stored"
    assert rounded.r_hat == pytest.approx(want.r_hat, abs=0.01)


def test_draws_of_old_runs_without_jitter_between_them_are_still_read(checkpoint, tmp_path):
    result = fast_sample(checkpoint, n_chains=9, n_draws=3)
    old = replace(result.request, thin=1)
    loaded = load_checkpoint(checkpoint)
    record = make_record(replace(result, request=old), loaded.model.spec, loaded.card.scaling)
    np.save(tmp_path / "old.npy", result.draws.numpy())
    (tmp_path / "old.json").write_text(json.dumps(record))
    assert open_draws(tmp_path / "old.npy").record["request"]["thin"] == 1
    assert '"thin": 1' in run("info", str(tmp_path / "old.npy"))


def test_evaluate_says_how_draws_of_a_chain_mix(checkpoint, tmp_path):
    np.save(tmp_path / "seen.npy", np.random.default_rng(0).uniform(-1, 1, (60, 4)).astype(np.float32))
    model = load_checkpoint(checkpoint)
    reference = find_reference(model, held_out=tmp_path / "seen.npy", value_range=(-1, 1))

    def figures(**options):
        found = evaluate(model, reference, n_chains=20, k=3, classes=False, **options)
        json.dumps(found.to_dict(), allow_nan=False)
        return found

    found = figures(seed=3)
    several = fast_sample(checkpoint, n_chains=32, n_draws=64, seed=3)
    assert found.mixing == several.stats.mixing
    assert found.spacing == {"thin": 12, "jitter": 0.4, "settle": 2}
    assert found.to_dict()["mixing"]["thin"] == 12
    assert figures(sampling={"jitter": 0.0}).mixing is None
    run(
        "sample",
        "--model",
        checkpoint,
        "--chains",
        "70",
        "--draws",
        "12",
        "--thin",
        "4",
        "--out",
        str(tmp_path / "d.npy"),
    )
    stored = figures(draws=open_draws(tmp_path / "d.npy"))
    assert stored.mixing == fast_sample(checkpoint, n_chains=70, n_draws=12, thin=4).stats.mixing
    assert stored.spacing["thin"] == 4
