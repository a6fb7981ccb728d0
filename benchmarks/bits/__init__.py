"""The configurations of ``benchmarks/same_bits.py``."""
