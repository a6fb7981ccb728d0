"""Whether tensors in main memory hold the same bits, as fast as memory can be read.

`torch.equal` compares numbers: -0.0 is 0.0 to it and NaN differs from itself, and through views of whole numbers it
reads 193 MB of weights in 20 to 50 ms. The C library's ``memcmp`` takes 14 to 26 ms on the same cores (two streams at
29 GB/s, about what memory gives). Reading is the whole cost, and no less of it would do: what is skipped may have
changed.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kaleido_fast.system.cores import useful_threads
from kaleido_fast.system.crew import helped

PIECE = 2**20  # bytes compared at a time: a thread that is held up holds up the others for no more than that
_FOR_A_THREAD = 2**21  # bytes that are worth a thread: comparing them takes ten times as long as waking one

Compare = Callable[[int, int, int], int]
Piece = tuple[int, int, int]
"""Two addresses and a number of bytes."""


def same_bits(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether tensors in main memory are of the same shape, type and bits, two by two; stops early at a difference."""
    compare = _memcmp()
    pieces: list[Piece] = []
    held: list[tuple[Tensor, Tensor]] = []
    for first, second in pairs:
        a, b = _resolved(first), _resolved(second)
        if a.shape != b.shape or a.dtype != b.dtype or not (_is_there(a) and _is_there(b)):
            return False
        if compare is None or not (_are_in_order(a, b) or (a.dim() == 2 and _are_in_order(a.t(), b.t()))):
            if not torch.equal(as_whole_numbers(a), as_whole_numbers(b)):
                return False
            continue
        size = a.numel() * a.element_size()
        pieces += [(a.data_ptr() + at, b.data_ptr() + at, min(PIECE, size - at)) for at in range(0, size, PIECE)]
        held.append((a, b))
    return compare is None or _all_same(compare, pieces, held)


def as_whole_numbers(tensor: Tensor) -> Tensor:
    """A view of a tensor's bits, in which each value equals itself only: 0.0 is not -0.0, and NaN is NaN."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return _resolved(tensor).detach().view(whole)


def _all_same(compare: Compare, pieces: Sequence[Piece], held: object) -> bool:
    """Compare pieces in threads, of which the calling one is one; they keep what is ``held`` alive."""
    n_threads = min(sum(size for _, _, size in pieces) // _FOR_A_THREAD, useful_threads())
    if n_threads < 2:
        return not any(compare(*piece) for piece in pieces)
    taken = itertools.count()  # next() is one step of the interpreter: no piece is taken twice
    stopped = threading.Event()
    same: list[int] = []  # how many pieces each thread found the same: one that ends before its time says nothing

    def work(held: object) -> None:
        n_same = 0
        while not stopped.is_set() and (place := next(taken)) < len(pieces):
            if compare(*pieces[place]):
                stopped.set()
            else:
                n_same += 1
        same.append(n_same)

    with helped(lambda: work(held), n_threads - 1, stopped.set):
        work(held)
    return sum(same) == len(pieces)


def _resolved(tensor: Tensor) -> Tensor:
    """The tensor, or what it stands for: torch may note a change of sign and leave the memory as it is."""
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def _are_in_order(first: Tensor, second: Tensor) -> bool:
    """Whether the values of both lie one after the other, row by row."""
    return first.is_contiguous() and second.is_contiguous()


def _is_there(tensor: Tensor) -> bool:
    """Whether its memory is: a program may free that and keep the tensor, which torch would read all the same."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in steps)
    return not tensor.numel() or (last + 1) * tensor.element_size() <= tensor.untyped_storage().nbytes()


@functools.cache
def _memcmp() -> Compare | None:
    """The C library's comparison of memory, which lets other threads run meanwhile; None where it is not found."""
    try:
        compare = ctypes.CDLL(None).memcmp
    except (OSError, AttributeError, TypeError):
        return None
    compare.argtypes, compare.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_int
    return compare
