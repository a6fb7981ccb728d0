"""Kernels with and without the types of their numbers, as Triton reads them."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@triton.jit
def typed(out_ptr, n: tl.int64):
    tl.store(out_ptr, n)


@triton.jit
def untyped(out_ptr, n):
    tl.store(out_ptr, n)


@gluon.jit
def unheard(out_ptr, n: gl.int64):
    gl.store(out_ptr, n)
