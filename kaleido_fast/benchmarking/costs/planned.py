"""What the plan and the kernels' model say of a run: the store it writes, its speed on a GPU that is not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from kaleido_fast.benchmarking.cases import network_spec
from kaleido_fast.errors import InputError
from kaleido_fast.planning.facts import H200, DeviceFacts
from kaleido_fast.planning.plan import make_plan
from kaleido_fast.planning.request import SampleRequest
from kaleido_fast.storing.encoding import Encoding
from kaleido_fast.storing.layout import Layout

MODELLED_CHAIN_STEPS = 100_000 * 300  # that the roofline of a kernel is for
DEVICE_PRECISIONS = {"fp32": "fp16x3", "fp16": "fp16", "bf16": "bf16"}  # as kernels name them


def modelled_rate(network: str, precision: str) -> float:
    """Chain-steps a second of an H200-class GPU by the roofline of the compiled kernels: a model, not a measurement.

    Raises:
        InputError: the kernels cannot be compiled here.
    """
    command = [sys.executable, "-m", "kaleido_kernels.inspect", "--json", "--variant", "none", "--net", network]
    command += ["--precision", DEVICE_PRECISIONS[precision]]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    try:
        report = json.loads(done.stdout)[0]
    except (ValueError, LookupError):
        text = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(f"the kernels cannot be compiled here ({text}): pass a measured --rate") from None
    return MODELLED_CHAIN_STEPS / (report["estimate"]["milliseconds"] / 1e3)


def make_layout(network: str, n_chains: int, n_draws: int, dtype: str, chunk_chains: int | None, device: str) -> Layout:
    """The store that a run would write; ``chunk_chains`` None takes what the plan would."""
    spec = network_spec(network)
    request = SampleRequest(n_chains=n_chains, n_draws=n_draws, tol=None)
    facts = H200 if device == "gpu" else DeviceFacts("cpu", has_numba=True)
    plan = make_plan(request, spec, facts, spec.dim, stored=True)
    chunk = plan.block_chains if chunk_chains is None else -(-chunk_chains // plan.tile_rows) * plan.tile_rows
    encoding = Encoding.choose(dtype, (spec.low, spec.high), "fp32")
    return Layout(n_chains, n_draws, spec.dim, min(chunk, n_chains), encoding)
