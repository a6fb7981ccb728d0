"""Wrappers that change nothing of a module, and the module inside of them."""

from __future__ import annotations

import sys
import types
from typing import cast

from torch import nn

from kaleido_fast.modules.exactness import global_hooks, is_hooked, own_methods


def look_through(module: nn.Module) -> nn.Module:
    """The module inside of wrappers that change nothing: `torch.compile`, data parallelism, averaged weights."""
    while (inner := _wrapped(module)) is not None:
        module = inner
    return module


def as_written(module: nn.Module) -> nn.Module:
    """The module inside of what ``torch.compile`` returned, where that does nothing else; any other one as it is."""
    while is_compiled(module) and not why_more_than_compiled(module) and not global_hooks():
        module = cast(nn.Module, module._orig_mod)
    return module


def is_compiled(module: object) -> bool:
    """Whether it is what ``torch.compile`` returned for a module."""
    compiled = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
    return compiled is not None and type(module) is compiled


def why_more_than_compiled(module: nn.Module) -> str:
    """What was added to the module that ``torch.compile`` returned, which a copy would not have; empty if nothing."""
    forward = module.forward
    lazy = isinstance(forward, types.MethodType) and forward.__func__ in vars(type(module)).values()
    if not lazy and not hasattr(forward, "_torchdynamo_orig_callable"):  # dynamo's own has that mark
        return "a forward"
    return "a forward hook" if module._forward_hooks or module._forward_pre_hooks else ""


def _wrapped(module: nn.Module) -> nn.Module | None:
    """What a wrapper wraps; None for a module that is none, or one that does more (hooks, a forward of its own)."""
    if (inner := as_written(module)) is not module:
        return inner
    if is_hooked(module):
        return None
    averaged = getattr(sys.modules.get("torch.optim.swa_utils"), "AveragedModel", None)
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, averaged)
    if any(type(module) is wrapper for wrapper in wrappers) and not own_methods(module):
        return cast(nn.Module, module.module)
    return None
