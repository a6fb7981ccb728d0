"""Safetensors files with a checksum, which safetensors has not: checkpoints, and states of unfinished trainings.

All that is said besides the tensors is one metadata entry, JSON with ``version``, some texts and ``checksum``. One
entry, because safetensors writes several in random order: equal contents would differ in bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kaleido_fast.system.files import atomic_path
from kaleido_fast.system.tensor_files import open_tensors, write_tensors

UNREADABLE = (SafetensorError, OSError, ValueError, RuntimeError, TypeError, OverflowError, AttributeError)


def write_sealed(
    path: Path, entry: str, version: str, texts: Mapping[str, str], tensors: dict[str, Tensor], checksum: str
) -> None:
    """Write a file in place of what is there; it appears only when whole.

    Args:
        path: the file.
        entry: name of the metadata entry.
        version: of the format.
        texts: what else is said.
        tensors: on the CPU, contiguous, none of which shares memory with another.
        checksum: of texts and tensors, see `checksum_of`.

    Raises:
        InputError: it cannot be written.
    """
    header = json.dumps({"version": version, **texts, "checksum": checksum}, sort_keys=True)
    with atomic_path(path) as temporary:
        write_tensors(save_file, tensors, temporary, {entry: header})


def read_sealed(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """All metadata and all tensors of a file, not yet compared with its checksum.

    Raises:
        UNREADABLE: it is missing, cut short or no safetensors file.
    """
    with open_tensors(path, "pt") as file:
        names = file.keys()
        return file.metadata() or {}, {name: file.get_tensor(name) for name in names}


def checksum_of(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a text and of tensors on the CPU with their names, shapes and types: 64 hexadecimal digits."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
