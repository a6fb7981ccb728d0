"""Compiles kernels ahead of time, without a GPU, and judges the result: ``python -m kaleido_kernels.inspect``.

Read in this order: `jobs` (what is compiled), `compiling` (Triton and NVIDIA's tools), `estimating` (from machine code
to the cost model), `report` (one compiled kernel judged), `table` and `command`.
"""
