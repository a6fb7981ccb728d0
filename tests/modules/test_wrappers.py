"""Wrappers: looked through where they change nothing, obeyed where they do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from changed_modules import N, mlp_with, one_step
from conftest import random_mlp
from torch import Tensor, nn

from kaleido_fast import InputError
from kaleido_fast.model import model_hash, plain_mlp
from kaleido_fast.modules.exactness import UnknownModuleError


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: torch.compile(m, backend="eager"),
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        lambda m: nn.DataParallel(torch.compile(m, backend="eager")),  # type: ignore[type-var]
    ],
)
def test_wrappers_that_change_nothing_are_looked_through(wrap):
    model = random_mlp(4, 7, 4)
    assert model_hash(plain_mlp(wrap(model))) == model_hash(model)
    wrapped = wrap(model)
    wrapped.register_forward_hook(lambda module, args, output: output * 0.5)
    with pytest.raises(UnknownModuleError):
        plain_mlp(wrapped)


def with_hook_on_compiled(module: nn.Module) -> nn.Module:
    compiled: Any = torch.compile(module, backend="eager")
    compiled.register_forward_hook(lambda module, args, output: output * 0.5)
    return compiled


def with_forward_on_compiled(module: nn.Module) -> nn.Module:
    compiled: Any = torch.compile(module, backend="eager")
    before = compiled.forward
    compiled.forward = lambda x: 0.5 * before(x)
    return compiled


class Holds(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = [part]

    def forward(self, x: Tensor) -> Tensor:
        return self.part[0](x)


@pytest.mark.parametrize("around", [lambda m: m, nn.Sequential, Holds])
@pytest.mark.parametrize("change", [with_hook_on_compiled, with_forward_on_compiled])
def test_what_was_added_to_a_compiled_module_is_not_lost_in_silence(change, around):
    with pytest.raises(InputError, match=r"was set on what torch\.compile returned for a Sequential"):
        one_step(around(change(mlp_with("plain"))), torch.zeros(N, 5), 5, data_range=(-1.0, 1.0))
