"""Phases: a run in a low precision whose last steps are in fp32."""

from __future__ import annotations

import pytest
import torch
from all_engines import few_on_triton
from conftest import assert_states_close, needs
from known_maps import contracting

from kaleido_fast import Outcome, fast_sample


@pytest.mark.parametrize(
    ("engine", "precision"),
    [
        *(("reference", precision) for precision in ("fp16", "bf16", "tf32")),
        *(("triton", precision) for precision in ("fp16", "bf16")),  # the interpreter does not round to tf32
        ("cpu", "bf16"),
    ],
)
def test_polished_fixed_points_are_fp32_fixed_points(engine, precision):
    needs(engine)
    model = contracting((16, 48, 16), scale=0.6)
    options = {"n_chains": few_on_triton(engine, 64), "burn_in": 119, "engine": engine}
    exact = fast_sample(model, **options)
    raw = fast_sample(model, precision=precision, **options)
    polished = fast_sample(model, precision=precision, polish=60, **options)
    assert (raw.final - exact.final).abs().max() > 1e-4, "the precision makes no difference here"
    assert_states_close(polished.final, exact.final, atol=2e-4, what=precision)
    assert set(polished.outcome.tolist()) == {Outcome.FIXED_POINT}
    assert int(polished.steps.min()) > 60, "frozen in the low precision"


def test_polish_over_all_steps_is_fp32():
    options = {"n_chains": 30, "burn_in": 9, "engine": "reference"}
    assert torch.equal(
        fast_sample(contracting(), precision="fp16", polish=10, **options).draws,
        fast_sample(contracting(), **options).draws,
    )
