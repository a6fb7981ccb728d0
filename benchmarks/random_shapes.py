"""Where the CPU engine is slower than plain torch: a seeded search over shapes of networks and numbers of chains.

\b
    python benchmarks/random_shapes.py --shapes 200 --json shapes.json
    python benchmarks/random_shapes.py --precision bf16 --budget 300
    python benchmarks/random_shapes.py --first 17 --shapes 1 --rounds 9

Each shape depends on the seed and its number alone: ``--first`` goes on where a run ended, or repeats one. Timed are
whole calls of `fast_sample` on a network that it has sampled before, against ``x = model(x)`` in inference mode (in
bfloat16 for bf16; in chunks of chains where their states would not fit), in turns, from the same start states. Both
must agree after one step. A timing has 300 steps, or as many as take 0.3 s: a call's own cost, 1 ms, is as much as 20
steps of the smallest networks. Chains are cut so that one step of all takes at most --step-gflop (a tenth of a second
on two cores): wide networks come with few chains. The exit status is 1 if any states were wrong.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from kaleido_fast import fast_sample
from kaleido_fast.benchmarking.acceptance import WrongStatesError, measure_deviation, refuse_wrong
from kaleido_fast.benchmarking.cases import randomise
from kaleido_fast.benchmarking.contest import start_states
from kaleido_fast.benchmarking.machine import describe_run
from kaleido_fast.benchmarking.program import run_program
from kaleido_fast.benchmarking.timing import quantile, time_alternating
from kaleido_fast.cli.parameters import overwrite_option
from kaleido_fast.errors import InputError
from kaleido_fast.model import KaleidoMLP, ModelSpec
from kaleido_fast.system.files import atomic_path
from kaleido_fast.system.memory import available_memory
from kaleido_fast.system.outputs import check_outputs

WIDEST, FEWEST_LAYERS, MOST_LAYERS, MOST_CHAINS = 2048, 2, 16, 100_000
ACTIVATIONS = {"relu": 10, "gelu": 2, "silu": 2, "tanh": 2, "leaky_relu": 2}  # with these weights
BOUNDS = ("tanh", "tanh", "sigmoid")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SECONDS, STEPS = 0.3, 300  # of one timing: whichever is reached first
CLOSE, MORE = 1.1, 3  # below this ratio a shape is timed this many times as often
LOST = 0.9
SHOWN = 10
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    """What is timed.

    Args:
        number: of the shape; with the seed it says everything.
        spec: of the network.
        chains: how many.
    """

    number: int
    spec: ModelSpec
    chains: int

    def __str__(self) -> str:
        spec = self.spec
        widths = "-".join(map(str, spec.widths))
        return f"{self.number:4} {self.chains:>7,} chains  {widths} {spec.activation} {spec.bound}"


@dataclass(frozen=True)
class Timing:
    """How fast both were.

    Args:
        shape: what was timed.
        steps: of each call.
        ours, eager: seconds of each call.
        load: the machine's load when it began.
    """

    shape: Shape
    steps: int
    ours: list[float]
    eager: list[float]
    load: float

    @property
    def ratio(self) -> float:
        """How many times as fast the engine is, by the medians."""
        return quantile(self.eager, 0.5) / quantile(self.ours, 0.5)

    def __str__(self) -> str:
        flops = self.shape.spec.flops_per_step * self.shape.chains * self.steps / 1e9
        times = [quantile(seconds, 0.5) for seconds in (self.ours, self.eager)]
        ours, eager = (f"{1e3 * seconds:9.2f} ms {flops / seconds:6.1f} GFLOP/s" for seconds in times)
        return f"{self.ratio:6.2f}x  ours {ours}  eager {eager}  {self.steps:3} steps  {self.shape}"

    def record(self) -> dict[str, Any]:
        """Plain values."""
        shape = {"number": self.shape.number, "chains": self.shape.chains, "spec": asdict(self.shape.spec)}
        times = {"ours": self.ours, "eager": self.eager}
        return {**shape, "steps": self.steps, "seconds": times, "ratio": self.ratio, "load": self.load}


def draw_shape(seed: int, number: int, step_flops: float) -> Shape:
    """A shape by chance: widths and chains uniform in their logarithms; D is none of the hidden widths."""
    choice = random.Random(f"{seed} {number}")

    def log_uniform(most: int) -> int:
        return min(most, int(math.exp(choice.uniform(0, math.log(most + 1)))))

    n_layers = choice.randint(FEWEST_LAYERS, MOST_LAYERS)
    hidden = [log_uniform(WIDEST) for _ in range(n_layers - 1)]
    dim = log_uniform(WIDEST)
    while dim in hidden:
        dim = dim % WIDEST + 1
    activation = choice.choices(list(ACTIVATIONS), list(ACTIVATIONS.values()))[0]
    spec = ModelSpec((dim, *hidden, dim), activation=activation, bound=choice.choice(BOUNDS))
    chains = min(log_uniform(MOST_CHAINS), int(step_flops / spec.flops_per_step))
    return Shape(number, spec, max(1, chains))


class Pair:
    """The engine and plain torch on one shape.

    Args:
        shape: what is run.
        precision: of both.
    """

    def __init__(self, shape: Shape, precision: str) -> None:
        self.model = randomise(KaleidoMLP(shape.spec), shape.number)
        self.precision, dtype = precision, DTYPES[precision]
        self.peer = self.model if dtype == torch.float32 else copy.deepcopy(self.model).to(dtype)
        self.z0 = start_states(self.model, shape.chains, CPU)
        self.start = self.z0.to(dtype)
        bytes_a_chain = 3 * max(shape.spec.widths) * self.start.element_size()
        self.rows = max(1, available_memory() // 2 // bytes_a_chain)  # chains of a chunk: mostly all

    def ours(self, steps: int) -> Tensor:
        """End states of the engine."""
        options = {"tol": None, "jitter": 0.0, "device": "cpu", "engine": "cpu", "precision": self.precision}
        return fast_sample(self.model, n_chains=len(self.z0), burn_in=steps - 1, z0=self.z0, **options).final  # type: ignore[arg-type]

    @torch.inference_mode()
    def eager(self, steps: int) -> Tensor:
        """End states of plain torch."""
        ends = []
        for x in self.start.split(self.rows):
            for _ in range(steps):
                x = self.peer(x)
            ends.append(x)
        return ends[0] if len(ends) == 1 else torch.cat(ends)

    def check(self) -> None:
        """Compare both after one step: `WrongStatesError`."""
        deviation = measure_deviation(self.ours(1), self.eager(1).float(), 1)
        refuse_wrong(deviation, self.precision, self.model.spec.n_layers)


def time_shape(shape: Shape, precision: str, rounds: int, seconds: float) -> Timing:
    """Time both in turns; more often where they are close, or the engine is slower.

    Raises:
        WrongStatesError: they differ after one step.
    """
    load = os.getloadavg()[0]
    pair = Pair(shape, precision)
    pair.check()
    steps = max(1, min(STEPS, math.ceil(seconds / min(_seconds_of(lambda: pair.eager(1)) for _ in range(2)))))

    def run(name: str) -> float:
        getattr(pair, name)(steps)
        return 0.0

    runs = {"ours": lambda: run("ours"), "eager": lambda: run("eager")}
    found = time_alternating(runs, rounds)
    timing = Timing(shape, steps, found["ours"], found["eager"], load)
    if timing.ratio < CLOSE:
        again = time_alternating(runs, (MORE - 1) * rounds)
        timing = Timing(shape, steps, [*timing.ours, *again["ours"]], [*timing.eager, *again["eager"]], load)
    return timing


def _seconds_of(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def summary(timings: list[Timing]) -> str:
    """The worst shapes, and how many are lost."""
    if not timings:
        return "no shape was timed"
    worst = sorted(timings, key=lambda timing: timing.ratio)
    lost = sum(timing.ratio < LOST for timing in timings) / len(timings)
    behind = sum(timing.ratio < 1 for timing in timings) / len(timings)
    middle = quantile([timing.ratio for timing in timings], 0.5)
    return "\n".join(
        [
            f"the worst {min(SHOWN, len(worst))} of {len(worst)}:",
            *map(str, worst[:SHOWN]),
            f"{lost:.1%} below {LOST}x, {behind:.1%} below 1x; median {middle:.2f}x; "
            f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}",
        ]
    )


@click.command(help=__doc__)
@click.option("--shapes", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--first", type=click.IntRange(min=0), default=0, show_default=True, help="Number of the first shape.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--precision", type=click.Choice(list(DTYPES)), default="fp32", show_default=True)
@click.option("--rounds", type=click.IntRange(min=3), default=3, show_default=True, help="Timings of each, at least.")
@click.option(
    "--seconds", type=click.FloatRange(min=0), default=SECONDS, show_default=True, help="Of a timing under 300 steps."
)
@click.option("--step-gflop", type=click.FloatRange(min=1e-6), default=30.0, show_default=True, help="Of all chains.")
@click.option("--budget", type=click.FloatRange(min=0), help="Seconds after which no further shape is begun.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Also write every timing here.")
@overwrite_option
def command(
    shapes: int,
    first: int,
    seed: int,
    precision: str,
    rounds: int,
    seconds: float,
    step_gflop: float,
    budget: float | None,
    out: Path | None,
    overwrite: bool,
) -> int:
    check_outputs({"list of timings": out}, overwrite=overwrite, remedy="give another name")
    began, timings, wrong = time.monotonic(), [], []
    try:
        for number in range(first, first + shapes):
            if budget is not None and time.monotonic() - began > budget:
                click.echo(f"the budget of {budget:g} s is spent: go on with --first {number}")
                break
            shape = draw_shape(seed, number, 1e9 * step_gflop)
            try:
                timings.append(time_shape(shape, precision, rounds, seconds))
                click.echo(str(timings[-1]))
            except WrongStatesError as problem:
                wrong.append({"number": number, "problem": str(problem)})
                click.echo(f" WRONG  {shape}: {problem}")
            except InputError as problem:
                raise InputError(f"shape {shape}: {problem}") from problem
    finally:  # also at Ctrl-C
        click.echo(summary(timings))
        if out is not None:
            found = {"run": describe_run(CPU), "timings": [timing.record() for timing in timings], "wrong": wrong}
            with atomic_path(out) as temporary:
                temporary.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    run_program(command, "random_shapes.py", "what was timed is printed, and written where --json asked for it")
