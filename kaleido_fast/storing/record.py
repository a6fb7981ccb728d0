"""Records: what stands beside draws, so that their run can be repeated and continued, and not be mistaken for another.

A record holds no time of day and no place: the same command writes the same bytes.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from kaleido_fast.checkpoint import Scaling
from kaleido_fast.engines.available import cpu_arithmetic
from kaleido_fast.model import ModelSpec
from kaleido_fast.planning.options import ADDED_LATER
from kaleido_fast.running.blocks import Run
from kaleido_fast.running.result import SampleResult
from kaleido_fast.storing.encoding import Encoding
from kaleido_fast.system.devices import device_facts
from kaleido_fast.system.threads import deciding_threads
from kaleido_fast.system.versions import library_versions

RECORD_FORMAT, RECORD_VERSION = "kaleido-fast draws", 1
_COMPILERS = {"cpu": ("numba",), "triton": ("triton",)}  # libraries of an engine on which bits depend
_SHORT = ("request", "model_hash", "engine", "device", "versions")
_COMPARED = (
    "request",
    "model_hash",
    "model",
    "dim",
    "data_range",
    "engine",
    "arithmetic",
    "kernels",
    "device",
    "threads",
    "versions",
    "encoding",
    "scaling",
)
_NOT_COMPARED = ("versions.python", "versions.numpy")


def make_record(result: SampleResult, spec: ModelSpec | None, scaling: Scaling | None) -> dict[str, Any]:
    """The record of a run that is in memory: all that is needed to repeat it and to draw its states."""
    record = {"format": RECORD_FORMAT, "version": RECORD_VERSION, **result.record()}
    return record | _model(spec) | _scaling(scaling)


def planned_record(run: Run, scaling: Scaling | None) -> dict[str, Any]:
    """What `make_record` will say of a run, as far as it is compared."""
    record: dict[str, Any] = {
        "request": run.request.as_dict(),
        "model_hash": run.subject.model_hash,
        "engine": run.plan.engine,
        "device": str(run.device),
        "versions": library_versions(),
    }
    return record | _model(run.subject.spec) | _scaling(scaling)


def stored_record(run: Run, encoding: Encoding, scaling: Scaling | None) -> dict[str, Any]:
    """The record of a run that is stored block by block: all that determines the bits of the output; nothing else."""
    subject, engine, device = run.subject, run.plan.engine, run.device
    record: dict[str, Any] = {
        "format": RECORD_FORMAT,
        "version": RECORD_VERSION,
        "request": run.request.as_dict(),
        "model_hash": subject.model_hash,
        "engine": engine,
        "device": device_facts(device).name if device.type == "cuda" else device.type,
        "versions": library_versions(*_COMPILERS.get(engine, ())),
        "encoding": encoding.as_dict(),
    }
    if engine == "triton":
        record["kernels"] = run.plan.kernels
    arithmetic = cpu_arithmetic(engine, run.request.precision) if device.type == "cpu" else ""
    if arithmetic:
        record["arithmetic"] = arithmetic
    if engine == "reference" and deciding_threads(device) is not None:
        record["threads"] = deciding_threads(device)
    if subject.spec is None:
        record |= {"dim": int(subject.dim), "data_range": list(map(float, subject.data_range))}
    return record | _model(subject.spec) | _scaling(scaling)


def _model(spec: ModelSpec | None) -> dict[str, Any]:
    return {} if spec is None else {"model": json.loads(spec.to_json())}


def _scaling(scaling: Scaling | None) -> dict[str, Any]:
    return {} if scaling is None else {"scaling": asdict(scaling)}


def short_record(stored: dict[str, Any]) -> dict[str, Any]:
    """Request, model hash, engine, device and versions of a record that is in an output."""
    return {name: stored[name] for name in _SHORT}


def difference(stored: dict[str, Any], asked: dict[str, Any]) -> str:
    """What two records do not have in common, as far as bits depend on it; empty where they agree."""
    earlier = names_no_kernel(stored), names_no_kernel(asked)
    if earlier[0] != earlier[1] and stored["request"]["precision"] == "tf32":
        return "an earlier version rounded its tf32 weights in another way"
    in_bf16 = stored.get("engine") == "cpu" and stored["request"].get("precision") == "bf16"
    if in_bf16 and "arithmetic" not in stored:
        return "an earlier version did not say by which instructions it computed bf16"
    unknown = {"kernels"} if any(earlier) else set()
    if stored.get("engine") == "reference" and "arithmetic" not in stored:  # an earlier version did not say
        unknown.add("arithmetic")
    compared = [name for name in _COMPARED if name not in unknown]
    left, right = (_flat({name: _stated(record).get(name) for name in compared}) for record in (stored, asked))
    keys = [key for key in sorted(left.keys() | right.keys()) if left.get(key) != right.get(key)]
    keys = [key for key in keys if key not in _NOT_COMPARED]
    named = [f"{key} was {left.get(key)}, is now {right.get(key)}" for key in keys[:3]]
    return ", ".join(named) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _stated(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the options that an earlier version did not know."""
    request = record.get("request")
    return {**record, "request": ADDED_LATER | request} if isinstance(request, dict) else record


def names_no_kernel(record: dict[str, Any]) -> bool:
    """Whether a record is of an earlier version, which kept the kernel as a sentence that could be wrong."""
    return "kernel" in record


def as_begun(asked: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """A record with the number of threads that an output was begun with: a run that goes on computes with as many."""
    record = {name: value for name, value in asked.items() if name != "threads"}
    return record | ({"threads": stored["threads"]} if "threads" in stored and "threads" in asked else {})


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names; None stands for what is not there."""
    if not isinstance(value, dict):
        return {name: value}
    parts = (_flat(inner, f"{name}.{key}" if name else str(key)) for key, inner in value.items())
    return {key: inner for part in parts for key, inner in part.items()}
