"""While the library works, torch is as when a program starts: the caller's settings change no bit of an answer.

Entered at the doors of the library, left on any exit with everything as it was. Gradient and inference mode, autocast,
the default device and the flushing of denormals belong to the calling thread, and are changed for it alone. The default
type belongs to the process: it is changed only where it is not fp32, counted, so that runs in several threads may
overlap, and meanwhile holds in other threads too. So does the permission of reduced products, which is taken away where
products are made (`kaleido_kernels.exact`).
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

import torch

_KINDS = ("cpu", "cuda")


class _DefaultType:
    """Torch's default type, held at fp32 while any thread is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = torch.float32

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = torch.get_default_dtype()
            self._inside += 1
            if torch.get_default_dtype() is not torch.float32:
                torch.set_default_dtype(torch.float32)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            # Another value was set in the meantime: it stays.
            if self._inside == 0 and torch.get_default_dtype() is torch.float32 is not self._before:
                torch.set_default_dtype(self._before)


_DEFAULT_TYPE = _DefaultType()


@contextlib.contextmanager
def neutral(device: torch.device | None = None) -> Iterator[None]:
    """Gradients on, no autocast, fp32 as the default type, main memory as the default device.

    Args:
        device: where a module runs whose code may make tensors on the default device: that may stay the default.
    """
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        for kind in _KINDS:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        default = torch.get_default_device().type
        if default != "cpu" and (device is None or default != device.type):
            stack.enter_context(torch.device("cpu"))
        if _flushes_denormals():
            torch.set_flush_denormal(False)
            stack.callback(torch.set_flush_denormal, True)
        stack.enter_context(_DEFAULT_TYPE)
        yield


def _flushes_denormals() -> bool:
    """Whether this thread takes numbers too small to be normal for zero: torch can set that, but cannot read it."""
    return sys.float_info.min / 2 == 0
