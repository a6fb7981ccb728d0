"""Files of draws: .npy (with a JSON of the same name beside it), .npz and .safetensors.

All hold ``draws`` (n_chains, n_draws, D) in model values; .npz and .safetensors also ``residual``, ``steps``,
``period`` and ``outcome``. Each carries a record, see `kaleido_fast.storing.record`.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from kaleido_fast.errors import InputError, unknown_name
from kaleido_fast.names import OUTPUT_ENDINGS
from kaleido_fast.running.result import SampleResult
from kaleido_fast.storing.layout import ARRAYS
from kaleido_fast.system.files import atomic_path, check_room, check_writable
from kaleido_fast.system.tensor_files import write_tensors

MEMORY_ENDINGS = (".npy", ".npz", ".safetensors")


def check_output(path: Path, n_bytes: int) -> None:
    """Refuse an output before any work: unknown ending, folder, read-only, or ``n_bytes`` do not fit the disk."""
    if path.suffix not in OUTPUT_ENDINGS:
        raise unknown_name("format", path.suffix or path.name, OUTPUT_ENDINGS)
    check_writable(path)
    check_room(path, n_bytes)


def record_path(path: Path) -> Path:
    """The JSON beside a bare .npy."""
    return path.with_suffix(".json")


def write_draws(path: Path, result: SampleResult, record: dict[str, Any]) -> list[Path]:
    """Write draws in the format of the path's ending; files appear when whole. Returns what was written.

    Raises:
        InputError: unknown ending, or a path that cannot be written.
    """
    if path.suffix not in MEMORY_ENDINGS:
        raise InputError(f"{path} is written by sample_to, block by block: here {', '.join(MEMORY_ENDINGS)} are known")
    text = json.dumps(record, sort_keys=True)
    arrays = {name: getattr(result, name).cpu().numpy() for name in ARRAYS}
    check_output(path, sum(array.nbytes for array in arrays.values()))
    with ExitStack() as stack:
        temporary = stack.enter_context(atomic_path(path))
        if path.suffix == ".npy":
            beside = stack.enter_context(atomic_path(record_path(path)))
            beside.write_text(json.dumps(record, sort_keys=True, indent=1) + "\n")
            with temporary.open("wb") as file:
                np.save(file, arrays["draws"], allow_pickle=False)
        elif path.suffix == ".npz":
            with temporary.open("wb") as file:
                np.savez(file, allow_pickle=False, record=np.array(text), **arrays)
        else:
            write_tensors(save_file, arrays, temporary, {"record": text})
    return [path, record_path(path)] if path.suffix == ".npy" else [path]
