"""Fixtures of the tests of benchmarks."""

from __future__ import annotations

import pytest
from small_bench import small_request

from kaleido_fast.benchmarking import runner
from kaleido_fast.benchmarking.cases import BenchNetwork


@pytest.fixture(scope="module")
def small_report() -> runner.BenchReport:
    networks = [BenchNetwork(name, network=name) for name in ("points1d", "points2d")]
    return runner.run_bench(small_request(networks=networks))
