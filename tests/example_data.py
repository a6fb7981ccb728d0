"""Pictures and readings that tests of data share."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from kaleido_fast import Dataset, InputError, load_dataset
from kaleido_fast.reading.datasets import DataWarning

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def grey(height: int = 9, width: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


def colour(height: int = 9, width: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def read(source: Any, **options: Any) -> tuple[Dataset, str]:
    """The data, and what was said about them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_dataset(source, **options)
    assert all(issubclass(w.category, DataWarning) and "\n" not in str(w.message) for w in caught)
    return data, "; ".join(str(w.message) for w in caught)


def raw_of(data: Dataset) -> np.ndarray:
    """The raw values again, in their own shape."""
    return data.scaling.undo(data.data.double()).round().numpy().reshape(len(data), *data.sample_shape)


def refused(source: Any, *parts: str, **options: Any) -> str:
    """The data is refused by one line that holds all parts."""
    with pytest.raises(InputError) as caught:
        load_dataset(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text
    return text


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    worst = np.unravel_index(np.abs(found - expected.astype(float)).argmax(), found.shape)
    assert found[worst] == expected[worst], f"worst at {worst}: {found[worst]} instead of {expected[worst]}"
