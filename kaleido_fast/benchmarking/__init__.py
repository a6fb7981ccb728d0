"""Benchmarks: what ``kaleido-fast bench`` and the suites in ``benchmarks/`` both run."""
