"""Eager torch in float16."""

from __future__ import annotations

import torch

from kaleido_fast.benchmarking.contest import Contestant
from kaleido_fast.benchmarking.peers import Setting
from kaleido_fast.benchmarking.peers.half import build_half


def build(setting: Setting) -> Contestant:
    """Eager torch in float16."""
    return build_half(setting, torch.float16, "fp16")
