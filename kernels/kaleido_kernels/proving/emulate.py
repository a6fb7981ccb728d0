"""Compiles a kernel for sm_90, runs the machine program on the CPU and compares its states with what is right.

``python -m kaleido_kernels.emulate --net mnist --precision fp16 [--kernel wide] [--chains 300] [--steps 3]`` prints the
largest error and where it is. Exit status 1 when an error is larger than the precision allows or the program breaks a
rule of the machine, 2 when the command cannot run or meets an instruction that it has no rule for. See
`kaleido_kernels.proving.emulation` for what it cannot see.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from kaleido_kernels.choice import choose
from kaleido_kernels.launch import LaunchRequest, allocate_outputs
from kaleido_kernels.packing import device_precision
from kaleido_kernels.precision import PRECISIONS
from kaleido_kernels.proving.architectures import FACTS
from kaleido_kernels.schedule import Schedule
from kaleido_kernels.shapes import KERNELS, NETWORKS

if TYPE_CHECKING:
    from kaleido_kernels.proving.emulation.driver import Emulator

N_PROGRAMS = 2
"""Programs of onchip and wide: each has several tiles of chains, as on a GPU."""
GRAPH_BLOCK = 512
"""Chains of a block of the graph path: rows beyond the chains are computed too."""
ALLOWED = {"fp32": 1e-6, "tf32": 1.5e-3, "fp16": 6e-4, "bf16": 4e-3}
"""Allowed for each layer and step, in data units: two to three times what rounding makes of the six networks at worst.

The matrix units cut operands to TF32, the reference rounds them. Networks that contract forgive much: the kernels' own
tests hold each of them more tightly.
"""


@dataclass(frozen=True)
class Comparison:
    """What came out: largest error of the states in data units, the chain and dim where it is, and what is allowed."""

    kernel: str
    error: float
    chain: int
    dim: int
    residual_error: float
    allowed: float
    n_launches: int
    n_instructions: int

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed and self.residual_error <= 2 * self.allowed  # false for NaN


def compare(
    net: str, precision: str, kernel: str, n_chains: int, n_steps: int, emulator: Emulator, seed: int = 0
) -> Comparison:
    """Run a reference network with seeded random weights from seeded random states.

    Raises:
        ValueError: no tile of the kernel runs the network.
        EmulatorError: the machine program breaks a rule, or is not understood.
    """
    from kaleido_kernels.kernels import make_launcher
    from kaleido_kernels.proving.emulation.driver import emulated
    from kaleido_kernels.proving.emulation.reference import random_layers, run_reference

    shape = NETWORKS[net]
    layers = random_layers(shape, seed)
    form = device_precision(layers, precision)
    facts = replace(FACTS["sm_90"], graph_block=GRAPH_BLOCK)
    choice = choose(shape, form, facts, kernel=kernel)
    start = _start(n_chains, shape.low, shape.high, shape.dim, seed)
    request = LaunchRequest(n_chains, Schedule(burn_in=n_steps - 1), chain_ids=torch.arange(n_chains), start=start)
    outputs = allocate_outputs(request, shape, torch.device("cpu"))
    for tensor in (outputs.final, outputs.residual, outputs.draws):
        if tensor is not None:
            tensor.fill_(float("nan"))
    with emulated(emulator):
        launch = make_launcher(choice.tile, layers, shape, precision, torch.device("cpu"), n_programs=N_PROGRAMS)
        launch(request, outputs)
    want, residual = run_reference(layers, shape, form, start, n_steps)
    assert outputs.draws is not None
    error, chain, dim = _worst(torch.maximum(_error(outputs.final, want), _error(outputs.draws[:, 0], want)))
    return Comparison(
        choice.tile.name,
        error,
        chain,
        dim,
        float(_error(outputs.residual, residual).max()),
        ALLOWED[precision] * shape.n_layers * n_steps,
        len(emulator.launches),
        sum(launched.n_instructions for launched in emulator.launches),
    )


def _start(n_chains: int, low: float, high: float, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return low + (high - low) * torch.rand(n_chains, dim, generator=generator)


def _error(got: Tensor, want: Tensor) -> Tensor:
    return (got - want).abs().nan_to_num(float("inf"))


def _worst(error: Tensor) -> tuple[float, int, int]:
    place = int(error.argmax())
    return float(error.flatten()[place]), *divmod(place, error.shape[1])


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit status 2."""
        self.exit(2, f"error: {message}; --help lists what is allowed\n")


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    about = "Compile a kernel for sm_90, run its PTX on the CPU and compare the states with plain torch."
    parser = OneLineParser(prog="python -m kaleido_kernels.emulate", description=about)
    parser.add_argument("--net", choices=list(NETWORKS), default="digits", help="reference network (default: digits)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of operands (default: fp32)")
    parser.add_argument("--kernel", choices=("auto", *KERNELS), default="auto", help="default: what the plan takes")
    parser.add_argument("--arch", default="sm_90", help="the emulator knows sm_90, the default, and no other")
    parser.add_argument("--chains", type=_positive, default=300, metavar="N", help="chains to run (default: 300)")
    parser.add_argument("--steps", type=_positive, default=3, metavar="N", help="steps of each (default: 3)")
    parser.add_argument("--seed", type=_seed, default=0, help="of weights, start states and chance (default: 0)")
    parser.add_argument(
        "--copies",
        choices=("late", "early"),
        default="late",
        help="asynchronous copies take effect as late as allowed (default) or at once",
    )
    parser.add_argument(
        "--apart",
        action="store_true",
        help="groups of warps run apart in an order by chance (four warps with products of warp groups are one group), "
        "as partitions of specialised warps always do",
    )
    return parser


def _positive(text: str) -> int:
    return _within(text, 1, 10_000_000)


def _seed(text: str) -> int:
    return _within(text, 0, 2**62)


def _within(text: str, least: int, most: int) -> int:
    if not re.fullmatch(r"-?\d+", text) or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most:,}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; see the module's text for the exit status."""
    options = make_parser().parse_args(arguments)
    problem = _why_not(options.arch)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    from kaleido_kernels.proving.emulation.block import Conditions
    from kaleido_kernels.proving.emulation.driver import Emulator
    from kaleido_kernels.proving.emulation.errors import EmulatorError, UnknownInstructionError

    conditions = Conditions(early_copies=options.copies == "early", apart=options.apart, seed=options.seed)
    began = time.perf_counter()
    what = f"{options.net} {options.precision}"
    try:
        emulator = Emulator(conditions)
        found = compare(
            options.net, options.precision, options.kernel, options.chains, options.steps, emulator, options.seed
        )
    except EmulatorError as problem:
        if not isinstance(problem, UnknownInstructionError):
            print(f"{what}: WRONG: {problem}")
            return 1
        print(f"error: {what}: {problem}", file=sys.stderr)
        return 2
    except (ValueError, RuntimeError, OSError, MemoryError) as problem:
        print(f"error: {what}: {str(problem).strip().splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(
        f"{what}, {found.kernel}: {'right' if found.passed else 'WRONG'}: largest error {found.error:.3g} at chain "
        f"{found.chain}, dim {found.dim} (allowed {found.allowed:.2g}), of residuals {found.residual_error:.2g}; "
        f"{options.chains} chains x {options.steps} steps, {found.n_instructions:,} instructions in "
        f"{found.n_launches} launches, {time.perf_counter() - began:.1f} s"
    )
    return 0 if found.passed else 1


def _why_not(arch: str) -> str:
    """Why the command cannot run here; nothing if it can."""
    if arch != "sm_90":
        return f"architecture {arch!r}: the emulator knows sm_90 only; compile others with kaleido_kernels.inspect"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed, and it compiles the kernels: pip install triton (on Linux)"
    from triton import knobs

    if knobs.runtime.interpret:
        return "TRITON_INTERPRET is set, so nothing would be compiled: unset it and run again"
    try:
        knobs.nvidia.ptxas.path
    except RuntimeError as problem:
        return f"Triton has no ptxas, which finishes compiling: {problem}; install Triton's own wheel for Linux"
    return ""


if __name__ == "__main__":
    sys.exit(main())
