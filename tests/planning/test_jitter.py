"""The published noise, which comes after each step: no clean steps are said, asked for or recorded that it lacks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, random_mlp
from hypothesis import given
from hypothesis import strategies as st

from kaleido_fast import InputError, ModelCard, fast_sample, save_checkpoint
from kaleido_fast.planning.jitter import jitter_words, run_words
from kaleido_kernels.schedule import Schedule

JITTERED = {"burn_in": 9, "thin": 1, "jitter": 0.5, "settle": 2}


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model of 2 x 2 pictures that recommends jitter and clean steps, in the working folder."""
    monkeypatch.chdir(tmp_path)
    net = random_mlp(4, 9, 4, sample_shape=(2, 2))
    save_checkpoint(tmp_path / "m.safetensors", net, ModelCard("m", sampling=JITTERED))
    return net


@given(
    st.integers(0, 9), st.integers(1, 4), st.integers(1, 5), st.integers(0, 7), st.sampled_from(("normal", "upstream"))
)
def test_the_number_of_jittered_steps_is_counted(burn_in, n_draws, thin, settle, noise):
    schedule = Schedule(burn_in, n_draws, thin, settle, 0.5, noise)
    assert schedule.n_jittered == sum(map(schedule.is_jittered, range(schedule.n_steps)))


@given(st.integers(0, 9), st.integers(1, 5), st.integers(0, 7), st.sampled_from(("normal", "uniform", "upstream")))
def test_words_name_clean_steps_only_where_there_are_jittered_ones(burn_in, thin, settle, noise):
    schedule = Schedule(burn_in, 1, thin, settle, 0.5, noise)
    jittered = [schedule.is_jittered(step) for step in range(schedule.n_steps)]
    words = jitter_words(schedule)
    assert ("clean steps" in words) == any(jittered), words
    if any(jittered):
        assert jittered[::-1].index(True) == settle, "that many last steps are clean"
        assert f"({settle} clean steps" in words
    assert ("after every step" in words) == (noise == "upstream")
    assert jitter_words(Schedule(burn_in, 1, thin, settle, 0.0, noise)) == ""


@given(st.integers(1, 4), st.integers(1, 30), st.floats(0.5, 1), st.floats(0.01, 0.4))
def test_words_of_a_flow_say_its_steps_and_shares_of_noise(n_draws, steps, first, last):
    schedule = Schedule.flow(n_draws, steps, first, last)
    end = f" to {last:g}" if steps > 1 else ""
    assert jitter_words(schedule) == f"{steps} a draw, from noise {first:g}{end}"
    run = {"sampler": "flow", "n_draws": n_draws, "steps": steps, "noise_from": first, "noise_to": last}
    assert run_words(run) == f"{n_draws * steps} steps, {jitter_words(schedule)}"
    assert schedule.n_jittered == sum(map(schedule.is_jittered, range(schedule.n_steps))) == n_draws - 1


def test_left_out_the_published_noise_has_the_published_eps_and_no_clean_steps(model):
    result = fast_sample("m.safetensors", n_chains=5, noise="upstream")
    assert (result.request.jitter, result.request.settle, result.request.burn_in) == (0.01, 0, 9)
    want = fast_sample(model, n_chains=5, burn_in=9, noise="upstream", jitter=0.01)
    assert torch.equal(result.draws, want.draws)
    assert not torch.equal(result.final, fast_sample(model, n_chains=5, burn_in=9, tol=None).final)
    assert fast_sample("m.safetensors", n_chains=5, noise="upstream", jitter=0.0).request.jitter == 0
    assert fast_sample("m.safetensors", n_chains=5, noise="uniform").request.settle == 2


def test_clean_steps_of_the_published_noise_are_refused(model):
    with pytest.raises(InputError, match=r"settle 3 with noise 'upstream'.*no step is clean"):
        fast_sample("m.safetensors", n_chains=5, noise="upstream", settle=3)
    fast_sample("m.safetensors", n_chains=5, noise="upstream", settle=0)


def test_sample_tells_and_records_what_happens(model, monkeypatch, capsys):
    status, output, errors = call(
        monkeypatch, capsys, "sample", "--model", "m.safetensors", "--chains", "3", "--noise", "upstream"
    )
    assert (status, errors) == (0, "")
    assert "published noise 0.01 after every step, seed 0" in " ".join(output.split())
    assert "clean" not in output
    request = json.loads(Path("samples.json").read_text())["request"]
    assert (request["noise"], request["jitter"], request["settle"]) == ("upstream", 0.01, 0)


@pytest.mark.parametrize("noise", ["uniform", "upstream"])
def test_animate_shows_the_noise_that_is_asked_for(noise, model, monkeypatch, capsys):
    from kaleido_fast.showing.states import sample_shown

    seen = []
    monkeypatch.setattr(
        "kaleido_fast.showing.states.sample_shown", lambda *args, **options: seen.append(options) or shown
    )
    shown = sample_shown("m.safetensors", n_chains=4, n_steps=3, noise=noise)
    want = fast_sample(model, n_chains=4, burn_in=2, noise=noise, jitter=0.01 if noise == "upstream" else 0.5)
    assert torch.equal(shown.states[:, -1], want.final)
    args = ("animate", "--model", "m.safetensors", "--chains", "4", "--noise", noise, "--out", "a.gif", "--quiet")
    assert call(monkeypatch, capsys, *args) == (0, "", "")
    assert seen[0]["noise"] == noise


@pytest.mark.parametrize("option", [("--noise", "uniform"), ("--jitter", "0.1"), ("--seed", "0"), ("--steps", "4")])
def test_options_of_a_run_have_no_say_in_draws_that_are_there(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("d.npy", np.zeros((3, 4, 2), np.float32))
    status, _, errors = call(monkeypatch, capsys, "animate", "d.npy", *option)
    assert status == 2 and errors.count("\n") == 1
    assert f"{option[0]} is for a run of a model, and d.npy holds finished draws" in errors


def test_evaluate_measures_the_noise_that_is_asked_for(model, monkeypatch, capsys):
    np.savez("d.npz", data=np.random.default_rng(0).random((40, 2, 2)), labels=np.arange(40) % 4)
    args = ("evaluate", "m.safetensors", "--held-out", "d.npz", "--chains", "20", "--no-classes", "--noise", "upstream")
    status, output, _ = call(monkeypatch, capsys, *args)
    assert status == 0
    assert "10 steps, published noise 0.01 after every step, seed 0" in " ".join(output.split())
    run = json.loads(Path("evaluation.json").read_text())["runs"]["samples"]
    assert (run["noise"], run["jitter"], run["settle"]) == ("upstream", 0.01, 0)
    sheet = Path("evaluation.png").read_bytes()
    assert call(monkeypatch, capsys, *args[:-2], "--overwrite")[0] == 0
    assert Path("evaluation.png").read_bytes() != sheet, "samples of another noise are others"
    status, _, errors = call(monkeypatch, capsys, *args, "--draws", "d.npz", "--overwrite")
    assert status == 2
    assert "--noise is for samples that are drawn now" in errors


@pytest.mark.parametrize(("bound", "low", "high"), [("tanh", -1.0, 1.0), ("sigmoid", 0.0, 1.0)])
def test_the_published_noise_raises_every_value_and_centred_noise_does_not(bound, low, high):
    """A step adds eps * [high, 2 high - low): nothing falls, and the mean of 0.01 * (high + half range) stays in."""
    net = random_mlp(6, 9, 6, bound=bound)
    clean = fast_sample(net, n_chains=400, burn_in=0, tol=None, engine="reference").final
    noisy = fast_sample(net, n_chains=400, burn_in=0, noise="upstream", jitter=0.01, engine="reference").final
    inside = clean < high - 0.03
    rise = (noisy - clean)[inside]
    assert float(rise.min()) >= 0.01 * high - 1e-6
    assert float(rise.max()) <= 0.01 * (2 * high - low) + 1e-6
    assert float(rise.mean()) == pytest.approx(0.01 * (high + (high - low) / 2), rel=0.03)
    centred = fast_sample(net, n_chains=400, burn_in=1, noise="uniform", jitter=0.01, settle=0, engine="reference")
    after = fast_sample(net, n_chains=400, burn_in=1, tol=None, engine="reference").final
    assert abs(float((centred.final - after).mean())) < 1e-3
