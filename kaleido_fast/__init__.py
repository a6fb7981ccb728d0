"""Sample generative kaleidoscopic networks: one deep MLP iterated over 100,000 chains at once."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kaleido_fast.checkpoint import Checkpoint as Checkpoint
    from kaleido_fast.checkpoint import ModelCard as ModelCard
    from kaleido_fast.checkpoint import Scaling as Scaling
    from kaleido_fast.checkpoint import load_checkpoint as load_checkpoint
    from kaleido_fast.checkpoint import save_checkpoint as save_checkpoint
    from kaleido_fast.errors import GeneralModuleWarning as GeneralModuleWarning
    from kaleido_fast.errors import InputError as InputError
    from kaleido_fast.errors import SamplerWarning as SamplerWarning
    from kaleido_fast.errors import SamplingInterruptedError as SamplingInterruptedError
    from kaleido_fast.errors import SamplingMemoryError as SamplingMemoryError
    from kaleido_fast.evaluating.attractors import Catalogue as Catalogue
    from kaleido_fast.evaluating.attractors import attractors as attractors
    from kaleido_fast.model import KaleidoMLP as KaleidoMLP
    from kaleido_fast.model import ModelSpec as ModelSpec
    from kaleido_fast.op import SampledChains as SampledChains
    from kaleido_fast.op import sample_op as sample_op
    from kaleido_fast.planning.plan import SamplePlan as SamplePlan
    from kaleido_fast.planning.request import SampleRequest as SampleRequest
    from kaleido_fast.planning.request import Trace as Trace
    from kaleido_fast.reading.datasets import Dataset as Dataset
    from kaleido_fast.reading.datasets import load_dataset as load_dataset
    from kaleido_fast.running.packed import forget_packed as forget_packed
    from kaleido_fast.running.result import Outcome as Outcome
    from kaleido_fast.running.result import SampleResult as SampleResult
    from kaleido_fast.running.result import SampleStats as SampleStats
    from kaleido_fast.sampling import fast_sample as fast_sample
    from kaleido_fast.storing.draws import Draws as Draws
    from kaleido_fast.storing.draws import open_draws as open_draws
    from kaleido_fast.storing.sample_to import StreamResult as StreamResult
    from kaleido_fast.storing.sample_to import sample_to as sample_to
    from kaleido_fast.training.trainer import train as train

# Names load on first use, so that `kaleido-fast --help` need not wait for torch.
_HOMES = {
    "Catalogue": "evaluating.attractors",
    "attractors": "evaluating.attractors",
    "Checkpoint": "checkpoint",
    "Dataset": "reading.datasets",
    "Draws": "storing.draws",
    "GeneralModuleWarning": "errors",
    "InputError": "errors",
    "KaleidoMLP": "model",
    "ModelCard": "checkpoint",
    "ModelSpec": "model",
    "Outcome": "running.result",
    "SamplePlan": "planning.plan",
    "SampleRequest": "planning.request",
    "SampleResult": "running.result",
    "SampleStats": "running.result",
    "SampledChains": "op",
    "SamplerWarning": "errors",
    "SamplingInterruptedError": "errors",
    "SamplingMemoryError": "errors",
    "Scaling": "checkpoint",
    "StreamResult": "storing.sample_to",
    "Trace": "planning.request",
    "fast_sample": "sampling",
    "forget_packed": "running.packed",
    "load_checkpoint": "checkpoint",
    "load_dataset": "reading.datasets",
    "sample_op": "op",
    "open_draws": "storing.draws",
    "sample_to": "storing.sample_to",
    "save_checkpoint": "checkpoint",
    "train": "training.trainer",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("kaleido_fast.system.versions").package_version()
    if name not in _HOMES:
        raise AttributeError(f"module 'kaleido_fast' has no attribute {name!r}")
    importlib.import_module("kaleido_fast.system.versions").find_kernels()
    value = getattr(importlib.import_module(f"kaleido_fast.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
