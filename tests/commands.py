"""Commands of seconds, run in a folder that has a model, its data and a file of draws."""

from __future__ import annotations

from pathlib import Path

SAMPLE = ("sample", "--model", "m.safetensors", "--chains", "9", "--burn-in", "2", "--engine", "reference", "--out")
TRAIN = ("train", "--data", "data.npy", "--steps", "3", "--hidden", "5", "--layers", "2", "--seed", "4", "--out")


def make_folder(name: str) -> Path:
    """A folder in the one to work in."""
    Path(name).mkdir()
    return Path(name)
