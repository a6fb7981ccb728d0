"""What may be asked of a run."""

from __future__ import annotations

import pytest
from known_maps import contracting

from kaleido_fast import InputError, fast_sample


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tol": -1.0}, "tol is -1.0"),
        ({"tol": float("nan")}, "tol is nan"),
        ({"tol": 1e-3, "jitter": 0.1}, "a jittered chain never arrives"),
        ({"patience": 0}, "patience is 0"),
        ({"check_every": 0}, "check_every is 0"),
        ({"max_period": 0}, "max_period is 0"),
        ({"max_period": 10**6}, "max_period is 1000000"),
        ({"retire_cycles": "no"}, "retire_cycles is 'no': it must be True or False"),
        ({"retire_cycles": None}, "retire_cycles is None: it must be True or False"),
        ({"polish": 5}, "polish with precision 'fp32'"),
        ({"polish": 12, "precision": "fp16", "burn_in": 10}, "pass at most that"),
    ],
)
def test_bad_options_are_named(options, text):
    with pytest.raises(InputError, match=text):
        fast_sample(contracting(), n_chains=3, **options)
