"""pytest-benchmark suites over `kaleido_fast.benchmarking`.

    pytest benchmarks/ --quick                 few chains and steps, about a minute on two cores
    pytest benchmarks/                         the sizes of `kaleido-fast bench`, about half an hour on two cores
    pytest benchmarks/ -k "digits and cpu"     one network, one contestant
    pytest benchmarks/ --benchmark-autosave    keep the figures under benchmarks/results/

Every contestant first has to reproduce the reference's states. Suites time one contestant after the other; for ratios
use ``kaleido-fast bench``, which lets them take turns.
"""

from __future__ import annotations

from pathlib import Path

import pytest

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="short timings")
    parser.addoption("--bench-device", default="auto", help="auto, cpu, cuda, ...")


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "benchmark_storage", "").startswith("file://./.benchmarks"):
        config.option.benchmark_storage = f"file://{RESULTS}"
