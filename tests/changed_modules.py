"""Modules that were changed in all ways that torch knows, and how they are compared."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from kaleido_fast import GeneralModuleWarning, fast_sample

ONE_STEP: dict[str, Any] = {"burn_in": 0, "n_draws": 1, "thin": 1, "settle": 0, "jitter": 0.0, "tol": None}
N, ATOL = 6, 2e-5


class HalvedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class RenamedLinear(nn.Linear):
    """Another class of the same behaviour: it adds a method and changes none."""

    def n_weights(self) -> int:
        return self.weight.numel()


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def changed(layer: nn.Linear, how: str) -> nn.Module:
    """A linear layer after one of the things that people do to layers."""
    if how == "own forward":
        return HalvedLinear(layer.in_features, layer.out_features)
    if how == "renamed":
        return RenamedLinear(layer.in_features, layer.out_features)
    if how == "forward set on it":
        layer.forward = lambda x: nn.functional.linear(x, layer.weight) - 0.3  # type: ignore[method-assign, assignment]
    elif how == "hook":
        layer.register_forward_hook(lambda module, args, output: output + 0.2)
    elif how == "pre-hook":
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 0.7,))
    elif how == "weight_norm":
        parametrizations.weight_norm(layer)
    elif how == "spectral_norm":
        parametrizations.spectral_norm(layer)
    elif how == "parametrised":
        parametrize.register_parametrization(layer, "weight", Doubled())
    elif how == "old weight_norm":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            weight_norm(layer)
    elif how == "old spectral_norm":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            spectral_norm(layer)
    elif how == "pruned":
        prune.l1_unstructured(layer, "weight", 0.5)
    elif how == "pruned bias":
        prune.random_unstructured(layer, "bias", 0.5)
    elif how == "pruned twice":
        prune.l1_unstructured(layer, "weight", 0.3)
        prune.random_unstructured(layer, "weight", 0.3)
    elif how == "plain tensor":
        weight = layer.weight.detach().clone()
        del layer.weight
        layer.weight = weight
    return layer


HOW_NOT_PLAIN = ("own forward", "forward set on it", "hook", "pre-hook")
IN_FORCE = (
    "weight_norm",
    "spectral_norm",
    "parametrised",
    "old weight_norm",
    "old spectral_norm",
    "pruned",
    "pruned bias",
    "pruned twice",
    "plain tensor",
    "renamed",
)


def train_a_little(module: nn.Module) -> None:
    """Change every parameter, as an optimizer does: what was made from the old ones is stale now."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def one_step(module: nn.Module, z0: Tensor, dim: int, **options: Any) -> tuple[Tensor, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GeneralModuleWarning)
        result = fast_sample(module, n_chains=len(z0), z0=z0, dim=dim, **{**ONE_STEP, **options})
    return result.draws[:, 0], result.stats.engine


def as_evaluated(module: nn.Module, x: Tensor) -> Tensor:
    modes = {m: m.training for m in module.modules()}
    module.eval()
    with torch.no_grad():
        y = module(x)
    for m, mode in modes.items():
        m.training = mode
    return y


def everything_in(module: nn.Module) -> dict[str, object]:
    tensors = {name: (id(t), t.detach().clone()) for name, t in [*module.named_parameters(), *module.named_buffers()]}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in module.named_modules()}
    modes = {name: m.training for name, m in module.named_modules()}
    return {"tensors": tensors, "hooks": hooks, "modes": modes}


def assert_untouched(module: nn.Module, before: dict[str, object]) -> None:
    now = everything_in(module)
    assert now["hooks"] == before["hooks"] and now["modes"] == before["modes"]
    then = before["tensors"]
    assert isinstance(then, dict) and isinstance(now["tensors"], dict) and then.keys() == now["tensors"].keys()
    for name, (identity, value) in now["tensors"].items():
        assert identity == then[name][0] and torch.equal(value, then[name][1]), f"{name} was written to"


def worst(a: Tensor, b: Tensor) -> str:
    apart = (a - b).abs()
    place = int(apart.argmax())
    return f"worst error {float(apart.max()):.3g} at chain {place // a.shape[1]}, value {place % a.shape[1]}"


def mlp_with(how: str, *, dim: int = 5) -> nn.Sequential:
    torch.manual_seed(3)
    module = nn.Sequential(changed(nn.Linear(dim, 8), how), nn.ReLU(), nn.Linear(8, dim), nn.Tanh())
    train_a_little(module)
    return module
