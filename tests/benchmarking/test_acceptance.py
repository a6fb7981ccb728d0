"""Rounding is accepted, a wrong state is not: whatever of the work it is in."""

from __future__ import annotations

import re

import pytest
import torch
from small_bench import CPU

from kaleido_fast.benchmarking import cases, contest
from kaleido_fast.benchmarking.acceptance import WrongStatesError, measure_deviation, refuse_wrong
from kaleido_fast.model import BOUNDS


def rounded(x: torch.Tensor, precision: str) -> torch.Tensor:
    return x.to({"fp16": torch.float16, "bf16": torch.bfloat16}[precision]).to(torch.float32)


def same(x: torch.Tensor, precision: str) -> torch.Tensor:
    return x


def modelled(model, precision: str, *, parts: int, rounding=rounded, operands=rounded) -> contest.Procedure:
    """The network in 16 bits as a GPU may do it: each product in ``parts`` sums, ``rounding`` after each addition."""
    spec = model.spec
    weights = [operands(layer.weight.detach(), precision).t().contiguous() for layer in model.linears]

    def layer(x: torch.Tensor, i: int) -> torch.Tensor:
        total, length = torch.zeros(()), -(-x.shape[1] // parts)
        for columns in torch.arange(x.shape[1]).split(length):
            part = rounding(x[:, columns] @ weights[i][columns], precision)
            total = rounding(total + part, precision)
        total = rounding(total + model.linears[i].bias, precision)
        return BOUNDS[spec.bound](total) if i == spec.n_layers - 1 else model.activate(total)

    @torch.inference_mode()
    def run(z0: torch.Tensor, n_steps: int) -> torch.Tensor:
        x = z0
        for i in range(n_steps * spec.n_layers):
            x = layer(operands(x, precision), i % spec.n_layers)
        return x

    return run


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("network", ["mnist", "deep128"])
def test_rounding_alone_is_accepted_in_16_bits(network, precision):
    """mnist on its own: partial sums that a library rounds make errors up to 1.4e-2 in fp16, 1.1e-1 in bf16."""
    model = cases.random_network(network).requires_grad_(False)
    z0 = contest.start_states(model, 600, CPU)
    expected = contest.reference_states(model, z0, precision)
    largest = 0.0
    for parts, rounding in ((8, same), (1, rounded), (4, rounded)):
        run = modelled(model, precision, parts=parts, rounding=rounding)
        entry = contest.Contestant(run, precision=precision)
        found = contest.check_contestant(entry, z0, expected, model.spec.n_layers)
        assert 0 < found.relative < 0.05, str(found)
        largest = max(largest, found.error)
    assert network != "mnist" or largest > {"fp16": 1e-2, "bf16": 8e-2}[precision], "the model of rounding is too kind"


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("fp16", {"parts": 8, "operands": lambda x, _: rounded(x, "bf16"), "rounding": same}),  # too few bits
        ("fp16", {"parts": 8, "rounding": lambda x, _: rounded(x, "bf16")}),  # sums kept in too few bits
        ("fp16", {"parts": 500}),  # sums in fp16, one product at a time
    ],
)
def test_arithmetic_of_too_few_bits_is_refused_though_no_value_stands_out(precision, options):
    model = cases.random_network("deep128").requires_grad_(False)
    z0 = contest.start_states(model, 300, CPU)
    expected = contest.reference_states(model, z0, precision)
    entry = contest.Contestant(modelled(model, precision, **options), precision=precision)
    with pytest.raises(WrongStatesError, match="differs from the reference by"):
        contest.check_contestant(entry, z0, expected, model.spec.n_layers)


CHAINS, DIM, LAYERS, STEP = 100_000, 64, 6, 3


def states_with_rounding(precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(reference, states that are off by as much as rounding is, heavy tails included)."""
    generator = torch.Generator().manual_seed(0)
    want = torch.rand(CHAINS, DIM, generator=generator) * 2 - 1
    unit = {"fp16": 2**-11, "bf16": 2**-8}[precision] * (LAYERS * STEP) ** 0.5 * float(want.square().mean().sqrt())
    noise = torch.randn(CHAINS, DIM, generator=generator) * (0.7 + 0.3 * torch.rand(CHAINS, 1, generator=generator))
    return want, want + unit * noise


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_one_wrong_chain_tile_dim_or_value_of_100_000_chains_is_refused_and_named(precision):
    want, good = states_with_rounding(precision)
    found = measure_deviation(good, want, STEP)
    refuse_wrong(found, precision, LAYERS)
    error = (good - want).abs()
    assert found.error == float(error.max()) == float(error[found.chain, found.dim])
    assert found.relative == pytest.approx(float((good - want).double().norm() / want.double().norm()), rel=1e-3)

    def refused(rows, columns, values) -> str:
        wrong = good.clone()
        wrong[rows, columns] = values
        with pytest.raises(WrongStatesError, match=f"after step {STEP} ") as caught:
            refuse_wrong(measure_deviation(wrong, want, STEP), precision, LAYERS)
        place = caught.value.deviation
        assert float((wrong - want)[place.chain, place.dim].abs()) == pytest.approx(place.error, nan_ok=True)
        return str(caught.value)

    everything = slice(None)
    assert "chain 70123" in refused(70_123, everything, want[70_124])
    tile = slice(51_200, 51_328)
    assert re.search(r"chain 51[23]\d\d", refused(tile, everything, want[:128]))
    assert "after step" in refused(tile, slice(32, 48), want[tile, 16:32])
    small = {"fp16": 0.01, "bf16": 0.08}[precision]  # a little more than rounding, in every chain or every dim
    assert "dim 7 by" in refused(everything, 7, good[:, 7] + small)
    assert "chain 99999 by" in refused(99_999, everything, good[99_999] + small)
    assert "chain 5, dim 3" in refused(5, 3, want[5, 3] + {"fp16": 0.05, "bf16": 0.3}[precision])
    assert "all states by" in refused(everything, everything, want + 2.3 * (good - want))
    assert "nan" in refused(8, 9, torch.nan)


def test_errors_may_grow_with_the_root_of_the_depth_in_16_bits_and_not_at_all_in_fp32():
    want = torch.rand(200, 30) * 2 - 1
    for precision, factor in (("fp16", 10.0), ("bf16", 10.0), ("fp32", 1.0)):
        largest = []
        for n_layers in (1, 100):
            low, high = 0.0, 10.0
            for _ in range(60):
                error = (low + high) / 2
                got = want.double()
                got[3, 4] += error
                try:
                    refuse_wrong(measure_deviation(got, want.double(), 1), precision, n_layers)
                    low = error
                except WrongStatesError:
                    high = error
            largest.append(low)
        assert largest[1] / largest[0] == pytest.approx(factor)
    assert largest[0] == pytest.approx(2e-4)
