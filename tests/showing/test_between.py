"""Samples on their way from one seed to another, in Python and through the command line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import call, needs, random_mlp
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kaleido_fast import InputError, ModelCard, SamplerWarning, fast_sample, load_checkpoint, save_checkpoint
from kaleido_fast.noise import normals
from kaleido_fast.showing.between import interpolate_starts, sample_between
from kaleido_fast.showing.states import sample_shown

FLOW = {"sampler": "flow", "steps": 6, "noise_from": 0.8, "noise_to": 0.2}
SHARES = torch.arange(9, dtype=torch.float64) / 8


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Models that recommend the flow, of pictures, of points and of single values; and a kaleidoscope."""
    monkeypatch.chdir(tmp_path)
    for name, shape, sampling in (
        ("flow", (4, 5), FLOW),
        ("plane", (2,), FLOW),
        ("line", (1,), FLOW),
        ("kaleidoscope", (4, 5), {"burn_in": 4}),
    ):
        dim = int(np.prod(shape))
        model = random_mlp(dim, 9, dim, sample_shape=shape, bound="sigmoid", low=0.0, high=1.0)
        save_checkpoint(tmp_path / f"{name}.safetensors", model, ModelCard(name, sampling=sampling))
    return tmp_path


# The starts.


@given(st.integers(0, 2**32), st.integers(2, 300), st.floats(-3, 3))
def test_starts_lie_on_the_arc_at_equal_angles(seed, dim, middle):
    first, last = (middle + normals(seed + i, torch.arange(5), dim, 0).float() for i in (0, 1))
    starts = interpolate_starts(first, last, SHARES, middle)
    assert torch.equal(starts[0], first) and torch.equal(starts[-1], last)
    around = interpolate_starts(first.double(), last.double(), SHARES, middle) - middle
    lengths = around.norm(dim=2)
    even = (1 - SHARES)[:, None] * lengths[0] + SHARES[:, None] * lengths[-1]
    assert float((lengths / even - 1).abs().max()) < 1e-6, "the distance from the middle moves evenly"
    unit = around / lengths[..., None]
    steps = 2 * ((unit[1:] - unit[:-1]).norm(dim=2) / 2).asin()
    whole = 2 * ((unit[-1] - unit[0]).norm(dim=1) / 2).asin()
    assert float((steps.sum(dim=0) - whole).abs().max()) < 1e-6, "no way round"
    assert float((steps - whole / 8).abs().max()) < 1e-6, "angles are equal"


def test_starts_on_the_way_have_the_law_of_noise():
    first, last = (normals(seed, torch.arange(4000), 50, 0) for seed in (1, 2))
    middle = interpolate_starts(first, last, torch.tensor([0.5]), 0.0)[0].double()
    straight = (first + last) / 2
    assert abs(float(middle.std()) - 1) < 0.01
    assert abs(float((middle**4).mean()) / 3 - 1) < 0.05
    assert float(straight.std()) < 0.75, "which a straight line does not keep"


@pytest.mark.parametrize("last", [[1.0, 2.0], [-0.5, -1.0], [0.0, 0.0]])
def test_starts_on_one_line_are_refused(last):
    first = torch.tensor([[0.3, -0.4], [0.5, 1.0]])
    with pytest.raises(InputError, match="starts of place 1 lie on one line"):
        interpolate_starts(first, torch.tensor([[1.0, 0.0], last]), SHARES, 0.0)


# The draws.


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("steps", [1, 6, None])
def test_the_ends_are_the_draws_of_the_two_seeds(folder, engine, steps):
    needs(engine)
    checkpoint = load_checkpoint("flow.safetensors")
    shown = sample_between(checkpoint, seeds=(3, 2**64 - 1), n_chains=7, first_chain=40, engine=engine, steps=steps)
    assert shown.states.shape == (7, 25, 20)
    for frame, seed in ((0, 3), (-1, 2**64 - 1)):
        want = fast_sample(checkpoint, n_chains=7, first_chain=40, seed=seed, engine=engine, steps=steps).final
        assert torch.equal(shown.states[:, frame], want), f"seed {seed}"
    assert (shown.captions[0], shown.captions[6], shown.captions[-1]) == ("seed 3", "25%", f"seed {2**64 - 1}")
    assert (shown.first_chain, shown.name) == (40, "flow")


def test_chains_go_their_way_alone_and_finer_frames_hold_the_coarser_ones(folder):
    shown = sample_between("flow.safetensors", seeds=(1, 2), n_chains=9, n_frames=17)
    part = sample_between("flow.safetensors", seeds=(1, 2), n_chains=3, first_chain=4, n_frames=17)
    assert torch.equal(part.states, shown.states[4:7])
    finer = sample_between("flow.safetensors", seeds=(1, 2), n_chains=9, n_frames=65)
    assert torch.equal(finer.states[:, ::4], shown.states)
    back = sample_between("flow.safetensors", seeds=(2, 1), n_chains=9, n_frames=17)
    assert float((back.states.flip(1) - shown.states).abs().max()) < 1e-4


def test_samples_move_without_jumps(folder):
    jumps, options = [], {"seeds": (1, 2), "n_chains": 9}
    for n_frames in (33, 65, 129):
        states = sample_between("flow.safetensors", n_frames=n_frames, **options).states
        jumps.append(float((states[:, 1:] - states[:, :-1]).abs().max()))
    assert jumps[0] > 1e-3, "they move"
    assert jumps[1] < 0.7 * jumps[0] and jumps[2] < 0.7 * jumps[1], f"largest changes {jumps}"


def test_a_model_for_another_sampler_is_told_of_once(folder):
    options = {"seeds": (1, 2), "n_chains": 3, "n_frames": 4, "sampler": "flow"}
    with pytest.warns(SamplerWarning, match="no training for 'flow'") as told:
        shown = sample_between("kaleidoscope.safetensors", **options)
    assert len(told) == 1
    assert shown.states.shape == (3, 4, 20)


# Through the command line.


def test_animate_between_two_seeds_goes_there_and_back(folder, monkeypatch, capsys):
    outs = [arg for name in ("a.gif", "a.html", "a.png") for arg in ("--out", name)]
    args = ("animate", "--model", "flow.safetensors", "--chains", "5", "--between", "1", "2", "--frames", "7", *outs)
    status, output, errors = call(monkeypatch, capsys, *args)
    assert (status, errors) == (0, "")
    assert "5 chains, 7 frames" in output
    image, times, frames = Image.open("a.gif"), [], []
    for frame in range(image.n_frames):
        image.seek(frame)
        times.append(image.info["duration"])
        frames.append(np.asarray(image.convert("RGB")))
    assert len(frames) == 12
    for i in range(1, 6):
        assert np.array_equal(frames[i], frames[12 - i]), f"frame {12 - i} is frame {i} on the way back"
    assert len(set(times)) == 1, "the last frame is no end, so none is held"
    assert '"titles":["seed 1","17%","33%","50%","67%","83%","seed 2"]' in (folder / "a.html").read_text()
    assert Image.open("a.png").width > 24


def test_points_move_between_two_seeds(folder, monkeypatch, capsys):
    args = ("animate", "--model", "plane.safetensors", "--between", "1", "2", "--steps", "3", "--out", "a.gif")
    assert call(monkeypatch, capsys, *args, "--quiet") == (0, "", "")
    assert Image.open("a.gif").n_frames == 48


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--model", "kaleidoscope.safetensors"), "would be sampled with 'kaleidoscope'"),
        (("--sampler", "kaleidoscope"), "would be sampled with 'kaleidoscope'"),
        (("--between", "4", "4"), "the seeds 4 and 4 are the same"),
        (("--between", "-1", "4"), "seed is -1: it must be a whole number from 0"),
        (("--between", "1", str(2**64)), f"seed is {2**64}"),
        (("--between", "1"), "requires 2 arguments"),
        (("--seed", "3"), "--seed stands beside --between"),
        (("--jitter", "0.5"), "jitter 0.5 with sampler 'flow'"),
        (("--noise", "uniform"), "noise uniform with sampler 'flow'"),
        (("--noise-from", "0.1"), "noise_to"),
        (("--frames", "1"), "x>=2"),
        (("--model", "line.safetensors"), "on one line"),
        (("draws.npy",), "--between is for a run of a model, and draws.npy holds finished draws"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(folder, monkeypatch, capsys, args, text):
    np.save("draws.npy", np.zeros((3, 2, 20), np.float32))
    before = sorted(path.name for path in folder.iterdir())
    default = ("--model", "flow.safetensors", "--between", "1", "2", "--out", "a.gif")
    if args == ("draws.npy",):
        default = default[2:]
    status, output, errors = call(monkeypatch, capsys, "animate", *default, *args)
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert text in errors
    assert sorted(path.name for path in folder.iterdir()) == before


# The run of a flow itself.


def test_a_run_of_a_flow_is_shown_clipped_to_the_range(folder, monkeypatch, capsys):
    shown = sample_shown("flow.safetensors", n_chains=30, seed=4)
    assert shown.steps == tuple(range(7))
    assert float(shown.states[:, 0].min()) < 0 and float(shown.states[:, 0].max()) > 1, "noise has no bound"
    want = fast_sample(load_checkpoint("flow.safetensors"), n_chains=30, seed=4)
    assert torch.equal(shown.states[:, -1], want.final)
    outs = ("--out", "a.gif", "--out", "a.png")
    args = ("--model", "flow.safetensors", "--chains", "5", "--steps", "3")
    status, output, errors = call(monkeypatch, capsys, "animate", *args, *outs)
    assert (status, errors) == (0, "")
    assert "5 chains, 4 frames" in output


def test_steps_of_a_flow_are_those_of_a_draw(folder):
    shown = sample_shown("flow.safetensors", n_chains=4, n_steps=11)
    assert shown.steps == tuple(range(12))
    want = fast_sample(load_checkpoint("flow.safetensors"), n_chains=4, steps=11)
    assert torch.equal(shown.states[:, -1], want.final)
    with pytest.warns(SamplerWarning):
        asked = sample_shown("kaleidoscope.safetensors", n_chains=4, n_steps=3, sampler="flow")
        want = fast_sample(load_checkpoint("kaleidoscope.safetensors"), n_chains=4, sampler="flow", steps=3)
    assert torch.equal(asked.states[:, -1], want.final)


def test_show_draws_a_file_of_a_flow(folder, monkeypatch, capsys):
    args = ("sample", "--model", "flow.safetensors", "--chains", "6", "--draws", "3", "--out", "d.npy", "--quiet")
    assert call(monkeypatch, capsys, *args) == (0, "", "")
    for more in (("--all-draws",), ("--out", "page.html")):
        assert call(monkeypatch, capsys, "show", "d.npy", *more)[0] == 0
    assert Image.open("d-shown.png").width > 24
