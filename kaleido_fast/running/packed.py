"""Networks packed for the engines: kept from call to call, noticed when their weights change.

A program that samples the same network again and again should not pay for packing each time. What is kept is a copy of
the weights at one moment, and what engines made of it. A later call finds it by the weights themselves: by comparing
them, or, where that would have to wait for a GPU, by the memory they lie in and torch's count of writes to it.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from kaleido_fast.engines.base import Engine
from kaleido_fast.model import KaleidoMLP, ModelSpec, check_finite, model_hash
from kaleido_fast.modules.linear_layers import plain_linear
from kaleido_fast.system.same_bits import as_whole_numbers, same_bits
from kaleido_kernels.packing import weights_range
from kaleido_kernels.precision import WeightsRange

MODELS_KEPT = 8
ENGINES_KEPT = 16  # of one network: precisions, devices and streams


@dataclass(frozen=True)
class Mark:
    """A tensor as it can be recognised without reading it.

    Args:
        storage: the memory; while this is held no other tensor gets the same memory.
        layout: type, device, shape, strides and offset.
        writes: torch's count of in-place writes; None where it counts none, or not all.
    """

    storage: StorageWeakRef
    layout: tuple[Any, ...]
    writes: int | None

    @classmethod
    def of(cls, tensor: Tensor) -> Mark:
        # Views may have counts of their own (those of `.data` do): only a module's parameter is known to have all.
        counted = isinstance(tensor, nn.Parameter) and not tensor.is_inference()
        layout = (tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.storage_offset())
        return cls(StorageWeakRef(tensor.untyped_storage()), layout, tensor._version if counted else None)

    def proves_same(self, earlier: Mark) -> bool:
        """Whether the tensor is known to hold what it held at ``earlier``."""
        return self.writes is not None and self == earlier


class PackedModel:
    """A network's weights at one moment, and what engines made of them.

    Args:
        spec: the network.
        weights, biases: (out, in) and (out,) or None a layer; copied.

    Raises:
        InputError: weights that are not finite.
    """

    def __init__(self, spec: ModelSpec, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        self.module = _frozen_copy(spec, weights, biases)
        check_finite(self.module)
        self.spec = spec
        self.tensors = _tensors(*layers_of(self.module))
        self.marks: tuple[Mark, ...] = ()
        self._engines: OrderedDict[Hashable, Engine] = OrderedDict()
        self._lock = threading.Lock()

    @functools.cached_property
    def model_hash(self) -> str:
        """See `kaleido_fast.model.model_hash`."""
        return model_hash(self.module)

    @functools.cached_property
    def weights_range(self) -> WeightsRange:
        """Sizes of the weights as fp32 holds them; waits for a GPU, once."""
        weights, biases = layers_of(self.module)
        as_fp32 = [None if bias is None else bias.to(torch.float32) for bias in biases]
        return weights_range([(w.to(torch.float32), b) for w, b in zip(weights, as_fp32, strict=True)])

    def engine(self, key: Hashable, build: Callable[[KaleidoMLP], Engine]) -> Engine:
        """The engine kept under ``key``, or the one that ``build`` makes of the weights."""
        with self._lock:
            if key not in self._engines:
                self._engines[key] = build(self.module)
            self._engines.move_to_end(key)
            while len(self._engines) > ENGINES_KEPT:
                self._engines.popitem(last=False)
            return self._engines[key]

    def drop_engines(self) -> None:
        """Forget the engines that were made of these weights."""
        with self._lock:
            self._engines.clear()

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Compare weights and biases bit by bit (-0.0 is another weight than 0.0); waits for a GPU, once."""
        pairs = list(zip(self.tensors, tensors, strict=True))
        if pairs[0][0].device.type == "cpu":
            return same_bits(pairs)
        return equal_at_once([(as_whole_numbers(a), as_whole_numbers(b)) for a, b in pairs])

    def is_like(self, spec: ModelSpec, tensors: Sequence[Tensor]) -> bool:
        """Whether shape, types and devices agree, so that values may be compared."""
        if self.spec != spec:
            return False
        return all(a.dtype == b.dtype and a.device == b.device for a, b in zip(self.tensors, tensors, strict=True))


class PackedModels:
    """The networks that were used last; safe to use from several threads."""

    def __init__(self) -> None:
        self._models: list[PackedModel] = []  # the last used one last
        self._lock = threading.Lock()

    def take(
        self, spec: ModelSpec, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, may_wait: bool
    ) -> PackedModel:
        """The packed form of these weights as they are now.

        Args:
            spec: the network.
            weights, biases: its layers.
            may_wait: whether weights on a GPU may be compared by value, which waits for it. Otherwise parameters
                count as unchanged where torch counted no write; other tensors are compared all the same.

        Raises:
            InputError: weights that are not finite.
        """
        tensors = _tensors(weights, biases)
        marks = tuple(map(Mark.of, tensors))
        may_wait = may_wait or all(tensor.device.type == "cpu" for tensor in tensors)
        with self._lock:
            found = self._find(spec, tensors, marks, may_wait or any(mark.writes is None for mark in marks))
            if found is None:
                found = PackedModel(spec, weights, biases)
                self._forget_older(marks)
            else:
                self._models.remove(found)
            found.marks = marks
            self._models.append(found)
            del self._models[:-MODELS_KEPT]
            return found

    def forget(self) -> None:
        """Free everything that is kept."""
        with self._lock:
            self._models.clear()

    def __len__(self) -> int:
        return len(self._models)

    def _find(
        self, spec: ModelSpec, tensors: Sequence[Tensor], marks: tuple[Mark, ...], by_value: bool
    ) -> PackedModel | None:
        for model in reversed(self._models):
            if not model.is_like(spec, tensors):
                continue
            if by_value:
                if model.holds(tensors):
                    return model
            elif all(now.proves_same(then) for now, then in zip(marks, model.marks, strict=True)):
                return model
        return None

    def _forget_older(self, marks: Sequence[Mark]) -> None:
        """Drop networks whose weights are gone, and the older weights of the memory that ``marks`` speak of."""
        now = {mark.storage for mark in marks}
        self._models = [
            model
            for model in self._models
            if not any(mark.storage in now or mark.storage.expired() for mark in model.marks)
        ]


PACKED = PackedModels()
"""The packed networks of this process."""


def forget_packed() -> None:
    """Free the packed weights that are kept for later calls.

    Also needed after weights on a GPU were changed behind torch's back, by writing to ``parameter.data`` or by
    replaying a CUDA graph, before the next `kaleido_fast.sample_op` on them.
    """
    PACKED.forget()


def layers_of(model: KaleidoMLP) -> tuple[list[Tensor], list[Tensor | None]]:
    """(weights, biases) of a model."""
    layers = model.linears
    return [layer.weight for layer in layers], [layer.bias for layer in layers]


def _tensors(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    return [*weights, *(bias for bias in biases if bias is not None)]


def equal_at_once(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether tensors of equal shape are equal, two by two; the host waits for the device once for all of them."""
    return bool(torch.stack([(a == b).all() for a, b in pairs]).all())


def _frozen_copy(spec: ModelSpec, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> KaleidoMLP:
    """A model of its own memory; made without torch's random initialisation."""
    layers = [
        plain_linear(weight.detach().clone(), None if bias is None else bias.detach().clone())
        for weight, bias in zip(weights, biases, strict=True)
    ]
    return KaleidoMLP(spec, layers).eval()
