"""A walk through objects that gives each a digest of its contents."""

from __future__ import annotations

import copyreg
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented))
_LOCKS = ("lock", "RLock")


class UntoldError(Exception):
    """Something whose contents cannot be read; says what it is."""


def hash_of(kind: str, *parts: bytes | memoryview) -> bytes:
    """SHA-256, 32 bytes, of a kind of object and its parts, each with its length."""
    digest = hashlib.sha256(f"{kind}:{len(parts)}".encode())
    for part in parts:
        digest.update(f":{len(part)}:".encode())
        digest.update(part)
    return digest.digest()


class Walk:
    """Digests of objects by their contents. An object within itself counts by how deep it lies there.

    Args:
        digest: kinds of objects and how each is digested, the first that fits; any other object by what `copy` and
            `pickle` would make it of.
    """

    def __init__(self, digest: Sequence[tuple[Any, Callable[[Walk, Any], bytes]]]) -> None:
        self.digest = digest
        self.path: list[str] = []  # of attributes, to say what could not be read
        self.known: dict[int, bytes] = {}
        self.open: dict[int, int] = {}
        self.held: list[Any] = []  # an id means nothing once its object is gone

    def of(self, value: Any) -> bytes:
        """32 bytes, equal for equal contents."""
        if type(value) in _PLAIN:
            return hash_of(type(value).__name__, repr(value).encode(errors="surrogatepass"))
        key = id(value)
        if key in self.known:
            return self.known[key]
        if key in self.open:
            return hash_of("within", str(self.open[key]).encode())
        self.open[key] = len(self.open)
        digest = self._compound(value)
        del self.open[key]
        self.held.append(value)
        self.known[key] = digest
        return digest

    def attribute(self, name: str, value: Any) -> bytes:
        """Digest of a named part."""
        self.path.append(name)
        digest = self.of(value)
        self.path.pop()
        return digest

    def all(self, values: Iterable[Any]) -> bytes:
        """Digest of values in order."""
        return hash_of("sequence", *map(self.of, values))

    def mapping(self, values: Mapping[Any, Any]) -> bytes:
        """Digest of keys and values in order: a module may go through them."""
        pairs = []
        for key, value in values.items():
            pairs += [self.of(key), self.attribute(key, value) if isinstance(key, str) else self.of(value)]
        return hash_of("mapping", *pairs)

    def named(self, values: Mapping[str, Any], without: set[str]) -> bytes:
        """Digest of attributes, whatever their order."""
        return self.mapping({name: values[name] for name in sorted(values) if name not in without})

    def _compound(self, value: Any) -> bytes:
        for kinds, digest in self.digest:
            if isinstance(value, kinds):
                return digest(self, value)
        if type(value).__module__ == "_thread" and type(value).__name__ in _LOCKS:
            return hash_of("lock")
        return self.reduced(value)

    def reduced(self, value: Any) -> bytes:
        """An object by what `copy` and `pickle` would make it of."""
        try:
            reduce = copyreg.dispatch_table.get(type(value))
            reduced = value.__reduce_ex__(4) if reduce is None else reduce(value)
        except Exception as problem:
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise UntoldError(f"of type {kind}, whose contents cannot be read") from problem
        if isinstance(reduced, str):
            return hash_of("global", type(value).__qualname__.encode(), reduced.encode())
        make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        parts = [self.of(type(value)), self.of(make), self.of(arguments), self.of(state)]
        return hash_of("object", *parts, self.all(items or ()), self.all(pairs or ()))


def by_parts(kind: str, *names: str) -> Callable[[Walk, Any], bytes]:
    """How to digest an object: by some of its attributes."""
    return lambda walk, value: hash_of(kind, *(walk.of(getattr(value, name)) for name in names))


def exactly(kind: type, digest: Callable[[Walk, Any], bytes]) -> Callable[[Walk, Any], bytes]:
    """How to digest exactly this kind. An object of a derived kind may hold more: it counts as any other object."""
    return lambda walk, value: digest(walk, value) if type(value) is kind else walk.reduced(value)
