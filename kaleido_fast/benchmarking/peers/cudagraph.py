"""Eager torch captured in a CUDA graph: one step, replayed, so that no launch waits for Python."""

from __future__ import annotations

from kaleido_fast.benchmarking.contest import Contestant
from kaleido_fast.benchmarking.peers import Setting
from kaleido_fast.benchmarking.peers.loops import captured


def build(setting: Setting) -> Contestant:
    """A step of all chains, captured; on CPU tensors it runs uncaptured, for tests."""
    model, dtype = setting.network()
    return Contestant(captured(model, setting, dtype), precision=setting.precision)
