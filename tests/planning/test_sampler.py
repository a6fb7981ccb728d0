"""Which sampler a run has, whose options it takes, and what is said where a card recommends another one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same, call, random_mlp

from kaleido_fast import (
    InputError,
    ModelCard,
    SampleRequest,
    SamplerWarning,
    attractors,
    fast_sample,
    sample_op,
    save_checkpoint,
)
from kaleido_fast.planning.options import OPTIONS, OPTIONS_OF

FLOW = {"sampler": "flow", "steps": 6, "noise_from": 0.8, "noise_to": 0.2}
KALEIDOSCOPE = {"burn_in": 9, "jitter": 0.5, "settle": 2}
OTHER_VALUE = {
    **{"burn_in": 3, "thin": 2, "init": "normal", "noise": "uniform", "jitter": 0.1, "settle": 1, "tol": 1e-3},
    **{"patience": 2, "check_every": 3, "max_period": 5, "retire_cycles": True, "polish": 1},
    **{"steps": 4, "noise_from": 0.7, "noise_to": 0.3},
}


@pytest.fixture
def net(tmp_path, monkeypatch):
    """Models of 2 x 2 pictures in the working folder: flow, kaleidoscope, and one whose card recommends nothing."""
    monkeypatch.chdir(tmp_path)
    net = random_mlp(4, 9, 4, sample_shape=(2, 2))
    for name, sampling in (("flow", FLOW), ("kaleidoscope", KALEIDOSCOPE), ("silent", {})):
        save_checkpoint(tmp_path / f"{name}.safetensors", net, ModelCard(name, sampling=sampling))
    return net


@pytest.mark.parametrize("name", [name for names in OPTIONS_OF.values() for name in names])
def test_options_of_the_other_sampler_are_refused_by_name(name, net):
    """By the request and by both ways to the sampler: asked for, and recommended."""
    own = OPTIONS[name].sampler
    other = next(sampler for sampler in OPTIONS_OF if sampler != own)
    text = (
        rf"^{name} {OTHER_VALUE[name]} with sampler '{other}'.*: {name} belongs to sampler '{own}'; leave it out, or "
    )
    with pytest.raises(InputError, match=text):
        SampleRequest(n_chains=1, sampler=other, **{name: OTHER_VALUE[name]})
    with pytest.raises(InputError, match=text):
        fast_sample(net, n_chains=1, sampler=other, **{name: OTHER_VALUE[name]})
    with pytest.raises(InputError, match=text):
        fast_sample(f"{other}.safetensors", n_chains=1, **{name: OTHER_VALUE[name]})


def test_a_recommended_flow_is_run_and_explicit_options_win(net):
    result = fast_sample("flow.safetensors", n_chains=5)
    assert torch.equal(result.draws, fast_sample(net, n_chains=5, **FLOW).draws)
    assert torch.equal(
        fast_sample("flow.safetensors", n_chains=5, steps=3).draws,
        fast_sample(net, n_chains=5, **FLOW | {"steps": 3}).draws,
    )
    card = ModelCard("m", sampling=FLOW)
    assert torch.equal(fast_sample(net, n_chains=5, **card.settings(n_draws=2)).draws[:, 0], result.draws[:, 0])
    assert_same(sample_op(net, n_chains=5, **card.settings()), result)
    assert card.settings(sampler="kaleidoscope", burn_in=3) == {"sampler": "kaleidoscope", "burn_in": 3, "thin": 1}


@pytest.mark.parametrize(
    ("model", "sampler", "text"),
    [
        ("flow", "kaleidoscope", "sampler 'kaleidoscope': the model's card recommends sampler flow, steps 6"),
        ("kaleidoscope", "flow", r"sampler 'flow': the model's card recommends burn_in 9, jitter 0.5, settle 2 of"),
        (
            "silent",
            "flow",
            "sampler 'flow': the model's card recommends no sampler, and tells of no training for 'flow'",
        ),
    ],
)
def test_one_line_says_what_a_card_recommends_where_it_is_not_what_is_run(
    model, sampler, text, net, monkeypatch, capsys
):
    with pytest.warns(SamplerWarning, match=text) as said:
        result = fast_sample(f"{model}.safetensors", n_chains=5, sampler=sampler)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fast_sample(net, n_chains=5, sampler=sampler).draws, result.draws), (
            "its settings do not hold"
        )
        fast_sample(f"{model}.safetensors", n_chains=5)
        fast_sample("silent.safetensors", n_chains=5, sampler="kaleidoscope")
    args = ("sample", "--model", f"{model}.safetensors", "--chains", "3", "--sampler", sampler, "--out", "a.npz")
    status, _, errors = call(monkeypatch, capsys, *args)
    assert status == 0 and errors.startswith(f"kaleido-fast: sampler '{sampler}'") and errors.count("\n") == 1, errors


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--steps", "0"), "steps is 0: it must be a whole number from 1"),
        (("--noise-from", "0"), "noise_from is 0.0: it must be above 0, at most 1"),
        (("--noise-from", "1.01"), "noise_from is 1.01: it must be above 0, at most 1"),
        (("--noise-to", "0.9"), "noise_to is 0.9: it must lie above 0 and below noise_from, 0.9"),
        (("--noise-from", "0.05"), "noise_to is 0.1: it must lie above 0 and below noise_from, 0.05"),
        (("--tol", "1e-4"), "tol 0.0001 with sampler 'flow'"),
        (("--jitter", "0.1"), "jitter 0.1 with sampler 'flow'"),
        (("--sampler", "kaleidoscope", "--steps", "4"), "steps 4 with sampler 'kaleidoscope'"),
        (("--sampler", "flaw"), "unknown sampler 'flaw': known are kaleidoscope, flow; did you mean 'flow'?"),
    ],
)
def test_bad_input_is_one_line(options, text, net, monkeypatch, capsys):
    args = ("sample", "--model", "silent.safetensors", "--chains", "3", "--sampler", "flow", *options)
    status, output, errors = call(monkeypatch, capsys, *args)
    assert (status, output) == (2, "") and errors.count("\n") == 1
    assert errors.startswith(f"kaleido-fast: {text}"), errors
    assert not list(Path().glob("samples*"))


def test_sample_tells_and_records_a_flow(net, monkeypatch, capsys):
    args = ("sample", "--model", "flow.safetensors", "--chains", "300", "--draws", "12")
    status, output, errors = call(monkeypatch, capsys, *args)
    assert (status, errors) == (0, "")
    told = " ".join(output.split())
    assert "300 x 72 steps, 6 a draw, from noise 0.8 to 0.2, seed 0" in told
    assert "12 a chain, each from noise of its own: independent of each other" in told
    for other in ("moving", "R-hat", "thin", "saved"):
        assert other not in told
    request = json.loads(Path("samples.json").read_text())["request"]
    assert {name: request[name] for name in FLOW} == FLOW
    found = fast_sample("flow.safetensors", n_chains=300, n_draws=12).stats.mixing
    assert found is not None and found.mixes, found


def test_evaluate_measures_a_flow(net, monkeypatch, capsys):
    np.savez("d.npz", data=np.random.default_rng(0).random((40, 2, 2)), labels=np.arange(40) % 4)
    args = ("evaluate", "flow.safetensors", "--held-out", "d.npz", "--chains", "20", "--no-classes", "--steps", "4")
    status, output, errors = call(monkeypatch, capsys, *args)
    assert status == 0, errors
    told = " ".join(output.split())
    assert "samples: 4 steps, 4 a draw, from noise 0.8 to 0.2, seed 0: residual" in told
    assert "moving" not in told and "without jitter" not in told
    run = json.loads(Path("evaluation.json").read_text())["runs"]["samples"]
    assert {name: run[name] for name in FLOW} == FLOW | {"steps": 4}
    status, _, errors = call(monkeypatch, capsys, *args, "--draws", "d.npz", "--overwrite")
    assert status == 2 and "--steps is for samples that are drawn now" in errors


def test_animate_shows_a_flow_from_its_start_to_its_draw(net, monkeypatch, capsys):
    from kaleido_fast.showing.states import sample_shown

    shown = sample_shown("flow.safetensors", n_chains=4)
    want = fast_sample(net, n_chains=4, **FLOW)
    assert shown.steps == tuple(range(7)) and torch.equal(shown.states[:, -1], want.final)
    shown = sample_shown("flow.safetensors", n_chains=4, n_steps=3)
    assert shown.steps == tuple(range(4))
    assert torch.equal(shown.states[:, -1], fast_sample(net, n_chains=4, **FLOW | {"steps": 3}).final)
    args = ("animate", "--model", "flow.safetensors", "--chains", "4", "--out", "a.gif", "--out", "a.html", "--quiet")
    assert call(monkeypatch, capsys, *args) == (0, "", "")
    status, _, errors = call(monkeypatch, capsys, *args[:5], "--jitter", "0.1", "--out", "b.gif")
    assert status == 2 and "jitter 0.1 with sampler 'flow' (the model recommends 'flow')" in errors


def test_attractors_are_those_of_the_kaleidoscope(net, monkeypatch, capsys):
    save_checkpoint("calm.safetensors", random_mlp(4, 9, 4, sample_shape=(2, 2), scale=0.5), ModelCard(sampling=FLOW))
    args = ("attractors", "--model", "calm.safetensors", "--chains", "9", "--burn-in", "20", "--quiet")
    with pytest.warns(SamplerWarning, match="the model's card recommends sampler flow"):
        status, _, errors = call(monkeypatch, capsys, *args)
    assert (status, errors) == (0, "")
    assert json.loads(Path("attractors.json").read_text())["request"]["sampler"] == "kaleidoscope"
    with pytest.raises(InputError, match="a run of sampler 'flow' comes nowhere to rest"):
        attractors(fast_sample("calm.safetensors", n_chains=9), "calm.safetensors")
