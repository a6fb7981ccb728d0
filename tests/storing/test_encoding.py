"""How draws are stored: values come back as near as their type allows; types and chunks that do not fit are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaleido_fast import InputError
from kaleido_fast.storing.encoding import Encoding
from kaleido_fast.storing.layout import Layout


@given(st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=20))
def test_bytes_are_within_half_a_step_of_the_value(values):
    encoding = Encoding.choose("uint8", (-1.0, 1.0), "fp32")
    array = np.array(values, np.float32)
    back = encoding.decode(encoding.encode(array))
    want = np.nan_to_num(array, nan=-1.0).clip(-1, 1)
    assert np.all(np.abs(back - want) <= encoding.scale / 2 + 1e-6)


def test_bad_types_and_chunks_are_refused():
    with pytest.raises(InputError, match="did you mean 'float16'"):
        Encoding.choose("floot16", (-1, 1), "fp32")
    with pytest.raises(InputError, match=r"536,870 chains fit"):
        Layout(2**40, 1, 1000, 10**6, Encoding())
