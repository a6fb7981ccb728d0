"""Modules that are no plain MLP: with statistics, chance, hooks, parts that torch does not find."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from kaleido_fast import fast_sample

DIM = 6
RANGE = (-1.0, 1.0)


class Mapped(nn.Module):
    """A module whose forward is any function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class HiddenParts(nn.Module):
    """Keeps its layers where torch does not find them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.parts = [nn.Linear(DIM, DIM), {"norm": nn.BatchNorm1d(DIM)}, nn.Dropout(0.5)]

    def forward(self, x):
        linear, norms, drop = self.parts
        return torch.tanh(drop(norms["norm"](linear(x))))


class Locked(nn.Module):
    """Holds what Python cannot copy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.lock = threading.Lock()
        self.norm, self.linear = nn.BatchNorm1d(DIM), nn.Linear(DIM, DIM)

    def forward(self, x):
        with self.lock:
            return torch.tanh(self.linear(self.norm(x)))


class Uncopyable(Locked):
    """Cannot be made anew at all."""

    def __new__(cls, token=None):
        if token is None:
            raise TypeError("made by its factory alone")
        return super().__new__(cls)

    def __init__(self, token) -> None:
        super().__init__()


class Energy(nn.Module):
    """Needs gradients in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.linear = nn.Linear(DIM, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(torch.tanh(self.linear(x)).sum(), x)
        return torch.tanh(x - slope)


def normed(norm) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(norm(nn.Linear(DIM, 9)), nn.PReLU(), nn.Linear(9, DIM), nn.Tanh())


def with_statistics() -> nn.Module:
    torch.manual_seed(1)
    inner = nn.Sequential(nn.Linear(9, 9), nn.BatchNorm1d(9, momentum=0.5), nn.Dropout(0.4))
    return nn.Sequential(nn.Linear(DIM, 9), inner, nn.PReLU(), nn.Dropout(0.5), nn.Linear(9, DIM), nn.Tanh())


def around_a_closure() -> nn.Module:
    inner = with_statistics()
    return Mapped(lambda x: inner(x))


def hooked() -> nn.Module:
    module = with_statistics()
    next(module.children()).register_forward_hook(lambda _module, _inputs, output: 0.5 * output)
    return module


def patched() -> nn.Module:
    module = with_statistics()
    before = module.forward
    module.forward = lambda x: 0.5 * before(x)
    return module


def convolutional() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout2d(), nn.Flatten(),
        nn.Linear(24, DIM), nn.Tanh(),
    )  # fmt: skip


class Holder:
    """No module, but holds one."""

    def __init__(self, part: nn.Module) -> None:
        self.part = part


class ByMode(nn.Module):
    """Tells its mode by its answer alone: no batch, no chance."""

    def forward(self, x):
        return x * 0.5 if self.training else x


SHARED = {"norm": nn.BatchNorm1d(DIM), "mode": ByMode()}
HELD = Holder(ByMode())


def by_a_function(x):
    return SHARED["norm"](HELD.part(x))


class Around(nn.Module):
    """Calls modules that torch does not find."""

    kept = (ByMode(),)

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.linear, self.name = nn.Linear(DIM, DIM), name
        self.holder = Holder(nn.Sequential(ByMode(), nn.BatchNorm1d(DIM)))

    def in_an_object(self, x):
        return self.holder.part(x)

    def in_the_class(self, x):
        return self.kept[0](x)

    def in_a_global(self, x):
        return (lambda y: SHARED["mode"](y))(x)

    def by_a_function(self, x):
        return by_a_function(x)

    def forward(self, x):
        named = {"object": self.in_an_object, "class": self.in_the_class, "global": self.in_a_global}
        return torch.tanh(named.get(self.name, self.by_a_function)(self.linear(x)))


MODULES = {
    "a part in an object": lambda: Around("object"),
    "a part in the class": lambda: Around("class"),
    "a part in a global container": lambda: Around("global"),
    "a part by a function": lambda: Around("function"),
    "batch norm and dropout": with_statistics,
    "a convolution": convolutional,
    "spectral_norm": lambda: normed(parametrizations.spectral_norm),
    "the old spectral_norm": lambda: normed(spectral_norm),
    "the old weight_norm": lambda: normed(weight_norm),
    "an orthogonal layer": lambda: normed(parametrizations.orthogonal),
    "hidden parts": HiddenParts,
    "a closure": around_a_closure,
    "a hook": hooked,
    "a patched forward": patched,
    "a lock": Locked,
    "no copy": lambda: Uncopyable("token"),
    "gradients": Energy,
    "tracing": lambda: torch.jit.trace(normed(lambda layer: layer), torch.zeros(3, DIM)),
    "torch.fx": lambda: torch.fx.symbolic_trace(with_statistics()),
}


def sample(module: nn.Module, n: int = 5, **options):
    defaults: dict[str, Any] = {"burn_in": 3, "dim": DIM, "data_range": RANGE, "device": "cpu", "tol": None}
    return fast_sample(module, n_chains=n, **defaults | options)


def place_dependent(scale: float) -> nn.Module:
    """As a library that rounds by a row's place: the last bits of an answer tell it."""
    return Mapped(lambda x: (0.9 * x).roll(1, 1) + scale * torch.arange(len(x))[:, None])
