"""Files of draws: .npy (with a JSON of the same name beside it), .npz and .safetensors; they and stores are read back.

All hold ``draws`` (n_chains, n_draws, D) in model values; .npz and .safetensors also ``residual``, ``steps``,
``period`` and ``outcome``. Each carries a record: request, seed, model hash, versions, sample shape and scaling.
Records hold no time of day, so that the same command writes the same bytes.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kaleido_fast.checkpoint import Scaling
from kaleido_fast.encoding import Encoding
from kaleido_fast.errors import InputError, unknown_name
from kaleido_fast.files import atomic_path, check_writable
from kaleido_fast.model import ModelSpec
from kaleido_fast.names import OUTPUT_ENDINGS
from kaleido_fast.result import SampleResult

RECORD_VERSION = 1
PER_CHAIN = ("residual", "steps", "period", "outcome")
MEMORY_ENDINGS = (".npy", ".npz", ".safetensors")


@dataclass(frozen=True)
class DrawsFile:
    """A file of draws as read back: ``draws`` (n_chains, n_draws, D), and the record beside it.

    Draws of a store are a `kaleido_fast.draws.StoredDraws`, which reads what is asked for and takes NumPy's indices.
    """

    draws: Any
    record: dict[str, Any]
    path: Path


def check_output(path: Path, n_bytes: int) -> None:
    """Refuse an output before any work: unknown ending, folder, read-only, or ``n_bytes`` do not fit the disk."""
    if path.suffix not in OUTPUT_ENDINGS:
        raise unknown_name("format", path.suffix or path.name, OUTPUT_ENDINGS)
    check_writable(path)
    free = shutil.disk_usage(path.parent).free
    if n_bytes > free:
        raise InputError(
            f"output {path} needs {n_bytes:,} bytes, {free:,} are free there: free some or write elsewhere"
        )


def make_record(result: SampleResult, spec: ModelSpec | None, scaling: Scaling | None) -> dict[str, Any]:
    """All that is needed to repeat the run and to draw its states."""
    record = {"format": "kaleido-fast draws", "version": RECORD_VERSION, **result.record()}
    if spec is not None:
        record["model"] = json.loads(spec.to_json())
    if scaling is not None:
        record["scaling"] = asdict(scaling)
    return record


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
    arrays = {name: getattr(result, name).cpu().numpy() for name in ("draws", *PER_CHAIN)}
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
            save_file(arrays, temporary, {"record": text})
    return [path, record_path(path)] if path.suffix == ".npy" else [path]


def read_draws(path: Path) -> DrawsFile:
    """Read a file of draws back; a .npy stays on disk (memory-mapped) unless it holds bytes; a store stays there too.

    Raises:
        InputError: missing, foreign or damaged.
    """
    if path.suffix == ".zarr":
        from kaleido_fast.draws import StoredDraws
        from kaleido_fast.stores import ZarrOutput

        store = ZarrOutput.open(path)
        return DrawsFile(StoredDraws(store), store.record, path)
    if not path.is_file():
        raise InputError(f"{path} is not a file: give a .npy, .npz or .safetensors file of draws, or a .zarr store")
    try:
        draws, record = _read(path)
    except (OSError, ValueError, KeyError, EOFError, SafetensorError, zipfile.BadZipFile) as problem:
        text = " ".join(str(problem).split())
        raise InputError(f"{path} cannot be read as draws: {text}; it may be cut short or foreign") from problem
    encoding = Encoding.from_record(record)
    if encoding is not None and encoding.dtype == "uint8" == str(draws.dtype):
        draws = encoding.decode(draws)
    if draws.ndim != 3 or draws.dtype.kind != "f":
        raise InputError(f"{path} holds {draws.dtype} of shape {draws.shape}: draws are floats (chains, draws, D)")
    return DrawsFile(draws, record, path)


def _read(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    if path.suffix == ".npy":
        beside = record_path(path)
        record = json.loads(beside.read_text()) if beside.is_file() else {}
        return np.load(path, mmap_mode="r", allow_pickle=False), _checked_record(record)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return archive["draws"], _checked_record(json.loads(str(archive["record"])))
    if path.suffix == ".safetensors":
        with safe_open(path, framework="np") as file:
            return file.get_tensor("draws"), _checked_record(json.loads((file.metadata() or {})["record"]))
    raise unknown_name("format", path.suffix, OUTPUT_ENDINGS)


def _checked_record(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise InputError("the record beside the draws is not a JSON object")
    return record
