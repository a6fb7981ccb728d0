"""Fixtures of the tests of benchmarks."""

from __future__ import annotations

import pytest
from small_bench import small_request

from kaleido_fast.benchmarking import runner
from kaleido_fast.benchmarking.cases import Subject


@pytest.fixture(scope="module")
def small_report() -> runner.BenchReport:
    subjects = [Subject(name, network=name) for name in ("points1d", "points2d")]
    return runner.run_bench(small_request(subjects=subjects))
