"""Configurations that write files or analyse results, and the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import runpy
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import kaleido_fast as kf
from benchmarks.bits.case import Case, Found, Note
from benchmarks.bits.networks import (
    CYCLING,
    NETWORKS,
    SHAPES,
    Network,
    given_states,
    normed,
    random_network,
    residual,
    sequential,
)
from benchmarks.bits.sampling import RECURSIONS, Options


def checkpoint(network: nn.Module | None = None, **sampling: Any) -> str:
    """A checkpoint in the current folder, which is emptied after each configuration."""
    model = SHAPES["small"]() if network is None else network
    kf.save_checkpoint("net.safetensors", model, kf.ModelCard("net", sampling=sampling, scaling=kf.Scaling(0.5, 0.1)))
    return "net.safetensors"


def command_line(*arguments: str) -> Found:
    """`python -m kaleido_fast` with arguments, in this process: status, standard output and standard error."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["kaleido-fast", *arguments]
    status: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_module("kaleido_fast", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code
    finally:
        sys.argv = before
    errors = err.getvalue()
    return [status, out.getvalue(), *([errors, Note(errors)] if status else [Note(errors)])]


def interrupt(progress: Any) -> None:
    """A callback that stops a run after its first block or step."""
    if getattr(progress, "chains_done", 1) >= 1 and getattr(progress, "step", 3) >= 3:
        raise KeyboardInterrupt


STORED: Options = {"n_chains": 300, "chunk_chains": 128, **RECURSIONS["draws"]}


def stored(ending: str, *, interrupted: bool = False, damaged: bool = False, **options: Any) -> Found:
    """`sample_to` in several blocks, and the draws as they are read back."""
    options = {**STORED, **options}
    path = Path(f"out.{ending}")
    model = checkpoint(random_network(8, 2048, 8))  # of this width a block can be as small as 128 chains
    if interrupted:
        with contextlib.suppress(KeyboardInterrupt):
            kf.sample_to(path, model, **options, callback=interrupt)
    if damaged:
        kf.sample_to(path, model, **options)
        chunk = next(file for file in sorted((path / "draws").iterdir()) if file.name != "zarr.json")
        chunk.write_bytes(chunk.read_bytes()[:-9])
    result = kf.sample_to(path, model, **options, repair=damaged)
    assert result is not None
    draws = kf.open_draws(path)
    return [Note(result.plan.kernel), result.stored, sorted(result.files), draws.record, draws[:], draws[[5, 129, 3]]]


def recorded(model: Network, **options: Any) -> Found:
    result = kf.sample_to("out.npy", model(), n_chains=5, **options)
    return [result and result.stored]


def joined() -> Found:
    model, found = checkpoint(random_network(8, 2048, 8)), []
    for part, first, n in (("a", 0, 256), ("b", 256, 128), ("c", 384, 20)):
        kf.sample_to(f"{part}.zarr", model, **{**STORED, "first_chain": first, "n_chains": n})
    found += command_line("join", "out.zarr", "a.zarr", "b.zarr", "c.zarr")
    draws = kf.open_draws("out.zarr")
    return [*found, *(draws.per_chain(name) for name in ("residual", "steps", "period", "outcome"))]


def catalogued(network: Network, **options: Any) -> Found:
    model = network()
    result = kf.fast_sample(model, n_chains=60, burn_in=199, **options)
    examples = given_states(model, 9)
    return list(dataclasses.asdict(kf.attractors(result, model, data=examples)).values())


def reloaded() -> Found:
    path = checkpoint(burn_in=3, jitter=0.25, settle=1)
    loaded = kf.load_checkpoint(path)
    again = kf.fast_sample(path, n_chains=9)
    return [loaded.model_hash, loaded.card, loaded.model.spec, again.draws, again.request.as_dict()]


def damaged_checkpoint() -> Found:
    content = bytearray(Path(checkpoint()).read_bytes())
    content[-3] ^= 1
    Path("net.safetensors").write_bytes(content)
    return [kf.load_checkpoint("net.safetensors")]


def trained(resumed: bool = False) -> Found:
    """A training that is stopped at its third step, and once more: its state in a file."""
    data = given_states(SHAPES["small"](), 40).numpy()
    for _ in range(1 + resumed):
        with contextlib.suppress(KeyboardInterrupt):
            kf.train(data, spec=kf.ModelSpec((6, 12, 6)), recipe="published", state="state", seed=4, callback=interrupt)
    return [Path("state").exists()]


def with_files(*arguments: str) -> Found:
    """A command line beside a checkpoint ``net.safetensors``, examples ``data.npy`` and draws ``draws.npy``."""
    checkpoint(random_network(4, 16, 4, sample_shape=(2, 2)), burn_in=9, jitter=0.2, settle=2)
    kf.sample_to("draws.npy", "net.safetensors", n_chains=10, n_draws=3, thin=3)
    np.save("data.npy", given_states(random_network(4, 4), 30).numpy().reshape(30, 2, 2))
    return command_line(*arguments)


def planned(network: Network) -> Found:
    """What `doctor` plans for an H200: a text that is shown, not hashed."""
    status, text, *_ = command_line("doctor", "--model", checkpoint(network()), "--json")
    return [status, Note("; ".join(f"{name}: {plan}" for name, plan in json.loads(text).items() if "H200" in name))]


def reported(**options: Any) -> Found:
    """What a callback is told at the end; when it is told anything before depends on the time."""
    told: list[Any] = []
    kf.fast_sample(SHAPES["small"](), n_chains=70, **options, callback=told.append)
    return [told[-1].chains_done, told[-1].chain_steps_done, told[-1].chain_steps]


def file_cases() -> Iterator[Case]:
    """Stores, checkpoints, catalogues of attractors, trainings."""
    for ending in ("zarr", "npy"):
        yield Case(f"store/{ending}", partial(stored, ending))
        yield Case(f"store/{ending}/float16", partial(stored, ending, dtype="float16"))
        yield Case(f"store/{ending}/uint8", partial(stored, ending, dtype="uint8"))
        yield Case(f"store/{ending}/resumed", partial(stored, ending, interrupted=True))
        yield Case(f"store/{ending}/freeze", partial(stored, ending, n_draws=2, jitter=0, tol=0.05))
        yield Case(f"store/{ending}/reference", partial(stored, ending, n_chains=130, engine="reference"))
    yield Case("store/zarr/fp64", partial(stored, "zarr", n_chains=130, engine="reference", precision="fp64"))
    yield Case("store/zarr/repaired", partial(stored, "zarr", damaged=True))
    yield Case("store/zarr/devices", partial(stored, "zarr", device=["cpu", "cpu:0"]))
    yield Case("store/npz", partial(stored, "npz"))
    yield Case("store/joined", joined)
    yield Case("store/of-module", partial(recorded, sequential))
    yield Case("store/narrow", partial(recorded, checkpoint, kernel="narrow"), interpreted=True)
    yield Case("open/missing", lambda: [kf.open_draws("nothing.npy")])
    for net, network in {**CYCLING, "small": SHAPES["small"], "one-value": SHAPES["one-value"]}.items():
        yield Case(f"attractors/{net}", partial(catalogued, network, tol=1e-5))
    yield Case("attractors/of-jitter", partial(catalogued, SHAPES["small"], jitter=0.1))
    yield Case("checkpoint/reloaded", reloaded)
    yield Case("checkpoint/damaged", damaged_checkpoint)
    yield Case("checkpoint/missing", lambda: [kf.load_checkpoint("digitz")])
    yield Case("checkpoint/of-residual", lambda: [checkpoint(residual())])
    yield Case("checkpoint/of-normed", lambda: [checkpoint(normed())])
    for net in ("small", "wide300", "even128", "faint-layer", "past-fp16"):
        yield Case(f"doctor/{net}", partial(planned, NETWORKS[net]))
    for engine in ("reference", "cpu"):
        for name in ("draws", "freeze"):
            yield Case(f"callback/{engine}/{name}", partial(reported, engine=engine, **RECURSIONS[name]))
    yield Case("train/stopped", trained)
    yield Case("train/resumed", partial(trained, resumed=True))


COMMANDS = {
    "sample-npy": "sample --model net.safetensors --chains 20 --out s.npy --json",
    "sample-npz": "sample --model net.safetensors --chains 20 --out s.npz --draws 2 --thin 5 --json",
    "sample-safetensors": "sample --model net.safetensors --chains 20 --out s.safetensors --draws 2 --json",
    "sample-zarr": "sample --model net.safetensors --chains 20 --out s.zarr --dtype uint8 --json",
    "sample-cycles": "sample --model net.safetensors --chains 20 --out s.npy --jitter 0 --retire-cycles --quiet",
    "sample-digits": "sample --chains 9 --burn-in 5 --noise upstream --picture-chains 4 --quiet",
    "sample-again": "sample --model net.safetensors --chains 20 --out draws.npy --quiet",
    "sample-dtype-npz": "sample --model net.safetensors --out s.npz --dtype float16",
    "sample-bad-kernel": "sample --kernel broad",
    "sample-bad-tol": "sample --jitter 0.1 --tol 0.1",
    "info-checkpoint": "info net.safetensors --json",
    "info-draws": "info draws.npy --json",
    "info-digits": "info digits --json",
    "evaluate": "evaluate net.safetensors --data data.npy --chains 40 --burn-in 9 --k 3 --json",
    "evaluate-draws": "evaluate net.safetensors --data data.npy --draws draws.npy --k 3 --json",
    "attractors": "attractors --model net.safetensors --chains 50 --burn-in 99 --data data.npy --quiet",
    "show": "show draws.npy --all-draws --quiet",
    "show-page": "show draws.npy --out page.html --quiet",
    "animate": "animate --model net.safetensors --chains 6 --steps 5 --out a.gif --out a.html --out a.png --quiet",
    "train": "train --data data.npy --steps 6 --hidden 8 --layers 3 --held-out 5 --no-curve --out t.st --quiet",
    "train-published": "train --preset points2d --recipe published --steps 5 --no-curve --out t.safetensors --quiet",
    "unknown": "smaple",
}
HELP = ["", "sample", "join", "train", "attractors", "show", "animate", "evaluate"]
HELP += ["bench", "tune", "reproduce", "info", "doctor"]


def command_cases() -> Iterator[Case]:
    """The command line, and the signatures of the public functions."""
    for name, line in COMMANDS.items():
        yield Case(f"cli/{name}", partial(with_files, *line.split()))
    for name in HELP:
        yield Case(f"help/{name or 'all'}", partial(command_line, *[name] * bool(name), "--help"))
    for name in kf.__all__:
        if callable(getattr(kf, name)) and not inspect.isclass(getattr(kf, name)):
            yield Case(f"signature/{name}", partial(signature, name))
    yield Case("signature/all", lambda: [sorted(kf.__all__)])


def signature(name: str) -> Found:
    return [[(p.name, p.kind.name, p.default) for p in inspect.signature(getattr(kf, name)).parameters.values()]]
