"""Animations and stills of chains, from a model and from files of draws, through the command line."""

from __future__ import annotations

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import call, random_mlp
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kaleido_fast import InputError, ModelCard, ModelSpec, Scaling, fast_sample, save_checkpoint
from kaleido_fast.showing.animation import end_colours, make_frames, places, strip, write_gif
from kaleido_fast.showing.states import Shown, frame_steps, read_shown, sample_shown
from kaleido_fast.storing.record import make_record
from kaleido_fast.storing.writers import write_draws

COLOUR = (4, 3, 3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Models of colour pictures, of points in the plane, and of samples that cannot be drawn; draws of the first."""
    monkeypatch.chdir(tmp_path)
    for name, shape in (("colour", COLOUR), ("plane", (2,)), ("seven", (7,))):
        dim = int(np.prod(shape))
        model = random_mlp(dim, 9, dim, sample_shape=shape)
        save_checkpoint(tmp_path / f"{name}.safetensors", model, ModelCard(name, sampling={"burn_in": 4}))
    result = fast_sample("colour.safetensors", n_chains=12, burn_in=2, n_draws=3, thin=2, first_chain=100)
    model = random_mlp(36, 9, 36, sample_shape=COLOUR)
    for ending in (".npz", ".npy"):
        write_draws(tmp_path / f"draws{ending}", result, make_record(result, model.spec, Scaling()))
    return tmp_path


@given(st.integers(1, 5000), st.integers(4, 100))
def test_frames_begin_with_the_noise_end_with_the_run_and_keep_to_their_number(n_steps, most):
    steps = frame_steps(n_steps, most)
    assert (steps[0], steps[-1]) == (0, n_steps)
    assert len(steps) <= most
    assert list(steps) == sorted(set(steps))
    if n_steps < most:
        assert steps == tuple(range(n_steps + 1))


def test_states_that_are_shown_are_the_sampler_s(folder):
    shown = sample_shown("colour.safetensors", n_chains=3, n_steps=6, steps=(0, 2, 6), seed=3, jitter=0.2)
    want = fast_sample("colour.safetensors", n_chains=3, burn_in=5, thin=1, seed=3, jitter=0.2)
    assert torch.equal(shown.states[:, -1], want.final)
    assert shown.states.shape == (3, 3, 36)


def test_a_file_is_shown_with_its_own_steps_and_ids(folder):
    result = np.load("draws.npy")
    for name in ("draws.npz", "draws.npy"):
        shown = read_shown(folder / name, first=2, n_chains=5)
        assert shown.steps == (4, 6, 8)
        assert (shown.first_chain, shown.spec.sample_shape) == (102, COLOUR)
        assert np.array_equal(shown.states.numpy(), result[2:7])


def test_a_frame_holds_every_chain_in_colour_under_its_step(folder):
    shown = sample_shown("colour.safetensors", n_chains=4, n_steps=3)
    frames = make_frames(shown)
    assert len(frames) == 4
    assert len({frame.size for frame in frames}) == 1
    pixels = np.asarray(frames[-1]).reshape(-1, 3)
    want = ((shown.states[:, -1].reshape(-1, 3) + 1) / 2 * 255).round().numpy().astype(np.uint8)
    assert {tuple(p) for p in want.tolist()} <= {tuple(p) for p in pixels.tolist()}


def test_dots_keep_their_colour_and_different_ends_differ():
    ends = torch.tensor([[0.2, 0.2], [0.8, 0.8], [0.2, 0.8], [0.8, 0.2]])
    states = torch.stack([torch.rand(4, 2), ends], dim=1)
    shown = Shown(states, (0, 1), ModelSpec((2, 2), bound="sigmoid"), Scaling())
    assert len(set(end_colours(shown))) == 4
    assert torch.allclose(places(shown)[:, 1], ends)
    assert len(make_frames(shown)) == 2


def test_a_gif_holds_every_frame_and_loops(folder):
    frames = make_frames(sample_shown("colour.safetensors", n_chains=4, n_steps=5))
    write_gif(frames, folder / "a.gif")
    image = Image.open(folder / "a.gif")
    assert (image.n_frames, image.info["loop"], image.size) == (6, 0, frames[0].size)


def test_a_strip_has_a_row_a_chain_and_a_column_a_step(folder):
    shown = sample_shown("colour.safetensors", n_chains=3, n_steps=5)
    square = strip(shown)
    longer = strip(Shown(shown.states[:, :3], shown.steps[:3], shown.spec, shown.scaling))
    assert square.width / 6 == pytest.approx(square.height / 4, rel=0.6)
    assert longer.width < square.width * 1.5


def test_animate_writes_each_format(folder, monkeypatch, capsys):
    outs = [arg for name in ("a.gif", "a.html", "a.png") for arg in ("--out", name)]
    status, output, errors = call(
        monkeypatch, capsys, "animate", "--model", "colour.safetensors", "--chains", "5", *outs
    )
    assert (status, errors) == (0, "")
    assert "5 chains, 6 frames" in output
    assert Image.open("a.gif").n_frames == 6
    assert "<canvas" in (folder / "a.html").read_text()
    assert Image.open("a.png").width > 24


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg on the path")
def test_an_mp4_has_the_frames(folder, monkeypatch, capsys):
    args = ("animate", "--model", "plane.safetensors", "--chains", "5", "--out", "a.mp4", "--quiet")
    assert call(monkeypatch, capsys, *args)[0] == 0
    made = subprocess.run(
        ["ffprobe", "-v", "error", "-count_frames", "-select_streams", "v", "-show_streams", "-of", "json", "a.mp4"],
        capture_output=True,
        check=True,
    )
    (stream,) = json.loads(made.stdout)["streams"]
    assert (stream["codec_name"], stream["nb_read_frames"]) == ("h264", "6")
    assert stream["width"] % 2 == stream["height"] % 2 == 0


def test_without_ffmpeg_the_gif_is_written_and_the_mp4_says_what_is_missing(folder, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    args = ("animate", "--model", "plane.safetensors", "--chains", "5")
    status, output, errors = call(monkeypatch, capsys, *args)
    assert (status, errors.count("\n")) == (0, 1)
    assert "ffmpeg" in errors
    assert "chains.gif" in output
    (folder / "chains.gif").unlink()
    status, _, errors = call(monkeypatch, capsys, *args, "--out", "b.mp4", "--out", "b.gif")
    assert status == 2
    assert "install it" in errors
    assert (folder / "b.gif").is_file()
    status, _, errors = call(monkeypatch, capsys, *args, "--out", "c.mp4")
    assert (status, (folder / "c.mp4").exists()) == (2, False)


def test_a_failing_ffmpeg_leaves_no_half_file(folder, monkeypatch, capsys):
    program = folder / "ffmpeg"
    program.write_text("#!/bin/sh\ncat > /dev/null\necho no such codec >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    status, _, errors = call(
        monkeypatch, capsys, "animate", "--model", "plane.safetensors", "--chains", "5", "--out", "a.mp4", "--quiet"
    )
    assert status == 2
    assert "no such codec" in errors
    assert not [path.name for path in folder.iterdir() if "mp4" in path.name]


@pytest.mark.parametrize("name", ["draws.npz", "draws.npy"])
def test_show_draws_a_sheet_a_strip_and_a_page(folder, monkeypatch, capsys, name):
    status, output, _ = call(monkeypatch, capsys, "show", name)
    assert status == 0
    assert "12 chains, the first is number 100" in output
    assert Image.open("draws-shown.png").mode == "RGB"
    for args in (("--all-draws", "--out", "strip.png"), ("--out", "page.html", "--first", "3")):
        assert call(monkeypatch, capsys, "show", name, *args)[0] == 0
    assert '"first":103' in (folder / "page.html").read_text()


def test_show_plots_points(folder, monkeypatch, capsys):
    np.save(folder / "points.npy", np.random.default_rng(0).random((50, 1, 2), np.float32))
    assert call(monkeypatch, capsys, "show", "points.npy")[0] == 0
    assert Image.open("points-shown.png").width > 100


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("show", "gone.npy"), "gone.npy"),
        (("show", "draws.npz", "--out", "a.jpg"), "unknown format '.jpg'"),
        (("show", "draws.npz", "--out", "no/a.png"), "does not exist"),
        (("show", "draws.npz", "--first", "12"), "chains 0 to 11"),
        (("show", "draws.npz", "--shape", "5,5"), "does not hold 36 values"),
        (("show", "draws.npz", "--shape", "five"), "two whole numbers"),
        (("show", "seven.npy"), "pass --shape"),
        (("show", "nan.npy"), "1 of 3 chains hold NaN"),
        (("show", "wild.npy"), "only [-1, 1]"),
        (("show", "none.npy"), "holds no draws"),
        (("animate", "--model", "seven.safetensors"), "pass --shape"),
        (("animate", "--model", "gone.safetensors"), "does not exist"),
        (("animate", "--out", "a.webm"), "unknown format '.webm'"),
        (("animate", "--chains", "0"), "x>=1"),
        (("animate", "one.npy"), "one draw a chain"),
        (("sample", "--model", "plane.safetensors", "--picture"), "show plots draws"),
        (("animate", "--model", "plane.safetensors", "--out", "a.gif", "--out", "a.png"), "show plots draws"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(folder, monkeypatch, capsys, args, text):
    np.save("seven.npy", np.zeros((3, 2, 7), np.float32))
    np.save("nan.npy", np.where(np.arange(3)[:, None, None] == 1, np.nan, np.zeros((3, 2, 4), np.float32)))
    np.save("wild.npy", np.full((3, 2, 4), 7, np.float32))
    np.save("none.npy", np.zeros((0, 2, 4), np.float32))
    np.save("one.npy", np.zeros((3, 1, 2), np.float32))
    before = sorted(path.name for path in folder.iterdir())
    status, output, errors = call(monkeypatch, capsys, *args)
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert text in errors
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_record_of_another_file_is_refused(folder):
    (folder / "draws.json").write_text((folder / "draws.json").read_text())
    np.save("draws.npy", np.zeros((3, 2, 5), np.float32))
    with pytest.raises(InputError, match="the record belongs to another file"):
        read_shown(folder / "draws.npy", n_chains=3)
