"""The devices of this machine: which are meant, where a model is sampled, and what a plan needs to know of them."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from kaleido_fast.errors import InputError, unknown_name
from kaleido_fast.planning.facts import H200, DeviceFacts
from kaleido_fast.system.memory import available_memory
from kaleido_fast.system.tuned import tables_of, tuned_in
from kaleido_kernels.tile import GpuFacts

Device = str | torch.device | None
"""A device as a caller names it."""


def resolve_device(device: Device) -> torch.device:
    """The device asked for; None and "auto" take the current CUDA device if there is one, else the CPU.

    Raises:
        InputError: unknown kind, or a device that this machine does not have.
    """
    if device is None or device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as problem:
        raise unknown_name("device", device, ("auto", "cpu", "cuda", "cuda:0")) from problem
    if resolved.type not in ("cpu", "cuda"):
        raise unknown_name("device", device, ("auto", "cpu", "cuda", "cuda:0"))
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {device}: this machine has {torch.cuda.device_count()} CUDA devices; use device='cpu'"
        )
    if resolved.type == "cuda" and resolved.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return resolved


def resolve_devices(device: Device | Sequence[Device]) -> list[torch.device]:
    """The devices asked for, one or more of one kind.

    Raises:
        InputError: a device that is unknown, missing or named twice ("cpu" may be, for tests), or devices of different
            kinds: a chain's bits would depend on which of them it met.
    """
    if isinstance(device, (str, torch.device)) or device is None:
        return [resolve_device(device)]
    if not isinstance(device, Sequence) or not device:
        raise InputError(f"device is {device!r}: give a name such as 'cuda', or a list such as ['cuda:0', 'cuda:1']")
    devices = [resolve_device(one) for one in device]
    names = ", ".join(map(str, devices))
    kinds = {torch.cuda.get_device_name(one) if one.type == "cuda" else one.type for one in devices}
    if len(kinds) > 1:
        raise InputError(f"devices {names} are of different kinds ({', '.join(sorted(kinds))}): name equal ones only")
    if devices[0].type == "cuda" and len(set(devices)) < len(devices):
        raise InputError(f"devices {names}: one is named twice; name each once")
    return devices


def home_of(module: nn.Module) -> torch.device | None:
    """Where a module's weights lie; None if it has none.

    Raises:
        InputError: on several devices, or on none ("meta").
    """
    homes = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    if len(homes) > 1:
        raise InputError(f"the model's weights lie on {', '.join(sorted(map(str, homes)))}: move all to one device")
    home = homes.pop() if homes else None
    if home is not None and home.type not in ("cpu", "cuda"):
        raise InputError(f"the model's weights are on device {home}: move the model to the CPU or to a CUDA device")
    return home


def devices_for(module: nn.Module, device: Device | Sequence[Device], *, packable: bool) -> list[torch.device]:
    """The devices that sample a model: those asked for, else its own, else a GPU if there is one.

    Args:
        module: the model.
        device: as the caller asked.
        packable: whether engines copy its weights; then a model in main memory may be sampled on any device.

    Raises:
        InputError: a model that lies elsewhere than asked, besides what `resolve_devices` and `home_of` refuse.
    """
    home = home_of(module)
    if device is None or device == "auto":
        return [home if home is not None and (home.type == "cuda" or not packable) else resolve_device(None)]
    devices = resolve_devices(device)
    if len(devices) > 1 and not packable:
        raise InputError("a list of devices takes a KaleidoMLP or a plain Sequential: give one device for this model")
    if home is not None and home not in devices and not (packable and home.type == "cpu"):
        raise InputError(
            f"the model is on {home}, device {', '.join(map(str, devices))} was asked for: "
            "move it there with model.to(), or leave device out"
        )
    return devices


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a CUDA device the current one, on which kernels are launched."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def current_stream(device: torch.device) -> int:
    """The caller's stream on a device as a number; 0 on a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def refuse_capture(device: torch.device) -> None:
    """Refuse to work inside a CUDA graph that the caller is capturing: `InputError`."""
    if device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise InputError(
            "sampling inside the capture of a CUDA graph: a replay would use weights packed for this call, which are "
            "not kept for it; sample outside of the capture (torch.compile leaves the operator out of its graphs)"
        )


def device_facts(device: torch.device) -> DeviceFacts:
    """Facts about a device, for the plan."""
    has_triton, has_numba = _importable("triton"), _importable("numba")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return DeviceFacts(
            kind="cuda",
            name=properties.name,
            memory=torch.cuda.mem_get_info(device)[0] + _cached_memory(device),
            has_triton=has_triton,
            has_numba=has_numba,
            gpu=GpuFacts(
                shared_memory=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
                capability=(properties.major, properties.minor),
                has_tma=False if torch.version.hip else None,  # AMD's numbers of versions overlap with NVIDIA's
                n_sm=properties.multi_processor_count,
            ),
            tuned=tuned_in(properties.name, tables_of(properties.name)),
        )
    if emulates():
        small = GpuFacts(n_sm=2, graph_block=64)
        return replace(H200, name="emulated sm_90", memory=available_memory(), gpu=small)
    return DeviceFacts(
        kind="cpu",
        name=cpu_name(),
        memory=available_memory(),
        has_triton=has_triton,
        has_numba=has_numba,
        interpreter=os.environ.get("TRITON_INTERPRET") == "1",
    )


def emulates() -> bool:
    """Whether compiled kernels run on CPU tensors here: inside of `emulated`, of the kernels' emulator."""
    module = sys.modules.get("kaleido_kernels.proving.emulation.driver")
    return module is not None and module.is_active()


def _cached_memory(device: torch.device) -> int:
    """Bytes that torch holds on a GPU and would use again."""
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def cpu_name() -> str:
    """The processor as the system calls it."""
    return _cpu_field("model name") or platform.processor() or platform.machine()


@functools.cache
def _cpu_field(name: str) -> str:
    """A field of the first processor in /proc/cpuinfo; empty where there is none."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(name):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return ""


@functools.cache
def _importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
