"""Commands of seconds, run in a folder that has a model, its data and a file of draws."""

from __future__ import annotations

SAMPLE = ("sample", "--model", "m.safetensors", "--chains", "9", "--burn-in", "2", "--engine", "reference", "--out")
TRAIN = ("train", "--data", "data.npy", "--steps", "3", "--hidden", "5", "--layers", "2", "--seed", "4", "--out")
