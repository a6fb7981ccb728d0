"""What tests that run on every engine share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kaleido_fast import SampleResult

ENGINES = ["reference", "cpu", "triton"]
FIELDS = ("draws", "steps", "residual", "outcome", "period")


def order_products(engine: str, request: pytest.FixtureRequest) -> None:
    """Tests of bits: the interpreter is to sum each row by itself, as kernels do."""
    if engine == "triton":
        request.getfixturevalue("ordered_products")


def few_on_triton(engine: str, n: int, few: int = 24) -> int:
    """Triton's interpreter takes milliseconds for what a kernel does in microseconds."""
    return few if engine == "triton" else n


def assert_same(got: SampleResult, want: SampleResult, rows: Any = slice(None)) -> None:
    """``got`` has the bits of these rows of ``want``."""
    for name in FIELDS:
        assert torch.equal(getattr(got, name), getattr(want, name)[rows]), name
