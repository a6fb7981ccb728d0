"""Prints the precision table of docs/kernels.md: ``python benchmarks/precision_table.py``.

Errors are of one step of the bundled digits model from 4096 random starts against fp64: fp32 by products of split
operands, as the kernels compute it; the others on the reference engine, which rounds operands as the kernels do; and
those of engine cpu by the instructions of this processor. Relative costs come from the cost model of
``kaleido_kernels.inspect``, not a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor

from kaleido_fast import fast_sample, load_checkpoint
from kaleido_fast.benchmarking.costs.planned import DEVICE_PRECISIONS
from kaleido_fast.engines.available import instruction_set
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.noise import start_noise
from kaleido_kernels.packing import split_operand

NETS = ("points2d", "digits", "mnist")
CHAINS = 4096


def one_step_error(precision: str) -> float:
    """Largest absolute error of a state after one step."""
    options: dict[str, Any] = {"n_chains": CHAINS, "burn_in": 0, "jitter": 0.0, "engine": "reference", "device": "cpu"}
    exact = fast_sample("attractors", precision="fp64", **options).final
    if precision == "fp32":
        model = load_checkpoint("attractors").model
        rounded = split_step(model, start_noise(0, torch.arange(CHAINS), model.spec.dim, "uniform", -1.0, 1.0))
    else:
        rounded = fast_sample("attractors", precision=precision, **options).final
    return float((rounded.double() - exact).abs().max())


def loops_error(precision: str) -> float:
    """`one_step_error` of engine cpu."""
    options: dict[str, Any] = {"n_chains": CHAINS, "burn_in": 0, "jitter": 0.0, "device": "cpu"}
    exact = fast_sample("attractors", precision="fp64", engine="reference", **options).final
    return float((fast_sample("attractors", precision=precision, engine="cpu", **options).final - exact).abs().max())


@torch.no_grad()
def split_step(model: KaleidoMLP, h: Tensor) -> Tensor:
    """One step of a network of ReLU and tanh by three products of fp16 halves with fp32 sums, small terms first."""
    for index, layer in enumerate(model.linears):
        high, low = (half.float() for half in split_operand(h, "fp16x3"))
        w_high, w_low = (half.float() for half in split_operand(layer.weight.t(), "fp16x3"))
        h = layer.bias + low @ w_high + high @ w_low + high @ w_high
        h = torch.relu(h) if index < model.spec.n_layers - 1 else torch.tanh(h)
    return h


def predicted_ms() -> dict[tuple[str, str], float]:
    """(network, device precision) -> milliseconds for 100,000 chains x 300 steps, by the cost model."""
    command = [sys.executable, "-m", "kaleido_kernels.inspect", "--arch", "sm_90", "--json"]
    command += [word for net in NETS for word in ("--net", net)]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    reports = json.loads(subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout)
    quiet = [report for report in reports if report["variant"] == "none"]
    return {(report["net"], report["precision"]): report["estimate"]["milliseconds"] for report in quiet}


def main() -> None:
    """Print the table as Markdown."""
    ms = predicted_ms()
    print(f"| precision | one-step maximum error | {' | '.join(f'{net}, cost' for net in NETS)} |")
    print(f"|---|---|{'---|' * len(NETS)}")
    for precision in ("fp32", "tf32", "fp16", "bf16"):
        on_gpu = DEVICE_PRECISIONS.get(precision)
        costs = [f"{ms[net, on_gpu] / ms[net, 'fp16']:.1f}" if on_gpu else "-" for net in NETS]
        print(f"| {precision} | {one_step_error(precision):.1e} | {' | '.join(costs)} |")
    for precision in ("fp32", "bf16"):
        name = f"{precision}, engine `cpu`" + (f" by {instruction_set()}" if precision == "bf16" else "")
        print(f"| {name} | {loops_error(precision):.1e} | {' | '.join('-' for _ in NETS)} |")


if __name__ == "__main__":
    main()
