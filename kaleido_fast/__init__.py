"""Sample generative kaleidoscopic networks: one deep MLP iterated over 100,000 chains at once."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kaleido_fast.basins import Catalogue as Catalogue
    from kaleido_fast.basins import attractors as attractors
    from kaleido_fast.checkpoint import Checkpoint as Checkpoint
    from kaleido_fast.checkpoint import ModelCard as ModelCard
    from kaleido_fast.checkpoint import Scaling as Scaling
    from kaleido_fast.checkpoint import load_checkpoint as load_checkpoint
    from kaleido_fast.checkpoint import save_checkpoint as save_checkpoint
    from kaleido_fast.datasets import Dataset as Dataset
    from kaleido_fast.datasets import load_dataset as load_dataset
    from kaleido_fast.errors import GeneralModuleWarning as GeneralModuleWarning
    from kaleido_fast.errors import InputError as InputError
    from kaleido_fast.errors import SamplingInterruptedError as SamplingInterruptedError
    from kaleido_fast.errors import SamplingMemoryError as SamplingMemoryError
    from kaleido_fast.model import KaleidoMLP as KaleidoMLP
    from kaleido_fast.model import ModelSpec as ModelSpec
    from kaleido_fast.op import SampledChains as SampledChains
    from kaleido_fast.op import sample_op as sample_op
    from kaleido_fast.packed import forget_packed as forget_packed
    from kaleido_fast.plan import SamplePlan as SamplePlan
    from kaleido_fast.plan import SampleRequest as SampleRequest
    from kaleido_fast.plan import Trace as Trace
    from kaleido_fast.result import Outcome as Outcome
    from kaleido_fast.result import SampleResult as SampleResult
    from kaleido_fast.result import SampleStats as SampleStats
    from kaleido_fast.sampling import fast_sample as fast_sample
    from kaleido_fast.storing.draws import Draws as Draws
    from kaleido_fast.storing.draws import open_draws as open_draws
    from kaleido_fast.storing.streaming import StreamResult as StreamResult
    from kaleido_fast.storing.streaming import sample_to as sample_to
    from kaleido_fast.training import train as train

# Names load on first use, so that `kaleido-fast --help` need not wait for torch.
_HOMES = {
    "Catalogue": "basins",
    "attractors": "basins",
    "Checkpoint": "checkpoint",
    "Dataset": "datasets",
    "Draws": "storing.draws",
    "GeneralModuleWarning": "errors",
    "InputError": "errors",
    "KaleidoMLP": "model",
    "ModelCard": "checkpoint",
    "ModelSpec": "model",
    "Outcome": "result",
    "SamplePlan": "plan",
    "SampleRequest": "plan",
    "SampleResult": "result",
    "SampleStats": "result",
    "SampledChains": "op",
    "SamplingInterruptedError": "errors",
    "SamplingMemoryError": "errors",
    "Scaling": "checkpoint",
    "StreamResult": "storing.streaming",
    "Trace": "plan",
    "fast_sample": "sampling",
    "forget_packed": "packed",
    "load_checkpoint": "checkpoint",
    "load_dataset": "datasets",
    "sample_op": "op",
    "open_draws": "storing.draws",
    "sample_to": "storing.streaming",
    "save_checkpoint": "checkpoint",
    "train": "training",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("kaleido_fast.versions").package_version()
    if name not in _HOMES:
        raise AttributeError(f"module 'kaleido_fast' has no attribute {name!r}")
    importlib.import_module("kaleido_fast.versions").find_kernels()
    value = getattr(importlib.import_module(f"kaleido_fast.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
