"""Python's time for a launch on a warm model, in microseconds: no GPU is needed, and none is used.

\b
    python benchmarks/launch_overhead.py
    python benchmarks/launch_overhead.py --network points1d --network mnist --precision fp32

Launches go to a device that is not there, so everything counts but the driver: Triton's launcher in C reads the
arguments and queues the kernel, which takes some microseconds more. Columns: a call of the engine, as a run makes it;
of it the kernel's launch function; of that the compiled kernel's own launch, which is Triton's code. The last column is
what Triton's usual path takes for the same launch, which looks the kernel up by all its arguments.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace

import click
import torch

from kaleido_fast.benchmarking.cases import SIZES, random_network
from kaleido_fast.engines.triton import TritonEngine
from kaleido_fast.planning.facts import H200
from kaleido_fast.planning.plan import plan_kernel
from kaleido_fast.planning.request import SampleRequest
from kaleido_kernels.proving.fake_driver import fake_device
from kaleido_kernels.tile import GpuFacts
from kaleido_kernels.variant import Variant

N_CHAINS, N_STEPS = 256, 300


def microseconds(call: Callable[[], object], repeats: int) -> float:
    """Of one call, at best: whatever else runs on the machine only adds to it."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1e6 * min(times)


def launched(call: Callable[[], object]) -> tuple[Variant, int, list[object]]:
    """What ``call`` launches: variant, grid and arguments."""
    found = []
    launch = Variant.launch

    def keep(self: Variant, n_programs: int, arguments: list[object]) -> None:
        found.append((self, n_programs, arguments))

    Variant.launch = keep  # type: ignore[method-assign, assignment]
    try:
        call()
    finally:
        Variant.launch = launch  # type: ignore[method-assign]
    return found[0]


def measure(network: str, precision: str, repeats: int) -> str:
    """One line of the table."""
    model = random_network(network)
    options = {"tol": None, "engine": "triton", "precision": precision, "jitter": 0.0}
    request = SampleRequest(n_chains=N_CHAINS, burn_in=N_STEPS - 1, **options)  # type: ignore[arg-type]
    plan = plan_kernel(model.spec, precision, replace(H200, gpu=GpuFacts(n_sm=2)))
    engine = TritonEngine(model, request, plan, torch.device("cpu"))
    chains, draws = torch.arange(N_CHAINS), torch.empty(N_CHAINS, 1, model.spec.dim)

    def advance() -> object:
        return engine.advance(chains, None, 0, N_STEPS, draws, lambda done: None)

    with fake_device(), torch.inference_mode():
        variant, n_programs, arguments = launched(advance)
        advance()  # compiles
        compiled = variant.kernel[(n_programs,)](*arguments, **variant.constants, **variant.options)
        values = [*arguments, *variant.constants.values()]
        calls: list[Callable[[], object]] = [
            advance,
            lambda: variant.launch(n_programs, arguments),
            lambda: compiled[n_programs, 1, 1](*values),
            lambda: variant.kernel[(n_programs,)](*arguments, **variant.constants, **variant.options),
        ]
        times = [microseconds(call, repeats) for call in calls]
    return f"{network:10}{plan.choice.kernel:8}{precision:6}" + "".join(f"{each:14.1f}" for each in times)


@click.command(help=__doc__)
@click.option("--network", multiple=True, type=click.Choice(list(SIZES)), help="Repeat for several; default: four.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp16", show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=5000, show_default=True, help="The best of them counts.")
def main(network: tuple[str, ...], precision: str, repeats: int) -> None:
    torch.set_num_threads(1)
    print(f"{'network':10}{'kernel':8}{'':6}{'engine call':>14}{'launch':>14}{'in Triton':>14}{'usual path':>14}")
    try:
        for name in network or ("points1d", "points2d", "digits", "mnist"):
            print(measure(name, precision, repeats), flush=True)
    except RuntimeError as problem:  # the interpreter is switched on
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
