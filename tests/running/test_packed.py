"""Packed weights are kept, and noticed when they change."""

from __future__ import annotations

import pytest
import torch
from conftest import random_mlp
from test_op_on_gpu import Recorded
from torch import nn

from kaleido_fast import KaleidoMLP, fast_sample, sample_op
from kaleido_fast.running.packed import PACKED, Mark, PackedModels, equal_at_once, layers_of


def packed(model: KaleidoMLP):
    return PACKED.take(model.spec, *layers_of(model), may_wait=False)


def test_weights_are_packed_once_and_again_when_they_change():
    model = random_mlp(4, 9, 4)
    first = packed(model)
    engine = first.engine("key", lambda weights: object())
    assert packed(model) is first
    assert first.engine("key", lambda weights: pytest.fail("packed twice")) is engine
    assert packed(KaleidoMLP(model.spec, model.linears)) is first, "the weights count, not the module"

    def step() -> None:
        with torch.no_grad():
            model.linears[0].weight.add_(0.25)

    def gradients() -> bool:
        model(torch.rand(2, 4)).sum().backward()
        return True

    changes = [
        step,
        lambda: model.linears[0].bias.data.add_(0.25),
        lambda: model.load_state_dict({k: v / 2 for k, v in model.state_dict().items()}),
        lambda: setattr(model.linears[1], "weight", nn.Parameter(torch.ones(4, 9))),
        lambda: setattr(model.linears[1].weight, "data", torch.full((4, 9), 2.0)),
        lambda: model.linears[1].weight.detach().numpy().fill(0.5),
        lambda: model.linears[1].weight.data.mul_(-1),
        lambda: model.linears[0].bias.data.zero_(),
        lambda: model.linears[0].bias.data.neg_(),  # -0.0
        lambda: model.linears[0].weight.detach().numpy().view("uint32").__setitem__((8, 3), 7),
        lambda: torch.optim.SGD(model.parameters(), lr=0.1).step() if gradients() else None,
    ]
    for change in changes:
        before = packed(model)
        change()
        now = packed(model)
        assert now is not before
        assert torch.equal(now.module.linears[0].weight, model.linears[0].weight)
        assert torch.equal(
            sample_op(model, n_chains=4, burn_in=2, engine="reference").draws,
            fast_sample(
                KaleidoMLP(model.spec, model.linears), n_chains=4, burn_in=2, tol=None, engine="reference"
            ).draws,
        )


def test_weights_on_a_gpu_are_compared_with_one_wait_for_it():
    """The same verdict as tensor by tensor, wherever the difference is."""
    kept = [torch.randint(0, 9, shape, dtype=torch.int32) for shape in ((7, 5), (7,), (3, 7), (3,))]
    for changed in (None, *range(len(kept))):
        given = [tensor.clone() for tensor in kept]
        if changed is not None:
            given[changed].view(-1)[-1] += 1
        with Recorded() as recorded:
            verdict = equal_at_once(list(zip(kept, given, strict=True)))
        assert verdict == all(map(torch.equal, kept, given)) == (changed is None)
        waits = {"_local_scalar_dense", "item", "is_nonzero", "equal"}
        assert sum(recorded.calls[name] for name in waits) == 1, recorded.calls


def test_what_cannot_be_proved_the_same_without_reading_is_not_taken_for_it():
    """On a GPU weights are not read: torch's count of writes must speak for them."""
    weight = nn.Parameter(torch.rand(3, 4))
    mark = Mark.of(weight)
    assert Mark.of(weight).proves_same(mark)
    with torch.no_grad():
        weight.mul_(2)
    assert not Mark.of(weight).proves_same(mark)
    for view in (weight.data, weight.detach(), weight[:2], torch.rand(3, 4)):
        assert not Mark.of(view).proves_same(Mark.of(view)), "views have counts of their own"
    with torch.inference_mode():
        uncounted = torch.rand(3, 4)
    assert Mark.of(uncounted).writes is None
    mark = Mark.of(weight)
    weight.data = torch.rand(3, 4)
    assert not Mark.of(weight).proves_same(mark)


def test_weights_in_new_memory_are_never_taken_for_gone_ones():
    models = PackedModels()
    for value in range(20):  # the allocator gives the same memory again and again
        model = random_mlp(3, 5, 3)
        with torch.no_grad():
            model.linears[0].weight.fill_(float(value))
        weights, biases = layers_of(model)
        marks = tuple(Mark.of(t) for t in [*weights, *biases])
        assert models._find(model.spec, [*weights, *biases], marks, by_value=False) is None
        models.take(model.spec, weights, biases, may_wait=False)
        assert models._find(model.spec, [*weights, *biases], marks, by_value=False) is not None
        del model, weights, biases
    assert len(models) == 1, "packed weights go with the model they were made of"


def test_few_models_are_kept():
    models = PackedModels()
    alive = [random_mlp(3, 5, 3, seed=k) for k in range(12)]
    for model in alive:
        models.take(model.spec, *layers_of(model), may_wait=False)
    assert len(models) == 8
    for _ in range(5):  # training leaves no trail
        with torch.no_grad():
            alive[0].linears[0].weight.add_(1)
        models.take(alive[0].spec, *layers_of(alive[0]), may_wait=False)
    assert len(models) == 8
    models.forget()
    assert len(models) == 0
