"""The network that is sampled is the network that was given: fused where it is understood exactly, else as it is."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
from conftest import random_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from kaleido_fast import GeneralModuleWarning, InputError, KaleidoMLP, ModelSpec, fast_sample, sample_op
from kaleido_fast.checkpoint import ModelCard, load_checkpoint, save_checkpoint
from kaleido_fast.model import model_hash, plain_mlp
from kaleido_fast.modules.exactness import UnknownModuleError

ONE_STEP: dict[str, Any] = {"burn_in": 0, "n_draws": 1, "thin": 1, "settle": 0, "jitter": 0.0, "tol": None}
N, ATOL = 6, 2e-5


class HalvedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class RenamedLinear(nn.Linear):
    """Another class of the same behaviour: it adds a method and changes none."""

    def n_weights(self) -> int:
        return self.weight.numel()


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class OwnMLP(nn.Sequential):
    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(dim, 7), nn.SiLU(), nn.Linear(7, dim), nn.Tanh())


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Random(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


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
MIDDLES = (nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Softplus, nn.ELU, nn.Hardtanh, nn.ReLU6)
NOTHINGS = (nn.Identity, nn.Dropout, nn.Flatten, nn.AlphaDropout)


def train_a_little(module: nn.Module) -> None:
    """Change every parameter, as an optimizer does: what was made from the old ones is stale now."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


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


def mlp_with(how: str, *, dim: int = 5) -> nn.Sequential:
    torch.manual_seed(3)
    module = nn.Sequential(changed(nn.Linear(dim, 8), how), nn.ReLU(), nn.Linear(8, dim), nn.Tanh())
    train_a_little(module)
    return module


@pytest.mark.parametrize("how", IN_FORCE)
def test_layers_that_torch_changes_are_taken_and_stored_with_the_weights_in_force(how, tmp_path):
    module, z0 = mlp_with(how), torch.rand(N, 5) * 2 - 1
    before = everything_in(module)
    mlp = KaleidoMLP.from_sequential(module)
    save_checkpoint(tmp_path / "model.safetensors", module, ModelCard())
    assert_untouched(module, before)
    stored = load_checkpoint(tmp_path / "model.safetensors")
    assert stored.model_hash == model_hash(mlp)
    expected = as_evaluated(module, z0)
    for understood in (mlp, stored.model):
        assert torch.allclose(understood(z0), expected, atol=1e-6), worst(understood(z0), expected)
    train_a_little(module)  # what was read before is not used again
    state, _ = one_step(module, z0, 5)
    assert torch.allclose(state, as_evaluated(module, z0), atol=ATOL)


@pytest.mark.parametrize("how", HOW_NOT_PLAIN)
def test_a_layer_that_is_not_understood_is_named_wherever_only_weights_count(how, tmp_path):
    module = mlp_with(how)
    for refuses in (
        lambda: KaleidoMLP.from_sequential(module),
        lambda: save_checkpoint(tmp_path / "model.safetensors", module, ModelCard()),
        lambda: fast_sample(module, n_chains=2, dim=5, data_range=(-1, 1), engine="cpu"),
        lambda: fast_sample(module, n_chains=2),
    ):
        with pytest.raises(InputError, match=r"module 0 (has|is HalvedLinear, a Linear with its own forward)"):
            refuses()
    assert not any(tmp_path.iterdir())


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


def test_subclasses_that_change_no_method_stay_fused():
    module, z0 = OwnMLP(4), torch.rand(N, 4) * 2 - 1
    module[0] = RenamedLinear(4, 7)
    assert KaleidoMLP.from_sequential(module).linears[0] is module[0]
    state, _ = one_step(module, z0, 4)
    assert torch.allclose(state, as_evaluated(module, z0), atol=ATOL)


def test_a_parametrisation_without_one_answer_is_refused():
    module = mlp_with("plain")
    parametrize.register_parametrization(module[0], "weight", Random())
    with pytest.raises(UnknownModuleError, match="module 0 has a parametrisation that gives other weights each time"):
        plain_mlp(module)


def test_weights_that_are_no_plain_tensors_are_not_read():
    sparse = mlp_with("plain")
    sparse[0].weight = nn.Parameter(sparse[0].weight.detach().to_sparse(), requires_grad=False)
    lazy = nn.Sequential(nn.LazyLinear(5), nn.Tanh())
    for module, why in ((sparse, "module 0 has a weight in torch.float32, torch.sparse_coo"), (lazy, "LazyLinear")):
        with pytest.raises(UnknownModuleError, match=why):
            plain_mlp(module)


def test_a_layer_that_is_used_twice_is_stored_twice(tmp_path):
    layer = nn.Linear(4, 4)
    module = nn.Sequential(layer, nn.ReLU(), layer, nn.Tanh())
    save_checkpoint(tmp_path / "model.safetensors", module, ModelCard())
    x = torch.rand(3, 4)
    assert torch.equal(load_checkpoint(tmp_path / "model.safetensors").model(x), module(x))


@pytest.mark.parametrize("given", [{"dim": 5}, {"data_range": (0.0, 1.0)}, {"dim": 4, "data_range": (-1.0, 0.5)}])
def test_a_size_that_is_not_the_networks_own_is_refused(given):
    with pytest.raises(InputError, match=r"is .* the model('s| has) .*: leave"):
        fast_sample(random_mlp(4, 7, 4), n_chains=2, **given)
    assert fast_sample(random_mlp(4, 7, 4), n_chains=2, burn_in=1, dim=4, data_range=(-1, 1)).draws.shape == (2, 1, 4)


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


def test_a_sequential_that_cannot_run_is_not_run():
    module = mlp_with("plain")
    module.register_module("4", None)
    with pytest.raises(UnknownModuleError, match="module 4 of the Sequential is None"):
        plain_mlp(module)


@pytest.mark.parametrize("middle", [nn.ReLU, nn.PReLU])
def test_cached_parametrisations_of_other_modules_are_not_taken(middle):
    """Torch keeps them by where a module lies in memory, which another one takes when it is gone."""
    z0 = torch.rand(N, 5) * 2 - 1
    with parametrize.cached():
        for seed in range(8):
            torch.manual_seed(seed)
            layers = [parametrizations.weight_norm(nn.Linear(5, 5)) for _ in range(4)]
            module = nn.Sequential(*[part for layer in layers for part in (layer, middle())][:-1], nn.Tanh())
            state, _ = one_step(module, z0, 5, data_range=(-1.0, 1.0))
            assert not parametrize._cache, "weights of a copy are left"
            expected = as_evaluated(module, z0)
            assert torch.allclose(state, expected, atol=ATOL), f"module {seed}: {worst(state, expected)}"
            parametrize._cache.clear()


def test_weights_beyond_fp32_are_refused_before_anything_is_written(tmp_path):
    path, module = tmp_path / "model.safetensors", mlp_with("plain").double()
    save_checkpoint(path, module, ModelCard())
    before = path.read_bytes()
    with torch.no_grad():
        module[0].weight[0, 0] = 1e39
    for refuses in (
        lambda: save_checkpoint(path, module, ModelCard()),
        lambda: fast_sample(module, n_chains=2, burn_in=0),
    ):
        with pytest.raises(InputError, match=r"weight layers\.0\.weight holds 1 NaN or infinite"):
            refuses()
    assert path.read_bytes() == before


def test_a_hash_names_the_bits_of_the_weights_and_a_checkpoint_those_that_it_stores(tmp_path):
    module = mlp_with("plain").double()
    hashes = {fast_sample(module, n_chains=1, burn_in=0).model_hash}
    assert hashes == {model_hash(plain_mlp(mlp_with("plain")))}, "fp64 of fp32 values is another model"
    for change in (1e-11, 2e-11):  # less than fp32 tells apart, more than a run in fp64 does
        with torch.no_grad():
            module[0].weight.add_(change)
        hashes.add(fast_sample(module, n_chains=1, burn_in=0).model_hash)
    for zero in (0.0, -0.0):
        with torch.no_grad():
            module[0].bias[0] = zero
        hashes.add(fast_sample(module, n_chains=1, burn_in=0).model_hash)
    assert len(hashes) == 5
    stored = save_checkpoint(tmp_path / "model.safetensors", module, ModelCard())
    assert load_checkpoint(tmp_path / "model.safetensors").model_hash == stored
