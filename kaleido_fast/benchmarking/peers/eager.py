"""Plain torch: ``x = model(x)`` in a loop."""

from __future__ import annotations

from kaleido_fast.benchmarking.contest import Contestant
from kaleido_fast.benchmarking.peers import Setting
from kaleido_fast.benchmarking.peers.loops import looped


def build(setting: Setting) -> Contestant:
    """Eager torch with weights and states in the setting's precision; states are returned in fp32."""
    model, dtype = setting.network()
    return Contestant(looped(model, dtype), precision=setting.precision)
