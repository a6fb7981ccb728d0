"""Whatever was changed in a module, a class or for all modules is obeyed."""

from __future__ import annotations

import functools

import pytest
import torch
from changed_modules import ATOL, ONE_STEP, HalvedLinear, N, RenamedLinear, as_evaluated, mlp_with, one_step, worst
from conftest import random_mlp
from torch import Tensor, nn

from kaleido_fast import GeneralModuleWarning, InputError, KaleidoMLP, fast_sample, sample_op
from kaleido_fast.checkpoint import ModelCard, save_checkpoint


class OwnMLP(nn.Sequential):
    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(dim, 7), nn.SiLU(), nn.Linear(7, dim), nn.Tanh())


def hooked(model: KaleidoMLP) -> KaleidoMLP:
    model.register_forward_hook(lambda module, args, output: output * 0.5)
    return model


def with_other_layer(model: KaleidoMLP) -> KaleidoMLP:
    model.layers[1] = HalvedLinear(7, 4)
    return model


def with_own_activation(model: KaleidoMLP) -> KaleidoMLP:
    model.activate = torch.sin  # type: ignore[method-assign, assignment]
    return model


class Shifted(KaleidoMLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.9


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (hooked, "the model has a forward hook"),
        (with_other_layer, "layer 1 is HalvedLinear, a Linear with its own forward"),
        (with_own_activation, "the model has its own activate"),
        (lambda model: Shifted(model.spec), "the model is Shifted, a KaleidoMLP with its own forward"),
    ],
)
def test_a_changed_kaleido_mlp_is_run_as_it_is_and_never_by_its_weights(change, why, tmp_path):
    model, z0 = change(random_mlp(4, 7, 4)), torch.rand(N, 4) * 2 - 1
    with pytest.warns(GeneralModuleWarning, match=why):
        result = fast_sample(model, n_chains=N, z0=z0, **ONE_STEP)
    assert torch.allclose(result.draws[:, 0], as_evaluated(model, z0), atol=ATOL)
    for refuses in (
        lambda: sample_op(model, z0=z0),
        lambda: save_checkpoint(tmp_path / "model.safetensors", model, ModelCard()),
    ):
        with pytest.raises(InputError, match=why):
            refuses()


def test_a_hook_on_all_modules_is_obeyed():
    module, z0 = mlp_with("plain"), torch.rand(N, 5) * 2 - 1
    plain, _ = one_step(module, z0, 5, data_range=(-1.0, 1.0))
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, output: output * 0.9)
    try:
        state, engine = one_step(module, z0, 5, data_range=(-1.0, 1.0))
        expected = as_evaluated(module, z0)
    finally:
        hook.remove()
    assert engine == "reference" and torch.allclose(state, expected, atol=ATOL) and not torch.allclose(state, plain)


def test_subclasses_that_change_no_method_stay_fused():
    module, z0 = OwnMLP(4), torch.rand(N, 4) * 2 - 1
    module[0] = RenamedLinear(4, 7)
    assert KaleidoMLP.from_sequential(module).linears[0] is module[0]
    state, _ = one_step(module, z0, 4)
    assert torch.allclose(state, as_evaluated(module, z0), atol=ATOL)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(nn.Linear, "forward"), (nn.Sequential, "forward"), (nn.Module, "__call__"), (KaleidoMLP, "forward")],
)
def test_methods_that_were_replaced_in_a_class_are_obeyed(kind, name, monkeypatch):
    models, z0 = [mlp_with("plain"), random_mlp(5, 7, 5)], torch.rand(N, 5) * 2 - 1
    before = getattr(kind, name)
    monkeypatch.setattr(kind, name, functools.wraps(before)(lambda self, x: before(self, x) * 0.9))
    for model in models:
        state, _ = one_step(model, z0, 5, data_range=(-1.0, 1.0))
        expected = as_evaluated(model, z0)
        assert torch.allclose(state, expected, atol=ATOL), worst(state, expected)


class ByMode(nn.Linear):
    """Another weight in training than in evaluation."""

    weight = property(lambda self: self.own * (3.0 if self.training else 1.0), lambda self, value: None)


class SlopeByMode(nn.LeakyReLU):
    negative_slope = property(lambda self: 0.5 if self.training else 0.1, lambda self, value: None)


def test_what_a_class_computes_at_each_read_is_not_read_once():
    layer, z0 = nn.Linear(5, 5), torch.rand(N, 5) * 2 - 1
    plain = nn.Linear(5, 5)
    plain.own = nn.Parameter(plain._parameters.pop("weight").detach())
    plain.__class__ = ByMode
    for first, activation in ((plain, nn.ReLU()), (nn.Linear(5, 5), SlopeByMode())):
        module = nn.Sequential(first, activation, layer, nn.Tanh()).train()
        state, engine = one_step(module, z0, 5, data_range=(-1.0, 1.0))
        expected = as_evaluated(module, z0)
        assert engine == "reference" and torch.allclose(state, expected, atol=ATOL), worst(state, expected)
