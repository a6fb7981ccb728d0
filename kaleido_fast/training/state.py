"""The state of an unfinished training run: one safetensors file, enough to go on bit for bit.

Tensors: ``model.*``, ``best.*`` (kept weights), ``adam.<parameter>.<moment>`` and ``running`` (sum of recent losses).
One metadata entry ``kaleido_fast_training``: JSON with ``version``, ``request`` (what is being trained) and
``position`` (JSON texts), and ``checksum``, see `kaleido_fast.system.sealed`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from kaleido_fast.errors import InputError
from kaleido_fast.system.sealed import UNREADABLE, checksum_of, read_sealed, write_sealed
from kaleido_fast.system.tensor_files import open_tensors

ENTRY, VERSION = "kaleido_fast_training", "1"


def save_state(path: Path, request: dict[str, Any], position: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the state; an earlier one stays whole until this one is."""
    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    texts = {"request": json.dumps(request, sort_keys=True), "position": json.dumps(position)}
    write_sealed(path, ENTRY, VERSION, texts, held, _checksum(texts, held))


def load_state(path: Path, request: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read position and tensors back.

    Raises:
        InputError: the file is damaged, of another format, or of another request (the difference is named).
    """
    try:
        metadata, tensors = read_sealed(path)
    except UNREADABLE as problem:
        text = " ".join(str(problem).split())
        raise InputError(f"training state {path} cannot be read: {text}; delete it to start anew") from problem
    header = _parse_header(path, metadata)
    texts = {key: str(header.get(key)) for key in ("request", "position")}
    if header.get("checksum") != _checksum(texts, tensors):
        raise InputError(f"training state {path} is damaged: its checksum does not match; delete it to start anew")
    _check_request(path, json.loads(texts["request"]), json.loads(json.dumps(request)))
    return json.loads(texts["position"]), tensors


def read_request(path: Path) -> dict[str, Any] | None:
    """What the run in a state file trains; None for a file that is no state of this release."""
    try:
        with open_tensors(path, "pt") as file:
            request = json.loads(_parse_header(path, file.metadata() or {})["request"])
    except (InputError, SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None
    return request if isinstance(request, dict) else None


def _parse_header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        header = json.loads(metadata.get(ENTRY, "{}"))
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("version") != VERSION:
        raise InputError(f"{path} is not a training state of this release: give another path for the state")
    return header


def _check_request(path: Path, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    for key in sorted(stored.keys() | asked.keys()):
        if stored.get(key) != asked.get(key):
            raise InputError(
                f"training state {path} belongs to another run: {key} was {stored.get(key)}, now {asked.get(key)}; "
                "ask for the same, or delete the file to start anew (train --overwrite does)"
            )


def _checksum(texts: dict[str, str], tensors: dict[str, Tensor]) -> str:
    return checksum_of(json.dumps(texts, sort_keys=True), tensors)
