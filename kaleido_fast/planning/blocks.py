"""How many chains go at once, and the memory that takes."""

from __future__ import annotations

import math

from kaleido_fast.errors import InputError
from kaleido_fast.planning.facts import DeviceFacts
from kaleido_fast.planning.request import SampleRequest

ORBIT_VALUES = 2**24  # values of cycles held at once: 64 MiB of fp32
STORED_VALUES = 2**20  # values of the draws of one block that is written as it is done: 4 MiB in fp32
WAITING_BLOCKS = 2  # of a run that is stored: computed, not yet written
LAUNCHED_CHAINS, LAUNCHED_VALUES = 2**18, 2**28  # most of one launch of a fused kernel: 1 GiB of states in fp32
HELD_BLOCKS = 1 + WAITING_BLOCKS + 1  # at work, waiting and being written


def tile_rows(width: int, kind: str) -> int:
    """Rows of one tile of the reference engine, a power of two.

    On a CPU the activations of a tile stay in the second-level cache (1 MiB of ``width`` fp32 values); a GPU wants
    enough rows to fill it. Fixed by the network's shape alone, so that a chain's bits depend on nothing else.
    """
    if kind == "cuda":
        return 16_384
    rows = 2**20 // (4 * width)
    return max(64, min(4096, 2 ** int(math.log2(max(rows, 1)))))


def module_tile(n_chains: int, dim: int, kind: str) -> int:
    """Rows that a module which is no plain MLP gets at once, unless the request says.

    It is part of the request, not of the plan: libraries round differently for another number of rows. One
    chain is run alone, a few together, and from seven times `full_module_tile` on there are always that many. Between,
    the sizes are those with three leading bits (1 .. 8, 10, 12, 14, 16, 20, ...), so that most runs agree and at most
    a fourth of the rows is idle.
    """
    full = full_module_tile(dim, kind)
    rows = -(-n_chains // -(-n_chains // full))
    unit = 2 ** max(0, (rows - 1).bit_length() - 3)
    return min(full, -(-rows // unit) * unit)


def full_module_tile(dim: int, kind: str) -> int:
    """Rows of the largest tiles of a general module, a power of two.

    Its hidden sizes are not known. Measured on a CPU, per row: a convolutional autoencoder of 784 values 120 us in
    tiles of 128 or 256, and 200 in tiles of 1024; residual layers of 256 and a transformer of 64 values as much in
    tiles of 256 as of 512, and twice that in tiles of 4096. A GPU wants more.
    """
    most, values = (16_384, 2**22) if kind == "cuda" else (512, 2**18)
    return max(16, min(most, 2 ** int(math.log2(max(values // dim, 1)))))


def stored_block(rows: int, values: int) -> int:
    """Chains of a block of a stored run, whole tiles of ``rows``; ``values`` are those of the draws of one chain."""
    return rows * max(1, min(2**15, STORED_VALUES // values) // rows)


def compute_block(dim: int, rows: int) -> int:
    """Chains of a block that is computed tile by tile, whole tiles of ``rows``: its states stay below 64 MiB."""
    return rows * max(1, min(2**16, 2**24 // dim) // rows)


def launch_wave(tile_chains: int, n_sm: int) -> int:
    """Chains that fill a GPU of ``n_sm`` multiprocessors, each with two programs of ``tile_chains`` chains."""
    return 2 * n_sm * tile_chains


def launch_block(wave: int, dim: int, rows: int) -> int:
    """Chains of one launch of a fused kernel: as many whole waves as are within `LAUNCHED_CHAINS` and their values.

    The last wave of a launch leaves multiprocessors idle, and each launch has its cost on the host. On an H200 blocks
    of 16,384 chains ran 100,000 of mnist in 7 waves, with 9 ms a call beside the kernel; one launch has 6.
    """
    most = max(rows, min(LAUNCHED_CHAINS, LAUNCHED_VALUES // dim))
    return most // wave * wave or most // rows * rows


def smaller_block(block: int, wave: int, rows: int) -> int:
    """About half of a block, in whole waves as long as it holds one, then in whole tiles of ``rows``."""
    half = block // 2
    return half // wave * wave or rows * max(1, half // rows)


def item_bytes(request: SampleRequest) -> int:
    """Bytes of a value of the states."""
    return 8 if request.precision == "fp64" else 4


def chain_bytes(request: SampleRequest, dim: int) -> int:
    """Bytes of what is kept of a chain: draws, residual (4), steps and period (4 each), outcome (1)."""
    return request.n_draws * dim * item_bytes(request) + 13


def block_bytes(request: SampleRequest, dim: int, block: int) -> int:
    """Bytes of the states and figures of the chains at work, estimated."""
    item = item_bytes(request)
    at_work = min(block, request.n_chains)
    states = 5 if request.freezes else 3  # before, after, between; saved, and being gathered, where chains are frozen
    orbits = 0
    if request.freezes and request.max_period > 1:  # searched for their period in parts of about 64 MiB, held twice
        orbits = 2 * item * min(ORBIT_VALUES, at_work * (request.max_period + 1) * dim)
    return at_work * (states * dim * item + 64) + orbits


def check_memory(need: int, request: SampleRequest, dim: int, facts: DeviceFacts) -> None:
    if need <= facts.memory:
        return
    fits = max(0, int(facts.memory * 0.9)) // chain_bytes(request, dim)
    raise InputError(
        f"{request.n_chains:,} chains x {request.n_draws:,} draws x {dim:,} values need {_gib(need)}, "
        f"{_gib(facts.memory)} are free: pass at most about {fits:,} chains at a time "
        "(first_chain continues), or fewer draws"
    )


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:,.1f} GiB"
