"""Sizes of the CPU engine's tiles and units of work: pure functions of the network's shape and the run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

# Chains of a tile. Measured on one core of a Xeon with AVX-512 and AMX, in GFLOP/s at 32, 128 and 256 chains: in fp32
# the size hardly matters (points1d 131, 155, 153; digits 228, 227, 228; cifar 181, 207, 195), but where cores share
# main memory more chains make more of each weight. By AMX weights take as long to come as their products in wide layers
# (points1d 70, 107, 110; mnist 693, 1282, 1333; cifar 479, 893, 1232).
_NARROW_CHAINS, _WIDE_CHAINS = 128, 256
_WIDE = 1024
EXTRA_CHAINS = 8
"""By these figures a tile in fp32 costs as much as so many chains more."""
_WORKSPACE_VALUES = 2**25  # of one buffer of one thread: beyond it tiles shrink

_CALL_FLOPS = 2e9  # about 0.02 to 0.1 s on one core: time between looks at progress and Ctrl-C
_TEAM_CALL_FLOPS = 2.5e8  # of few chains, whose flops take longer
_CALL_FLOPS_LEAST = 2e7  # below it the call itself, some 50 us, would be felt
_THREAD_FLOPS = 2e7  # about 0.2 ms on one core: waking a thread takes a tenth of it, and starting one a quarter
_VALUE_FLOPS = 50  # a value's activation, and its way into and out of a layer, count as so many
_MEMBER_WEIGHTS = 2**15  # of a layer: 5 us of one thread; with less, a core that others use costs more than is won
_SHARE = 2  # units shrink towards the end, so that a core that is slowed down does not hold up the others


def full_tile(widths: Sequence[int]) -> int:
    """Chains of a tile where there are chains enough for every thread."""
    widest = max(widths)
    return min(_WIDE_CHAINS if widest > _WIDE else _NARROW_CHAINS, _WORKSPACE_VALUES // widest)


def tile_chains(
    widths: Sequence[int],
    lanes: int,
    n_chains: int | None = None,
    n_threads: int = 1,
    extra: int = EXTRA_CHAINS,
) -> int:
    """Chains that go through a layer together, a multiple of ``lanes``.

    Args:
        widths: sizes between the layers.
        lanes: chains of one register block.
        n_chains: if given, tiles shrink so that threads share a small run evenly and few places of tiles stay empty,
            which take as long as full ones.
        n_threads: see n_chains.
        extra: chains that take as long as what a tile costs besides its chains.

    A chain's bits do not depend on it.
    """
    most = max(1, -(-full_tile(widths) // lanes))
    if n_chains is None:
        return most * lanes

    def cost(blocks: int) -> tuple[int, int]:
        tiles_in_turn = -(-n_chains // (blocks * lanes * n_threads))
        return tiles_in_turn * (blocks * lanes + extra), -blocks

    return min(range(1, most + 1), key=cost) * lanes


def working_threads(widths: Sequence[int], chain_steps: int, n_threads: int) -> int:
    """Threads that a call is worth, 1 to ``n_threads``: a little work is done before others have begun.

    Args:
        widths: sizes between the layers.
        chain_steps: chains times steps of the call.
        n_threads: as many as there are.
    """
    flops = 2 * sum(n_in * n_out for n_in, n_out in itertools.pairwise(widths)) + _VALUE_FLOPS * sum(widths)
    return max(1, min(n_threads, int(flops * chain_steps / _THREAD_FLOPS)))


def unit_chains(left: int, tile: int, n_threads: int, flops: int) -> int:
    """Chains that a thread takes at a time, whole tiles: a part of what is left ("guided self-scheduling").

    Args:
        left: chains of the call that no thread has taken, at least 1.
        tile: chains of one tile.
        n_threads: threads that share the chains.
        flops: floating-point operations of one chain over all its steps.
    """
    fair = -(-left // (n_threads * tile))
    least, most = (int(limit / (flops * tile)) + 1 for limit in (_CALL_FLOPS_LEAST, _CALL_FLOPS))
    return tile * max(1, min(fair, most, max(least, fair // _SHARE)))


def few_chains(n_chains: int, n_threads: int, few: int) -> int:
    """Chains that a thread takes where there are ``few`` or less for each; 0 where there are more.

    Args:
        n_chains: of the call.
        n_threads: threads that share them.
        few: so many are computed in less time than the lanes of a vector.
    """
    share = -(-n_chains // n_threads)
    return share if share <= few else 0


def team_members(widths: Sequence[int], lanes: int, few: int, n_chains: int, n_threads: int) -> int:
    """Threads that share the layers of one tile with all chains; 1 where each is better off with chains of its own.

    Args:
        widths: sizes between the layers.
        lanes: chains of one register block.
        few: up to so many take half the time of ``lanes``.
        n_chains: of the call.
        n_threads: threads that are worth their start.
    """
    layers = [n_in * n_out for n_in, n_out in itertools.pairwise(widths)]
    members = min(n_threads, sum(layers) // (len(layers) * _MEMBER_WEIGHTS))

    def cost(chains: int) -> int:
        return 1 if chains <= few else 2 * -(-chains // lanes)

    fits = 2 * n_chains <= lanes * n_threads and n_chains <= full_tile(widths)
    return members if fits and cost(n_chains) < members * cost(-(-n_chains // n_threads)) else 1


def steps_per_call(flops_per_step: int, unit: int, members: int = 1) -> int:
    """Steps of one unit after which a thread reports and may be interrupted, and a team looks at its pace."""
    flops = _CALL_FLOPS if members == 1 else _TEAM_CALL_FLOPS
    return max(1, int(flops / (flops_per_step * unit)))
