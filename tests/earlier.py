"""Files as an earlier version left them, finished and unfinished, in data/earlier.tar.xz; and what wrote them.

Run as a program in a checkout of that version, this file writes them anew: see data/README.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kaleido_fast import (
    KaleidoMLP,
    ModelCard,
    ModelSpec,
    Scaling,
    load_dataset,
    open_draws,
    sample_to,
    save_checkpoint,
    train,
)
from kaleido_fast.presets import TrainingRecipe

ARCHIVE = Path(__file__).parent / "data" / "earlier.tar.xz"
VALUES, STATE = "values.json", "unfinished.training"
FINISHED: dict[str, Any] = {"n_chains": 40, "n_draws": 3, "thin": 4, "seed": 7, "device": "cpu"}
UNFINISHED: dict[str, Any] = {
    "n_chains": 4096 + 700,
    "chunk_chains": 4096,
    "burn_in": 30,
    "seed": 2**63 + 5,
    "device": "cpu",
}
OF_ENGINE: dict[str, dict[str, Any]] = {
    "reference": {"n_draws": 2, "thin": 3, "jitter": 0.3, "settle": 1},
    "cpu": {},
    "triton": {"tol": None, "burn_in": 3},
}
WHOLE = tuple(f"finished-{engine}.{ending}" for engine in ("reference", "cpu") for ending in ("zarr", "npy"))
LEFT = (
    *(f"unfinished-{engine}.{ending}" for engine in ("reference", "cpu") for ending in ("zarr", "npy")),
    "unfinished-triton.zarr",
)
RECIPE: dict[str, Any] = {"steps": 30, "batch_size": 4, "learning_rate": 0.01, "noise": 0.1, "held_out": 0}

CARD = ModelCard(
    "soft",
    {"steps": 3, "noise": 0.5},
    {"name": "none", "sha256": "0" * 64, "n_examples": 2},
    Scaling(0.5, 0.25),
    0.125,
    {"stable_share": 0.5},
    {"burn_in": 20, "jitter": 0.0, "settle": 1},
    {"torch": "2"},
)


def unpack(folder: Path) -> dict[str, Any]:
    """Put the files of the earlier version into a folder; what it said of them: ``hashes`` and ``values``, by name."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return json.loads((folder / VALUES).read_text())


def soft_network() -> KaleidoMLP:
    """Smooth, and unlike the defaults in what can be said of a network."""
    spec = ModelSpec(
        (6, 7, 6), activation="leaky_relu", negative_slope=0.2, bound="sigmoid", sample_shape=(2, 3), bias=(True, False)
    )
    return filled(KaleidoMLP(spec), 1.5, seed=3)


def sharp_network() -> KaleidoMLP:
    """Its values are -1 or 1 on every machine, however that rounds: tanh of large numbers. Periods are 1 and 3."""
    return filled(KaleidoMLP(ModelSpec((4, 8, 4))), 3000.0, seed=0)


def filled(model: KaleidoMLP, scale: float, seed: int) -> KaleidoMLP:
    """Seeded normal weights and biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, scale / parameter.shape[-1] ** 0.5, generator=generator)
    return model.eval()


def stop(state: Any) -> None:
    """As Ctrl-C, when the second block is computed, while the first one is written."""
    if state.chains_done > 4096:
        raise KeyboardInterrupt


def finished_options(name: str) -> dict[str, Any]:
    """What a finished output was asked for, by its name."""
    engine, _, ending = name.removeprefix("finished-").partition(".")
    return {**FINISHED, "engine": engine, "dtype": "uint8" if ending == "npy" else None}


def unfinished_options(name: str) -> dict[str, Any]:
    """What an unfinished output was asked for, by its name."""
    engine = name.removeprefix("unfinished-").partition(".")[0]
    return {**UNFINISHED, "engine": engine, **OF_ENGINE[engine]}


def leave_unfinished(name: str) -> None:
    try:
        sample_to(name, "sharp.safetensors", callback=stop, **unfinished_options(name))
    except KeyboardInterrupt as stopped:
        print(stopped)


def read_values(path: Path) -> dict[str, Any]:
    """What the code reads of a finished output: a digest of the draws, and of what is known of chains."""
    draws = open_draws(path)
    values: dict[str, Any] = {
        "shape": list(draws.shape),
        "draws": digest(draws[:].numpy()),
        "first": draws[:1].flatten().tolist(),
    }
    if path.suffix == ".zarr":
        values |= {name: digest(draws.per_chain(name)) for name in ("residual", "steps", "period", "outcome")}
    return values


def digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def write_checkpoints() -> dict[str, str]:
    """Both networks; their hashes by name."""
    return {
        "soft": save_checkpoint("soft.safetensors", soft_network(), CARD),
        "sharp": save_checkpoint("sharp.safetensors", sharp_network(), ModelCard("sharp")),
    }


def write_draws() -> dict[str, Any]:
    """Finished and unfinished outputs; what this code reads of the finished ones, by name."""
    values = {}
    for name in WHOLE:
        sample_to(name, "soft.safetensors", **finished_options(name))
        values[name] = read_values(Path(name))
    for name in LEFT:
        leave_unfinished(name)
    return values


def train_points(folder: Path, **options: Any) -> Any:
    """A small training on the points in a folder."""
    recipe = TrainingRecipe(**RECIPE)
    return train(load_dataset(folder / "points.npy"), spec=ModelSpec((2, 6, 2)), recipe=recipe, device="cpu", **options)


def write_training() -> None:
    """Data and a training that was stopped."""
    np.save("points.npy", np.linspace(-0.9, 0.9, 16, dtype=np.float32).reshape(8, 2))

    def stop_training(state: Any) -> None:
        if state.step == 12:
            raise KeyboardInterrupt

    try:
        train_points(Path(), state=STATE, callback=stop_training)
    except KeyboardInterrupt as stopped:
        print(stopped)


def main(folder: Path) -> None:
    """Fill a new folder."""
    folder.mkdir()
    os.chdir(folder)
    torch.set_num_threads(1)
    stated = {"hashes": write_checkpoints(), "values": write_draws()}
    Path(VALUES).write_text(json.dumps(stated, indent=1))
    write_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
