"""Fused Triton kernels that iterate a bounded MLP over many chains in one launch.

Read in this order: ``shapes`` (what a network is), ``launch`` (what a launch computes), ``steps`` and ``philox`` (the
device steps that all kernels share), then one kernel: ``narrow``, ``onchip``, ``stream`` or ``wide``. ``choice``
chooses among them without Triton; ``proving`` judges them without a GPU. The package loads neither torch nor Triton.
"""
