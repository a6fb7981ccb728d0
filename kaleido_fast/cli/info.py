"""``kaleido-fast info``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from kaleido_fast.cli.output import say_json
from kaleido_fast.errors import InputError
from kaleido_fast.system.valid_json import json_text

MOST_CHUNKS = 64  # of a store, which are read to find the range of its draws


@click.command(name="info", short_help="Say what a checkpoint or a file of draws holds.")
@click.argument("source", metavar="MODEL|FILE")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(source: str, as_json: bool) -> None:
    """Say what a checkpoint, a bundled model or a file of draws holds."""
    facts = describe(source)
    if as_json:
        say_json(facts)
        return
    for name, value in facts.items():
        text = json_text(value) if isinstance(value, (dict, list)) else str(value)
        click.echo(f"{name:16} {text}")


def describe(source: str) -> dict[str, Any]:
    """Facts about a checkpoint or a file of draws, as plain values."""
    path = Path(source)
    if path.suffix in (".npy", ".npz", ".zarr") or (
        path.suffix == ".safetensors" and path.is_file() and _holds_draws(path)
    ):
        return _describe_draws(path)
    return _describe_checkpoint(source)


def _holds_draws(path: Path) -> bool:
    from safetensors import SafetensorError

    from kaleido_fast.system.tensor_files import open_tensors

    try:
        with open_tensors(path, "np") as file:
            return "record" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False  # read as a checkpoint, whose reader names what is wrong


def _describe_draws(path: Path) -> dict[str, Any]:
    from kaleido_fast.storing.draws import read_draws

    file = read_draws(path)
    n_chains, n_draws, dim = file.draws.shape
    if not file.draws.size:
        raise InputError(f"{path} holds no draws: its shape is {file.draws.shape}")
    return {
        "kind": "draws",
        "chains": n_chains,
        "draws per chain": n_draws,
        "dim": dim,
        "dtype": str(file.draws.dtype),
        **(_describe_blocks(path) if path.suffix == ".zarr" else _range([file.draws])),
        **{name: value for name, value in file.record.items() if name not in ("format", "version")},
    }


def _describe_blocks(path: Path) -> dict[str, Any]:
    """How much of a store is done, and the range of its draws: of large stores that of some chunks, evenly spaced."""
    from kaleido_fast.storing.zarr_output import ZarrOutput

    output = ZarrOutput.open(path)
    layout = output.layout
    done = output.done()
    whole = [block for block in range(layout.n_blocks) if done[block]]
    facts = {
        "finished": len(whole) == layout.n_blocks,
        "chains done": sum(map(layout.length, whole)),
        "chains per chunk": layout.chunk_chains,
    }
    looked_at = whole if len(whole) <= MOST_CHUNKS else whole[:: -(-len(whole) // MOST_CHUNKS)]
    found = _range(layout.encoding.decode(output.read("draws", block)) for block in looked_at)
    if len(looked_at) < len(whole):
        return facts | {f"{name} of {len(looked_at)} chunks": value for name, value in found.items()}
    return facts | found


def _range(parts: Iterable[Any]) -> dict[str, Any]:
    import numpy as np

    ends = [(float(np.min(part)), float(np.max(part))) for part in parts]
    return {"range": [min(low for low, _ in ends), max(high for _, high in ends)]} if ends else {}


def _describe_checkpoint(source: str) -> dict[str, Any]:
    from dataclasses import asdict

    from kaleido_fast.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(source)
    spec = checkpoint.model.spec
    return {
        "kind": "checkpoint",
        "path": str(checkpoint.path),
        "network": "-".join(map(str, spec.widths)),
        "activation": spec.activation,
        "bound": spec.bound,
        "data range": [spec.low, spec.high],
        "sample shape": list(spec.sample_shape),
        "parameters": spec.n_parameters,
        "model_hash": checkpoint.model_hash,
        **asdict(checkpoint.card),
    }
