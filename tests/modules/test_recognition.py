"""The network that is sampled is the network that was given: fused where it is understood exactly, else as it is."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from changed_modules import (
    ATOL,
    HOW_NOT_PLAIN,
    IN_FORCE,
    N,
    as_evaluated,
    assert_untouched,
    changed,
    everything_in,
    mlp_with,
    one_step,
    train_a_little,
    worst,
)
from conftest import random_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kaleido_fast import GeneralModuleWarning, InputError, KaleidoMLP, ModelSpec, fast_sample
from kaleido_fast.model import plain_mlp
from kaleido_fast.modules.exactness import UnknownModuleError


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


MIDDLES = (nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Softplus, nn.ELU, nn.Hardtanh, nn.ReLU6)
NOTHINGS = (nn.Identity, nn.Dropout, nn.Flatten, nn.AlphaDropout)


@st.composite
def modules(draw: st.DrawFn) -> tuple[nn.Module, int]:
    """A module from torch's layers, containers, hooks and parametrisations, ended by a bound, and its D."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    dim = draw(st.integers(1, 9))
    width, parts = dim, []
    activation = draw(st.sampled_from(MIDDLES))
    for last in [False] * draw(st.integers(0, 3)) + [True]:
        n_out = dim if last else draw(st.integers(1, 12))
        how = draw(st.sampled_from(["plain"] * 8 + [*IN_FORCE, *HOW_NOT_PLAIN]))
        layer = changed(nn.Linear(width, n_out, bias=how == "pruned bias" or draw(st.booleans())), how)
        extra = draw(st.sampled_from([None] * 6 + ["norm", "batch", "nested", "residual", "nothing"]))
        width = n_out
        if extra == "norm":
            parts += [layer, nn.LayerNorm(n_out)]
        elif extra == "batch":
            parts += [layer, nn.BatchNorm1d(n_out)]
        elif extra == "nested":
            parts += [nn.Sequential(layer, nn.Identity())]
        elif extra == "residual":
            parts += [layer, Residual(nn.Linear(n_out, n_out))]
        elif extra == "nothing":
            parts += [draw(st.sampled_from(NOTHINGS))(), layer]
        else:
            parts += [layer]
        parts += [(nn.Tanh if draw(st.booleans()) else nn.Sigmoid)() if last else activation()]
    module: nn.Module = nn.Sequential(*parts)
    if draw(st.booleans()):
        train_a_little(module)
    wrapper = draw(st.sampled_from([None, None, None, nn.DataParallel, torch.optim.swa_utils.AveragedModel]))
    if wrapper is nn.DataParallel or (wrapper is not None and deep_copies(module)):
        module = wrapper(module)
    return module.train(draw(st.booleans())), dim


def deep_copies(module: nn.Module) -> bool:
    """Whether torch can copy a module: those whose hooks left a computed weight behind, it cannot."""
    try:
        copy.deepcopy(module)
    except RuntimeError:
        return False
    return True


@settings(max_examples=150, deadline=None)
@given(modules(), st.sampled_from(["auto", "reference"]))
def test_one_step_of_any_module_is_the_module_itself(made, engine):
    module, dim = made
    z0 = torch.rand(N, dim) * 2 - 1
    before = everything_in(module)
    state, _ = one_step(module, z0, dim, data_range=(-1.0, 1.0), engine=engine)
    assert_untouched(module, before)
    expected = as_evaluated(module, z0)
    assert torch.allclose(state, expected, atol=ATOL, rtol=0), worst(state, expected)


def test_auto_says_once_why_a_module_runs_as_it_is():
    module = mlp_with("own forward")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            result = fast_sample(module, n_chains=2, burn_in=1, dim=5, data_range=(-1.0, 1.0))
        fast_sample(module, n_chains=2, burn_in=1, dim=5, data_range=(-1.0, 1.0), engine="reference")
    said = [str(warning.message) for warning in caught if warning.category is GeneralModuleWarning]
    assert len(said) == 1 and "HalvedLinear" in said[0]
    assert caught[0].filename == __file__
    assert "HalvedLinear" in result.plan.reason


def test_what_does_nothing_in_evaluation_is_passed_over():
    linear, last = nn.Linear(6, 5), nn.Linear(5, 6)
    module = nn.Sequential(
        nn.Flatten(), nn.Sequential(linear, nn.Identity()), nn.GELU("tanh"), nn.Dropout(0.5), last, nn.Sigmoid()
    )
    model = KaleidoMLP.from_sequential(module)
    assert model.spec == ModelSpec((6, 5, 6), "gelu_tanh", "sigmoid")
    assert model.linears == [linear, last]
    with pytest.raises(UnknownModuleError, match="module 0 of the Sequential is Flatten"):
        KaleidoMLP.from_sequential(nn.Sequential(nn.Flatten(0), nn.Linear(6, 6), nn.Tanh()))


@pytest.mark.parametrize("given", [{"dim": 5}, {"data_range": (0.0, 1.0)}, {"dim": 4, "data_range": (-1.0, 0.5)}])
def test_a_size_that_is_not_the_networks_own_is_refused(given):
    with pytest.raises(InputError, match=r"is .* the model('s| has) .*: leave"):
        fast_sample(random_mlp(4, 7, 4), n_chains=2, **given)
    assert fast_sample(random_mlp(4, 7, 4), n_chains=2, burn_in=1, dim=4, data_range=(-1, 1)).draws.shape == (2, 1, 4)


def test_a_sequential_that_cannot_run_is_not_run():
    module = mlp_with("plain")
    module.register_module("4", None)
    with pytest.raises(UnknownModuleError, match="module 4 of the Sequential is None"):
        plain_mlp(module)
