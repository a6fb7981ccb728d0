"""Threads that share each layer of one tile: where chains are few, one thread alone waits for the weights.

All of a team run the same loops on the same buffers, each its share of every layer's outputs, and meet before one reads
what another wrote. A thread that helps may come late or never, so it enrols, and the one that leads closes the list
after a short wait; who comes later leaves again. Whoever is on the list is inside these loops, where nothing can
interrupt it, so that all are sure to meet. A chain's bits do not depend on the team.
"""

from __future__ import annotations

import os
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import overload as _typed_overload

from kaleido_fast.engines.loops.compiling import NO_WRAPPERS, OPTIONS, apart, inner, intrinsic
from kaleido_fast.engines.loops.vectors import Emitter

overload: Any = _typed_overload  # its annotations leave options out
MET, ENROLLED, SIZE, BOARD_VALUES = 0, 8, 16, 24  # places on a board, each on a cache line of its own
BOARD = 2  # of a place: the board's address
CLOSED = STOPPED = 2**32
_SPINS = 200  # some 2 us; then others get the core, which costs little where there are none
_WAIT_FOR_MEMBERS = 2000  # times of giving the core away, 0.2 us or more each
_NEVER = 2**62
_PAUSES = {"x86_64": "pause", "i686": "pause", "i386": "pause", "aarch64": "yield", "arm64": "yield"}


def _place(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.IntType(64).as_pointer())


@intrinsic
def _add(typingctx: Any, address: Any, value: Any) -> Any:
    """Add to an int64 that threads share; returns what it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _place(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _look(typingctx: Any, address: Any) -> Any:
    """An int64 that threads share; what its writer wrote before can be read after."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_place(builder, args[0]), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _pause(typingctx: Any) -> Any:
    """Tell the processor that this thread waits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        text = _PAUSES.get(builder.module.triple.partition("-")[0], "")
        Emitter(builder, paired=False).assembler(ir.FunctionType(ir.VoidType(), []), text, "~{memory}", [], True)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _give_way(typingctx: Any) -> Any:
    """Let another thread have this core, where the system has a call for it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if hasattr(os, "sched_yield"):
            kind = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@inner
def _wait(address, least, most):
    """Wait until a shared value is at least ``least``; give up after giving the core away ``most`` times."""
    apart()
    if most == _NEVER:
        for _ in range(_SPINS):
            if _look(address) >= least:
                return
            _pause()
    while _look(address) < least and most > 0:
        _give_way()
        _pause()
        most -= 1


@inner
def _join(place):
    apart()
    board = place[BOARD]
    if board == 0:
        return True
    if place[0] == 0:
        _wait(board + 8 * ENROLLED, place[1] - 1, _WAIT_FOR_MEMBERS)
        place[1] = 1 + _add(board + 8 * ENROLLED, CLOSED)
        _add(board + 8 * SIZE, place[1])
        return True
    before = _add(board + 8 * ENROLLED, 1)
    if before >= CLOSED:
        return False
    _wait(board + 8 * SIZE, 1, _NEVER)
    place[0], place[1] = before + 1, _look(board + 8 * SIZE)
    return place[1] < STOPPED


@inner
def _meet(place):
    apart()
    met, size = place[BOARD] + 8 * MET, place[1]
    if size > 1:
        _wait(met, (_add(met, 1) // size + 1) * size, _NEVER)


@inner
def _share(n, place):
    apart()
    rank, size = place[0], place[1]
    return n * rank // size, n * (rank + 1) // size


# Names for the loops alone: numba puts in their place what `_alone_or` gives, by the type of the place. A thread alone
# has None: the loops are compiled for it as if there were no teams, and a second time when a team is first wanted.


def join_team(place: Any) -> bool:
    """Find this thread's place, see `Tile.place`; False where the team has begun without it, or never will."""
    raise NotImplementedError("compiled loops call this, Python does not")


def leads(place: Any) -> bool:
    """Whether this thread does for its team what only one may do."""
    raise NotImplementedError("compiled loops call this, Python does not")


def meet(place: Any) -> None:
    """Wait for the others of the team: what they wrote before can be read after."""
    raise NotImplementedError("compiled loops call this, Python does not")


def share_of(n: int, place: Any) -> tuple[int, int]:
    """(first, last + 1) of ``n`` things that this thread does for its team."""
    raise NotImplementedError("compiled loops call this, Python does not")


def _alone_or(function: Any, alone: Any, in_team: Any) -> None:
    """What loops make of ``function``, whose last argument is a place."""

    def choose(*given: Any) -> Any:
        return alone if isinstance(given[-1], types.NoneType) else in_team

    overload(function, jit_options={**OPTIONS, **NO_WRAPPERS}, strict=False)(choose)


_alone_or(join_team, lambda place: True, lambda place: _join(place))
_alone_or(leads, lambda place: True, lambda place: place[0] == 0)
_alone_or(meet, lambda place: None, lambda place: _meet(place))
_alone_or(share_of, lambda n, place: (0, n), lambda n, place: _share(n, place))
