"""Runs of the CPU engine beside the reference."""

from __future__ import annotations

import torch
from conftest import assert_states_close, random_mlp

from kaleido_fast.engines.cpu import CpuEngine
from kaleido_fast.engines.reference import ReferenceEngine
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.planning.request import SampleRequest

# (precision, atol, rtol): sums are taken in another order, by one multiply-add each; a step of a random network may
# double a difference.
FP32_STEP = ("fp32", 1e-6, 1e-6)
FP32_RUN = ("fp32", 2e-5, 1e-5)
# Where two fp32 sums straddle a rounding to bf16, an operand differs by its last place, 2^-8 of it.
BF16_STEP = ("bf16", 8e-3, 0.0)
ACTIVATIONS = ["relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "tanh"]
MODEL = random_mlp(5, 11, 13, 5)


def reference(model: KaleidoMLP, request: SampleRequest) -> ReferenceEngine:
    spec = model.spec
    return ReferenceEngine(
        model,
        request,
        dim=spec.dim,
        data_range=(spec.low, spec.high),
        tile_rows=64,
        device=torch.device("cpu"),
    )


def run(engine, chains, state=None, first=0, last=None, *, n_draws=None, report=lambda _: None):
    """(draws, final, residual) of one call; draws that are not reached stay NaN."""
    request = engine.request
    dim = engine.spec.dim if isinstance(engine, CpuEngine) else engine.dim
    draws = torch.full((len(chains), request.n_draws, dim), torch.nan)
    last = request.schedule.n_steps if last is None else last
    end = engine.advance(chains, state, first, last, draws, report)
    return draws, end.state, end.residual


def assert_same_run(model: KaleidoMLP, request: SampleRequest, triple: tuple[str, float, float], state=None) -> None:
    precision, atol, rtol = triple
    assert precision == request.precision
    chains = torch.arange(request.n_chains) + request.first_chain
    got, want = run(CpuEngine(model, request), chains, state), run(reference(model, request), chains, state)
    for name, a, b in zip(("draws", "final", "residual"), got, want, strict=True):
        assert_states_close(a, b, atol=atol, rtol=rtol, what=f"{name} of {model.spec.widths} {model.spec.activation}")


def assert_same_bits(got, want, what: str) -> None:
    for name, a, b in zip(("draws", "final", "residual"), got, want, strict=True):
        same = (a.contiguous().view(torch.int32) == b.contiguous().view(torch.int32)) | (a.isnan() & b.isnan())
        assert same.all(), f"{what}: {name} differ first at {(~same).nonzero()[0].tolist()}"
