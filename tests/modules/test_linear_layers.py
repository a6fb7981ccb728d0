"""Linear layers: taken with the weights in force, or refused by name."""

from __future__ import annotations

import pytest
import torch
from changed_modules import (
    ATOL,
    HOW_NOT_PLAIN,
    IN_FORCE,
    N,
    as_evaluated,
    assert_untouched,
    everything_in,
    mlp_with,
    one_step,
    train_a_little,
    worst,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from kaleido_fast import InputError, KaleidoMLP, fast_sample
from kaleido_fast.checkpoint import ModelCard, load_checkpoint, save_checkpoint
from kaleido_fast.model import model_hash, plain_mlp
from kaleido_fast.modules.exactness import UnknownModuleError


class Random(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


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
