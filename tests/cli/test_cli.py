"""The command line as people use it: in a process of its own where the exit status matters."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import click
import numpy as np
import pytest
from PIL import Image

from kaleido_fast import ModelCard, names, save_checkpoint
from kaleido_fast.cli import COMMANDS, cli
from kaleido_fast.model import ACTIVATIONS, BOUNDS

from conftest import call, random_mlp  # isort: skip


def run(*args: str, cwd, **options) -> subprocess.CompletedProcess:
    """Run the program in ``cwd``, wide enough that nothing wraps."""
    env = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kaleido_fast", *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path / "small.safetensors", random_mlp(6, 9, 6, sample_shape=(2, 3)), ModelCard("small"))
    return tmp_path


WRITERS = [
    ("sample",),
    ("train", "--preset", "points1d"),
    ("evaluate", "digits"),
    ("attractors",),
    ("show", "samples.npy"),
    ("animate",),
    ("tune",),
]
SMALL = ("sample", "--model", "small.safetensors", "--burn-in", "3")


def test_sample_writes_draws_picture_and_table(folder):
    result = run(*SMALL, "--chains", "50", "--draws", "2", cwd=folder)
    assert result.returncode == 0, result.stderr
    for word in ("chains", "engine", "speed", "residual", "outcome", "samples.npy, samples.json, samples.png"):
        assert word in result.stdout
    assert np.load(folder / "samples.npy").shape == (50, 2, 6)
    assert Image.open(folder / "samples.png").width > 24
    record = json.loads((folder / "samples.json").read_text())
    assert record["request"]["n_chains"] == 50


def test_the_same_command_writes_the_same_bytes_and_fewer_chains_are_a_prefix(folder):
    contents = []
    for name, chains in (("a", "300"), ("b", "300"), ("c", "70")):
        run(*SMALL, "--chains", chains, "--jitter", "0.3", "--out", f"{name}.npy", cwd=folder, check=True)
        contents.append({kind: (folder / f"{name}.{kind}").read_bytes() for kind in ("npy", "json", "png")})
    assert contents[0] == contents[1]
    assert np.array_equal(np.load(folder / "a.npy")[:70], np.load(folder / "c.npy"))


def test_json_is_one_object_and_quiet_is_silent(folder):
    result = run(*SMALL, "--json", "--seed", "random", "--out", "s.npz", cwd=folder)
    figures = json.loads(result.stdout)
    assert figures["n_steps"] == 4
    assert figures["files"] == ["s.npz", "s.png"]
    assert 0 <= figures["request"]["seed"] < 2**64
    quiet = run(*SMALL, "--quiet", "--no-picture", "--out", "q.safetensors", cwd=folder)
    assert quiet.stdout == quiet.stderr == ""
    assert not (folder / "q.png").exists()


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("sampel",), "did you mean 'sample'"),
        ((*SMALL, "--chains", "0"), "n_chains is 0"),
        ((*SMALL, "--chains", "-5"), "n_chains is -5"),
        ((*SMALL, "--chains", "many"), "not a valid integer"),
        ((*SMALL, "--draws", "0"), "n_draws is 0"),
        ((*SMALL, "--seed", "-1"), "seed is -1"),
        ((*SMALL, "--seed", str(2**64)), "seed is"),
        ((*SMALL, "--tol", "tiny"), "neither a number"),
        ((*SMALL, "--engine", "tritn"), "did you mean 'triton'"),
        ((*SMALL, "--device", "cuda:77"), "CUDA devices"),
        ((*SMALL, "--out", "draws.csv"), "unknown format '.csv'"),
        ((*SMALL, "--out", "nowhere/a.npy"), "does not exist"),
        ((*SMALL, "--out", "b.npy", "--chains", "1000000000000"), "free"),
        ((*SMALL, "--bogus"), "No such option"),
        (("sample", "--model", "digts"), "did you mean 'digits'"),
        (("sample", "--model", "gone.safetensors"), "does not exist"),
        (("train",), "nothing to train on"),
        (("train", "--preset", "diggits"), "did you mean 'digits'"),
        (("train", "--data", "gone.npy"), "gone.npy"),
        (("train", "--preset", "points1d", "--steps", "0"), "steps"),
        (("info", "gone.npy"), "not a file"),
        (("info", "x" * 5000), "too long"),
        (("info", "deep.npy"), "recursion"),
        (("train", "--data", "x" * 5000), "too long"),
        *(((*command, "--out", name), "is a folder") for name in ("", "..") for command in WRITERS),
    ],
)
def test_bad_input_is_one_line_status_2_and_touches_nothing(folder, monkeypatch, capsys, args, text):
    monkeypatch.chdir(folder)
    (folder / "samples.npy").write_bytes(b"earlier")
    np.save(folder / "deep.npy", np.zeros((1, 1, 2), np.float32))
    (folder / "deep.json").write_text("[" * 100_000)
    before = sorted(path.name for path in folder.iterdir())
    status, output, errors = call(monkeypatch, capsys, *args)
    assert (status, output) == (2, "")
    assert errors.count("\n") == 1, f"not one line: {errors}"
    assert text in errors
    assert sorted(path.name for path in folder.iterdir()) == before
    assert (folder / "samples.npy").read_bytes() == b"earlier"


def test_bad_input_ends_the_process_with_one_line(folder):
    result = run(*SMALL, "--chains", "0", cwd=folder)
    assert (result.returncode, result.stdout) == (2, "")
    assert (
        result.stderr == "kaleido-fast: n_chains is 0: it must be a whole number from 1 to 4,611,686,018,427,387,904\n"
    )


def test_interrupt_ends_cleanly_and_says_what_was_done(folder):
    command = [
        sys.executable,
        "-m",
        "kaleido_fast",
        *SMALL,
        "--chains",
        "2000000",
        "--burn-in",
        "50000000",  # no block is done, and kept, before the interruption
        "--tol",
        "none",
    ]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    try:
        time.sleep(6)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()  # hours of work where a shell in the background has it ignore the signal
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert [path.name for path in folder.iterdir()] == ["small.safetensors"]


def test_train_then_info_then_sample(folder):
    trained = run("train", "--preset", "points1d", "--steps", "60", "--no-curve", "--json", cwd=folder)
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["files"] == ["points1d.safetensors"]
    info = json.loads(run("info", "points1d.safetensors", "--json", cwd=folder).stdout)
    assert info["dataset"]["n_examples"] == 4
    assert info["network"].startswith("1-10-")
    run("sample", "--model", "points1d.safetensors", "--chains", "20", "--out", "p.npy", cwd=folder, check=True)
    assert not (folder / "p.png").exists(), "points are not pictures"
    draws = json.loads(run("info", "p.npy", "--json", cwd=folder).stdout)
    assert (draws["chains"], draws["dim"]) == (20, 1)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_is_and_what_holds_without_it(command):
    """A switch that is off, and a file that is not given, need no default."""
    found = cli.get_command(None, command)
    for option in found.params:
        if isinstance(option, click.Option):
            said = (option.help or "").endswith(("].", ".")) and (option.help or "")
            assert said, f"{command} {option.opts[0]} says nothing"
            assert not isinstance(option.type, click.types.IntParamType | click.types.FloatParamType) or (
                option.show_default or "[default: " in said or said.startswith("At most")
            ), f"{command} {option.opts[0]}: {said}"


def test_nothing_asked_for_is_answered_with_the_help(folder, monkeypatch, capsys):
    status, output, errors = call(monkeypatch, capsys)
    assert (status, errors) == (0, "")
    assert "  sample      Start chains" in output.splitlines()[output.splitlines().index("Commands:") + 1]


def test_doctor_names_versions_and_every_engine(folder):
    facts = json.loads(run("doctor", "--model", "small.safetensors", "--json", cwd=folder).stdout)
    assert {f"--engine {name}" for name in names.ENGINES} <= facts.keys()
    assert "torch" in facts["versions"]


def test_doctor_shows_one_column_of_facts_and_refuses_no_chains(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    status, out, _ = call(monkeypatch, capsys, "doctor", "--model", "small.safetensors")
    places = {re.match(r".+?\S  +(?=\S)", line).end() for line in out.splitlines()}
    assert status == 0 and len(places) == 1, out
    status, out, err = call(monkeypatch, capsys, "doctor", "--chains", "0")
    assert (status, out, err.count("\n")) == (2, "", 1) and "0 is not in the range" in err


def test_a_warning_of_the_package_takes_one_line(folder, monkeypatch, capsys):
    """As Python shows it, it would come with the place in the code, in two lines."""
    from kaleido_fast.system import devices, tuned

    found, path = devices.device_facts, folder / "My_GPU.json"
    path.write_text("{")
    monkeypatch.setattr(
        devices,
        "device_facts",
        lambda device: replace(found(device), tuned=tuned.tuned_in("My GPU", ((path, 0),))),
    )
    monkeypatch.chdir(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # main replaces it
        monkeypatch.setattr(warnings, "showwarning", lambda *told: sys.stderr.write(warnings.formatwarning(*told[:4])))
        status, _, err = call(monkeypatch, capsys, "doctor", "--model", "small.safetensors")
    assert status == 0
    assert err.startswith("kaleido-fast: ignored: ") and err.count("\n") == 1 and "is no tuned table" in err


def test_how_data_are_read_takes_one_line(folder, monkeypatch, capsys):
    Image.new("RGBA", (4, 4)).save(folder / "clear.png")
    monkeypatch.chdir(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # main replaces it
        monkeypatch.setattr(warnings, "showwarning", lambda *told: sys.stderr.write(warnings.formatwarning(*told[:4])))
        status, _, err = call(monkeypatch, capsys, "train", "--data", "clear.png", "--steps", "0")
    assert status == 2
    assert err.startswith("kaleido-fast: data clear.png: 1 of 1 pictures are transparent") and err.count("\n") == 2


@pytest.mark.parametrize("command", ["", "sample", "train", "info", "doctor"])
def test_help_does_not_load_torch(command):
    code = (
        "import sys, click; from kaleido_fast.cli import cli\n"
        f"try: cli.main([*{command.split()!r}, '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, "help imports torch or numpy"
    assert "Usage:" in result.stdout


def test_names_for_help_are_the_names_of_the_model():
    assert set(names.ACTIVATIONS) == set(ACTIVATIONS)
    assert set(names.BOUNDS) == set(BOUNDS)
