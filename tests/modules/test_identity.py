"""Modules of any kind are told apart, the same way in every process."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import subprocess
import sys
import warnings
from types import FunctionType, MethodType

import pytest
import torch
import torch.nn.functional as F
from conftest import random_mlp
from told_modules import RUN, Net, net, squash
from torch import nn
from torch.nn.utils import parametrizations, prune

from kaleido_fast import InputError, fast_sample, sample_to
from kaleido_fast.modules.identity import identify


def modules() -> dict[str, nn.Module]:
    """Modules of all kinds, made the same way each time."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        hooked = nn.Linear(3, 3)
        hooked.register_forward_hook(lambda module, inputs, output: output * 2)
        made = {
            "net": Net(),
            "hooked": hooked,
            "mlp inside": nn.Sequential(random_mlp(3, 5, 3), nn.ReLU6()),
            "convolutions": nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 3), nn.GroupNorm(1, 2)),
            "recurrent": nn.LSTM(3, 3),
            "transformer": nn.TransformerEncoderLayer(4, 2, 8),
            "weight norm": parametrizations.weight_norm(nn.Linear(3, 3)),
            "old weight norm": nn.utils.weight_norm(nn.Linear(3, 3)),
            "old spectral norm": nn.utils.spectral_norm(nn.Linear(3, 3)),
            "pruned": prune.l1_unstructured(nn.Linear(3, 3), "weight", 2),
            "scripted": torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.Tanh())),
            "traced": torch.jit.trace(Net().eval(), torch.zeros(2, 3)),
            "graph": torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.Tanh())),
            "parallel": nn.DataParallel(Net()),
            "bfloat16": nn.Linear(3, 3, dtype=torch.bfloat16),
        }
        made["own forward"] = nn.Linear(3, 3)
        made["own forward"].forward = lambda x: x * 2
        return made


def test_identities_are_the_same_in_every_process():
    here = {name: identify(module).digest for name, module in modules().items()}
    assert len(set(here.values())) == len(here) and all(len(digest) == 64 for digest in here.values()), here
    program = (
        f"import torch, {__name__} as t\n"
        "from kaleido_fast.modules.identity import identify\n"
        "torch.jit.script(torch.nn.Sequential(torch.nn.Linear(3, 3)))\n"
        "print({name: identify(module).digest for name, module in t.modules().items()})"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == str(here)


@contextlib.contextmanager
def replaced(owner, name, value):
    """Something of the module's code, changed for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def changed_constant(function: FunctionType, old: float, new: float) -> FunctionType:
    """The function with another constant in its code."""
    constants = tuple(new if constant == old else constant for constant in function.__code__.co_consts)
    code = function.__code__.replace(co_consts=constants)
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__)


def doubled(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(2 * x)


HERE = sys.modules[Net.__module__]


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.inner[0].weight.data.view(-1)[4:5].mul_(1.001),
        lambda module: module.inner[1].running_mean.add_(1e-6),
        lambda module: module.shift.fill_(-0.0),
        lambda module: module.register_buffer("more", torch.zeros(1)),
        lambda module: module.double(),
        lambda module: setattr(module, "scale", 1.0000000000000002),
        lambda module: setattr(module, "scale", 1),
        lambda module: setattr(module, "activation", functools.partial(F.gelu, approximate="none")),
        lambda module: module.names.add("more"),
        lambda module: module.table.__setitem__(0, 5),
        lambda module: setattr(module, "shape", {"rows": [1, 2, None]}),
        lambda module: module.inner.append(nn.Identity()),
        lambda module: module.inner.__setitem__(1, nn.BatchNorm1d(3, eps=1e-4)),
        lambda module: module.register_forward_hook(lambda *_: None),
        lambda module: module.inner[0].register_forward_pre_hook(lambda *_: None),
        lambda module: setattr(module, "forward", MethodType(lambda self, x: x, module)),
        lambda module: parametrizations.weight_norm(module.inner[0]),
    ],
)
def test_whatever_changes_what_is_computed_changes_the_identity(change):
    module = net()
    before = identify(module).digest
    change(module)
    assert identify(module).digest not in ("", before)


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (HERE, "GAIN", 1.25),
        (HERE, "squash", doubled),
        (Net, "forward", lambda self, x: x),
        (Net, "words", frozenset()),
        (Net, "extra", 3),
        (Net.forward, "__defaults__", (0.5,)),
        (squash, "__code__", doubled.__code__),
    ],
    ids=lambda value: getattr(value, "__name__", getattr(value, "co_name", str(value))),
)
def test_code_and_what_it_reads_belong_to_the_identity(owner, name, value, monkeypatch):
    module = net()
    before = identify(module).digest
    monkeypatch.setattr(owner, name, value, raising=False)
    assert identify(module).digest not in ("", before)
    monkeypatch.undo()
    assert identify(module).digest == before


def test_constants_in_code_and_global_hooks_belong_to_the_identity():
    module = nn.Linear(3, 3)
    one = FunctionType(compile("def f(x):\n return x * 2.5", "one", "exec").co_consts[0], {}, "f")
    module.forward = one
    before = identify(module).digest
    module.forward = changed_constant(one, 2.5, 2.25)
    assert identify(module).digest != before
    module.forward = FunctionType(compile("\n\ndef f(x):\n return x * 2.5", "elsewhere", "exec").co_consts[0], {}, "f")
    assert identify(module).digest == before, "a line number is no difference"
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert identify(module).digest != before
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.train(),
        lambda module: module.requires_grad_(False),
        lambda module: module(torch.rand(4, 3)).sum().backward(),
        lambda module: module.inner[0].weight.data.set_(module.inner[0].weight.detach().T.contiguous().T),
        lambda module: module.load_state_dict(copy.deepcopy(module.state_dict())),
        lambda module: module.register_state_dict_post_hook(lambda *_: None),
        lambda module: module.inner[0].register_full_backward_hook(lambda *_: None),
        lambda module: setattr(Net.forward, "__doc__", None),
    ],
)
def test_what_changes_nothing_does_not_count(change):
    module = net()
    before = identify(module).digest
    change(module)
    assert identify(module).digest == before
    assert identify(copy.deepcopy(module)).digest == before


def test_a_copy_is_the_same_whatever_becomes_of_the_original():
    for name, module in modules().items():
        if name not in ("scripted", "traced", "old weight norm", "own forward", "pruned"):  # torch or the test cannot
            twin, before = copy.deepcopy(module), identify(module).digest
            with torch.no_grad():
                next(module.parameters()).add_(1)
            assert identify(twin).digest == before != identify(module).digest, name


def test_compiled_functions_are_told_by_what_they_compile():
    """Also those within a module; whether they were called already does not count."""

    def module_of(factor: float) -> nn.Module:
        def scaled(x: torch.Tensor) -> torch.Tensor:
            return x * factor

        module = nn.Identity()
        vars(module)["forward"] = torch.compile(scaled, backend="eager")
        return module

    module = module_of(2.0)
    before = identify(module).digest
    module(torch.zeros(2, 3))
    assert identify(module).digest == before == identify(module_of(2.0)).digest != identify(module_of(3.0)).digest


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm, lambda m: prune.identity(m, "weight")])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_each_call_computes_do_not_count(norm):
    """Before the first call after a change they are those of before."""
    module = norm(nn.Linear(3, 3)).eval()
    with torch.no_grad():
        next(tensor for name, tensor in module.named_parameters() if "weight" in name).add_(1)
    before = identify(module).digest
    stale = module.weight.clone()
    module(torch.zeros(1, 3))
    assert identify(module).digest == before
    assert not torch.equal(stale, module.weight)


def nested(times: int) -> list:
    inner: list = []
    for _ in range(times):
        inner = [inner]
    return inner


@pytest.mark.parametrize(
    ("part", "why"),
    [
        (lambda: sys.__stdout__, r"its part is of type _io\.TextIOWrapper, whose contents cannot be read"),
        (lambda: [{"key": (n for n in "")}], r"its part\.key is of type builtins\.generator"),
        (lambda: torch.eye(3).to_sparse(), r"its part is a tensor of layout torch\.sparse_coo"),
        (lambda: nested(10_000), "nested too deeply"),
    ],
)
def test_what_cannot_be_told_is_named_and_refused_for_a_store(part, why, tmp_path):
    pytest.importorskip("zarr")
    module = nn.Identity()
    module.part = part()
    identity = identify(module)
    assert identity.digest == ""
    with pytest.raises(InputError, match=r"this Identity cannot be told from other models: .*" + why) as caught:
        sample_to(tmp_path / "a.zarr", module, **RUN, device="cpu")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    options = {**RUN, "n_chains": 2, "device": "cpu"}
    del options["chunk_chains"]
    assert fast_sample(module, **options).model_hash == ""


def test_a_module_without_weights_yet_has_no_identity():
    assert "a parameter without values: run the module once" in identify(nn.LazyLinear(3)).unidentified


@pytest.mark.parametrize(("kind", "name"), [(nn.Linear, "forward"), (nn.Module, "__call__"), (nn.Tanh, "forward")])
def test_a_persons_code_set_on_a_class_of_torch_belongs_to_the_identity(kind, name):
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    before, method = identify(module), getattr(kind, name)
    halved = functools.wraps(method)(lambda self, x: 0.5 * method(self, x))
    with replaced(kind, name, halved):
        changed = identify(module)
    assert changed.digest not in (before.digest, "")
    assert identify(module) == before
