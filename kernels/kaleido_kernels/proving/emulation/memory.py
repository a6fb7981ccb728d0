"""Memory of a launch: tensors, of which every access is checked, and shared memory, of which every byte has a state.

What threads store by ordinary instructions is not seen by copies and products of the asynchronous proxy until the
storing threads have passed a proxy fence and a barrier, in either order (chapter "Memory Consistency Model", section
"Proxy-preserved Base Causality Order"). `ProxyStates` follows each byte on that way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kaleido_kernels.proving.emulation.errors import AccessError, RaceError
from kaleido_kernels.proving.emulation.kinds import Array

FIRST_ADDRESS = 0x7000_0000_0000
SPACING = 1 << 40
"""A tensor begins in the middle of as many addresses: no offset that is merely wrong leads from one into another."""
PARAMETERS = 0x0F00_0000_0000
PARAMETER_SPACING = 1024

CLEAN, IN_FLIGHT = 0, 255
STORED, FENCED, PUBLISHED = 1, 2, 3


class ProxyStates:
    """State of every byte of a piece of memory for those that read it by the asynchronous proxy.

    CLEAN: visible. 4 * warps + STORED: stored, no fence yet. 4 * warps + FENCED: a fence by the storing warps, no
    barrier yet. PUBLISHED: a barrier without a fence before it. IN_FLIGHT: a copy is on its way here.
    """

    def __init__(self, n_bytes: int) -> None:
        self.states = np.zeros(n_bytes, np.uint8)
        self._low: dict[int, int] = {}  # bounds of what was stored and is not clean, by warps
        self._high: dict[int, int] = {}

    def store(self, places: Array, warps: int) -> None:
        """Ordinary stores to byte numbers ``places``."""
        self.states[places] = 4 * warps + STORED
        low, high = int(places.min()), int(places.max()) + 1
        self._low[warps] = min(low, self._low.get(warps, low))
        self._high[warps] = max(high, self._high.get(warps, high))

    def fence(self, warps: int) -> None:
        """A proxy fence by all threads of ``warps``. What others published before counts as seen by all."""
        for owner in list(self._low):
            part = self.states[self._low[owner] : self._high[owner]]
            part[part == PUBLISHED] = CLEAN
            if owner == warps:
                part[part == 4 * warps + STORED] = 4 * warps + FENCED

    def barrier(self, warps: int) -> None:
        """``warps`` reach a barrier or announce their work at one."""
        if warps not in self._low:
            return
        part = self.states[self._low[warps] : self._high[warps]]
        part[part == 4 * warps + FENCED] = CLEAN
        part[part == 4 * warps + STORED] = PUBLISHED
        if not part.any():
            del self._low[warps], self._high[warps]

    def refuse_unseen(self, places: Array, what: str) -> None:
        """Raises `RaceError` unless all bytes are clean."""
        found = self.states[places]
        if found.any():
            bad = int(found[found != CLEAN][0])
            raise RaceError(f"{what} {_state_name(bad)} (byte {int(np.asarray(places)[found != CLEAN][0])})")


def _state_name(state: int) -> str:
    if state == IN_FLIGHT:
        return "bytes that a copy in flight will write"
    return {
        STORED: "bytes that were stored without a proxy fence and a barrier since",
        FENCED: "bytes that were stored and fenced, but without a barrier since",
        PUBLISHED: "bytes that were stored without a proxy fence since",
    }[state % 4]


@dataclass
class Tensor:
    """A tensor in global memory, at an address of the emulator's own.

    Args:
        name: of the kernel's argument, or of several.
        start: address of its first byte.
        data: its bytes, which are the caller's.
        states: for tensors that the copy engine reads, once something was stored to them.
    """

    name: str
    start: int
    data: Array
    watched: bool = False
    states: ProxyStates | None = None

    @property
    def end(self) -> int:
        return self.start + self.data.size

    def values(self, kind: Any, places: Array) -> tuple[Array, Array]:
        """Its bytes as values of a type, and the numbers of those at byte numbers ``places``, which are aligned."""
        size = np.dtype(kind).itemsize
        skipped = -self.start % size  # a tensor may begin between two aligned addresses
        n_values = (self.data.size - skipped) // size
        return self.data[skipped : skipped + n_values * size].view(kind), (places - skipped) // size


@dataclass
class GlobalMemory:
    """All tensors of a launch."""

    tensors: list[Tensor] = field(default_factory=list)

    def add(self, name: str, data: Array, alignment: int) -> Tensor:
        """Give bytes an address with the same remainder by 256 as ``alignment``, the address that they really have."""
        start = FIRST_ADDRESS + SPACING * len(self.tensors) + SPACING // 2 + alignment % 256
        tensor = Tensor(name, start, data)
        self.tensors.append(tensor)
        return tensor

    def find(self, addresses: Array, n_bytes: int) -> Tensor:
        """The tensor that holds ``n_bytes`` from every one of ``addresses``.

        Raises:
            AccessError: there is none, or an address is no multiple of ``n_bytes``.
        """
        low, high = int(addresses.min()), int(addresses.max())
        place = (low - FIRST_ADDRESS) // SPACING
        if not 0 <= place < len(self.tensors):
            raise AccessError(f"address {low:#x} is in no tensor")
        tensor = self.tensors[place]
        if low < tensor.start or high + n_bytes > tensor.end:
            if (high - FIRST_ADDRESS) // SPACING != place:
                raise AccessError(f"one access to two tensors, or far outside of {tensor.name}")
            raise AccessError(
                f"bytes {low - tensor.start} to {high - tensor.start + n_bytes} of {tensor.name}, "
                f"which has {tensor.data.size}"
            )
        if n_bytes & (n_bytes - 1) == 0 and (addresses % n_bytes).any():
            raise AccessError(f"an access of {n_bytes} bytes to {tensor.name} that is not aligned")
        return tensor

    def begin_block(self) -> None:
        """Forget the states that earlier blocks of threads left: they are not this block's concern."""
        for tensor in self.tensors:
            tensor.states = None

    def watched(self) -> list[ProxyStates]:
        return [tensor.states for tensor in self.tensors if tensor.states is not None]

    def stored(self, tensor: Tensor, places: Array, n_bytes: int, warps: int) -> None:
        """Note an ordinary store to byte numbers ``places`` on, if the copy engine reads the tensor."""
        if tensor.watched:
            if tensor.states is None:
                tensor.states = ProxyStates(tensor.data.size)
            tensor.states.store(byte_places(places, n_bytes), warps)


class SharedMemory:
    """Shared memory of one block: NaN wherever nothing was written."""

    def __init__(self, n_bytes: int, follow_proxies: bool) -> None:
        self.data = np.full(n_bytes + -n_bytes % 16, 0xFF, np.uint8)
        self.states = ProxyStates(self.data.size)
        self.follow_proxies = follow_proxies
        self.in_flight = 0

    def values(self, kind: Any, places: Array) -> tuple[Array, Array]:
        """Its bytes as values of a type, and the numbers of those at byte numbers ``places``, which are aligned."""
        data = self.data.view(kind)
        return data, places // data.itemsize

    def get(self, kind: Any, places: Array) -> Array:
        """Values of a type at byte numbers."""
        data, numbers = self.values(kind, places)
        return data[numbers]

    def put(self, kind: Any, places: Array, values: Array) -> None:
        """Put values of a type at byte numbers."""
        data, numbers = self.values(kind, places)
        data[numbers] = values

    def check(self, addresses: Array, n_bytes: int, what: str) -> None:
        """Raises `AccessError` for bytes outside, or that are not aligned."""
        low, high = int(addresses.min()), int(addresses.max()) + n_bytes
        if low < 0 or high > self.data.size:
            raise AccessError(f"{what} bytes {low} to {high} of shared memory, which has {self.data.size}")
        if n_bytes & (n_bytes - 1) == 0 and (addresses % n_bytes).any():
            raise AccessError(f"{what} {n_bytes} bytes of shared memory that are not aligned")

    def refuse_in_flight(self, places: Array, what: str) -> None:
        """Raises `RaceError` for bytes that a copy is on its way to."""
        if self.in_flight and (self.states.states[places] == IN_FLIGHT).any():
            raise RaceError(f"{what} bytes that a copy in flight will write")

    def stored(self, places: Array, warps: int) -> None:
        """Note an ordinary store to byte numbers ``places``."""
        self.refuse_in_flight(places, "an ordinary store to")
        if self.follow_proxies:
            self.states.store(places, warps)

    def expect_copy(self, places: Array) -> None:
        """A copy to byte numbers ``places`` is on its way: what they held is gone."""
        self.data[places] = 0xFF
        self.states.states[places] = IN_FLIGHT
        self.in_flight += 1

    def take_copy(self, places: Array, data: Array) -> None:
        """The copy's bytes have come."""
        self.data[places] = data
        self.states.states[places] = CLEAN
        self.in_flight -= 1


def byte_places(places: Array, n_bytes: int) -> Array:
    """All byte numbers of accesses of ``n_bytes``."""
    return (places.astype(np.int64)[:, None] + np.arange(n_bytes)).ravel()
