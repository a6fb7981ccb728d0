"""Products as they are written, whatever the host program allows torch to do: no TF32, no 16-bit sums, no autocast.

Torch keeps these permissions in flags of the whole process. They are changed only where they would make a difference,
put back afterwards, and counted, so that runs in several threads may overlap.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

_REDUCED = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)
_lock = threading.Lock()
_inside = 0
_before: list[tuple[Any, str, Any]] = []


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """fp32 products without TF32 and 16-bit ones with fp32 sums, outside of autocast; everything is put back after."""
    global _inside
    with _lock:
        if _inside == 0:
            _before[:] = _forbid()
        _inside += 1
    try:
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                yield
        else:
            yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _restore()


def _forbid() -> list[tuple[Any, str, Any]]:
    """Take permissions away where there are any; (object, name, value) of what was changed."""
    changed: list[tuple[Any, str, Any]] = []
    # The older names for this (allow_tf32, set_float32_matmul_precision) refuse to be read where the newer were set.
    for backend in _backends():
        value = backend.fp32_precision
        if value not in ("none", "ieee"):
            changed.append((backend, "fp32_precision", value))
            backend.fp32_precision = "ieee"
    for name in _REDUCED:
        value = getattr(torch.backends.cuda.matmul, name)
        if value:
            changed.append((torch.backends.cuda.matmul, name, value))
            setattr(torch.backends.cuda.matmul, name, False)
    return changed


def _backends() -> list[Any]:
    """Where products, convolutions and recurrent layers get their permissions from; cuDNN's TF32 is on by default."""
    mkldnn: Any = torch.backends.mkldnn
    backends: list[Any] = [torch.backends.cuda.matmul, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
    if torch.backends.cuda.is_built():
        cudnn: Any = torch.backends.cudnn
        backends += [cudnn.conv, cudnn.rnn]
    return backends


def _restore() -> None:
    for owner, name, value in _before:
        if name == "fp32_precision":
            owner.fp32_precision = "none"  # perhaps the value came from torch.backends.fp32_precision
            if owner.fp32_precision == value:
                continue
        setattr(owner, name, value)
    _before.clear()
