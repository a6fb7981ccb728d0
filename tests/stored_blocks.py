"""Seeded blocks of draws, and runs that are broken off, for tests of outputs that are written block by block."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kaleido_fast.storing.encoding import Encoding
from kaleido_fast.storing.layout import Layout

FLOATS = Encoding()
LAYOUT = Layout(23, 2, 3, 7, Encoding())


def make_record(encoding: Encoding = FLOATS) -> dict:
    """The least that a store asks of a record."""
    return {"request": {"seed": 1}, "encoding": encoding.as_dict()}


def block_arrays(layout: Layout, block: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Seeded arrays of one block, as stored."""
    rng = np.random.default_rng((seed, block))
    rows = layout.rows(block)
    n = rows.stop - rows.start
    draws = rng.uniform(-1, 1, (n, layout.n_draws, layout.dim))
    return {
        "draws": layout.encoding.encode(draws),
        "residual": rng.random(n).astype(np.float32),
        "steps": rng.integers(0, 300, n, dtype=np.int32),
        "period": rng.integers(0, 3, n, dtype=np.int32),
        "outcome": rng.integers(0, 4, n).astype(np.int8),
    }


def act_after(chains: int, act: Callable[[], object]):
    """A callback that does something once so many chains are done."""

    def callback(state) -> None:
        if state.chains_done >= chains:
            act()

    return callback


def stop_after(chains: int, error: type[BaseException] = KeyboardInterrupt):
    """A callback that breaks the run off once so many chains are done."""

    def stop() -> None:
        raise error

    return act_after(chains, stop)
