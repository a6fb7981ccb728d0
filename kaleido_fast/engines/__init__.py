"""Engines: each advances chains by the same step, in its own way."""
