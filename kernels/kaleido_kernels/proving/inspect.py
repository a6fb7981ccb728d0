"""Compiles kernels ahead of time, without a GPU, and judges the result.

``python -m kaleido_kernels.inspect --arch sm_90 [--net NAME ...] [--precision P ...] [--json]`` compiles every
configuration that the plan can choose for the reference networks, prints resources, instructions and verdicts, and the
cost model's estimate. Exit status 1 when a verdict fails, 2 when the command cannot run.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kaleido_kernels.graph_plan import GraphTile
from kaleido_kernels.launch import CHECKED, QUIET
from kaleido_kernels.proving.architectures import FACTS
from kaleido_kernels.proving.roofline import (
    FAST,
    NOTE,
    SLOW,
    Estimate,
    Gpu,
    Overlap,
    TileWork,
    estimate,
    narrow_work,
    resident_programs,
    step_counts,
    stream_overlap,
    stream_work,
    wide_overlap,
    wide_work,
)
from kaleido_kernels.proving.sass import Program, copy_order, count_kinds, parse_program, path_counts
from kaleido_kernels.proving.verdicts import (
    Evidence,
    Verdict,
    has_body,
    judge,
    largest_loop,
    register_file,
    shared_memory,
)
from kaleido_kernels.shapes import NETWORKS, NetShape
from kaleido_kernels.tiles import (
    AnyTile,
    StreamLayout,
    Tile,
    choose,
    kernel_of,
    narrow_layout,
    stream_layout,
)
from kaleido_kernels.wide_plan import WideTile

FORMS = ("fp16x3", "fp16", "bf16")
FORM_NAMES = {"fp32": "fp16x3", **{form: form for form in (*FORMS, "tf32", "ieee")}}
"""Precisions as the command takes them: fp32 is computed as split fp16 for all weights of usual size."""
VARIANTS = ("none", "normal", "checks")
N_CHAINS, N_STEPS = 100_000, 300


@dataclass(frozen=True)
class Job:
    """One configuration to compile. ``variant`` is the kernel's JITTER, or "checks" for chains that halt inside."""

    net: str
    shape: NetShape
    tile: AnyTile
    precision: str
    variant: str

    @property
    def jitter(self) -> str:
        return "none" if self.variant == "checks" else self.variant

    @property
    def kernel(self) -> str:
        return kernel_of(self.tile)

    @property
    def tile_text(self) -> str:
        tile = self.tile
        if isinstance(tile, WideTile):
            path = "" if tile.use_tma else " pointers"
            return f"{tile.rows}x{tile.cols}/{tile.last_cols}x{tile.inner} w{tile.warps} s{tile.stages}{path}"
        if isinstance(tile, GraphTile):
            return f"{tile.rows}x{tile.cols} w{tile.warps}, blocks of {tile.block_chains}"
        return f"{tile.block_chains} w{tile.num_warps} s{tile.num_stages}"


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a job. ``binary`` is a cubin for NVIDIA devices, else empty."""

    registers: int
    stack: int
    shared: int
    warps: int
    ttir: str
    ttgir: str
    seconds: float
    binary: bytes


@dataclass(frozen=True)
class Report:
    """A job with its resources, instruction counts, verdicts and estimate (None where not judged: other devices)."""

    job: Job
    arch: str
    registers: int
    stack: int
    shared: int
    seconds: float
    total: dict[str, int]
    loop: dict[str, int]
    verdicts: tuple[Verdict, ...]
    estimate: Estimate | None

    @property
    def failed(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if not verdict.passed]

    def to_json(self) -> dict[str, Any]:
        return {
            "net": self.job.net,
            "kernel": self.job.kernel,
            "tile": asdict(self.job.tile),
            "precision": self.job.precision,
            "variant": self.job.variant,
            "arch": self.arch,
            "registers": self.registers,
            "stack": self.stack,
            "shared": self.shared,
            "seconds_to_compile": round(self.seconds, 2),
            "instructions": self.total,
            "loop_instructions": self.loop,
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "estimate": self.estimate.to_json() if self.estimate else None,
        }


def planned_jobs(
    nets: Sequence[str], precisions: Sequence[str] = FORMS, variants: Sequence[str] = VARIANTS, arch: str = "sm_90"
) -> Iterator[Job]:
    """The configurations that the plan can choose for the named networks on ``arch``."""
    for net in nets:
        shape = NETWORKS[net]
        for precision in precisions:
            for tile in planned_tiles(shape, precision, arch):
                for variant in variants:
                    yield Job(net, shape, tile, precision, variant)


def planned_tiles(shape: NetShape, precision: str, arch: str) -> Sequence[AnyTile]:
    """The tiles that the plan can choose: without a tuned table it is one, and never the graph path's."""
    return [choose(shape, precision, FACTS[arch]).tile]


def compile_job(job: Job, arch: str) -> Compiled:
    """Compiles one configuration for ``arch``, as a launch there would.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, which replaces the compiler.
    """
    refuse_interpreter()
    from kaleido_kernels.proving.fake_driver import compile_variant

    variant = variant_of(job, use_asm=not arch.startswith("gfx"))
    started = time.perf_counter()
    compiled = compile_variant(variant, arch)
    seconds = time.perf_counter() - started
    binary = compiled.asm.get("cubin", b"")
    registers, stack = resources(binary) if binary else (0, 0)
    ttir, ttgir = compiled.asm["ttir"], compiled.asm["ttgir"]
    return Compiled(registers, stack, compiled.metadata.shared, variant.num_warps, ttir, ttgir, seconds, binary)


def variant_of(job: Job, use_asm: bool = True) -> Any:
    """The `kaleido_kernels.variant.Variant` that an engine launches for a job."""
    kind = CHECKED if job.variant == "checks" else QUIET._replace(jitter=job.jitter)
    module = importlib.import_module(f"kaleido_kernels.{job.kernel}")  # which imports Triton
    return module.variant(job.shape, job.precision, job.tile, kind, use_asm)


def refuse_interpreter() -> None:
    """Raises RuntimeError where TRITON_INTERPRET would put the interpreter in the compiler's place."""
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"):
        raise RuntimeError("TRITON_INTERPRET is set, so nothing would be compiled: unset it and run again")


def resources(binary: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack, from ``cuobjdump -res-usage``."""
    text = _run_tool("cuobjdump", ["-res-usage"], binary)
    registers = [int(value) for value in re.findall(r"\bREG:(\d+)", text)]
    stacks = [int(value) for value in re.findall(r"\bSTACK:(\d+)", text)]
    return max(registers), max(stacks)  # helper functions are listed beside the kernel


def disassemble(binary: bytes) -> Program:
    """The machine code of a cubin."""
    return parse_program(_run_tool("nvdisasm", ["-c"], binary))


def _run_tool(name: str, options: list[str], binary: bytes) -> str:
    """Output of one of the CUDA tools that come with Triton."""
    from triton import knobs

    path = getattr(knobs.nvidia, name).path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary)
        return subprocess.run([path, *options, str(file)], check=True, capture_output=True, text=True).stdout


def evidence_of(job: Job, compiled: Compiled, arch: str) -> Evidence:
    """What the verdicts are about."""
    tile = job.tile
    rows = tile.block_chains if isinstance(tile, Tile) else tile.rows
    return Evidence(
        kernel=job.kernel,
        precision=job.precision,
        jitter=job.jitter,
        arch=arch,
        warps=compiled.warps,
        registers=compiled.registers,
        stack=compiled.stack,
        shared=compiled.shared,
        use_tma=isinstance(tile, WideTile) and tile.use_tma,
        ttir=compiled.ttir,
        ttgir=compiled.ttgir,
        program=disassemble(compiled.binary),
        warp_groups=compiled.warps % 4 == 0 and rows >= 64,
    )


def inspect_job(job: Job, arch: str) -> Report:
    """Compiles a job and judges it: all verdicts and the estimate on sm_90, elsewhere whether it could run at all."""
    compiled = compile_job(job, arch)
    blank = Report(job, arch, compiled.registers, compiled.stack, compiled.shared, compiled.seconds, {}, {}, (), None)
    if not compiled.binary:
        return replace(blank, verdicts=(shared_memory(compiled.shared, arch),))
    evidence = evidence_of(job, compiled, arch)
    if arch != "sm_90":
        verdicts = (shared_memory(compiled.shared, arch), register_file(evidence), has_body(evidence))
        return replace(blank, total=dict(count_kinds(evidence.program.instructions)), verdicts=verdicts)
    program = evidence.program
    loop = largest_loop(program)
    loop_counts = dict(count_kinds(program.inside(loop))) if loop else {}
    return replace(
        blank,
        total=dict(count_kinds(program.instructions)),
        loop=loop_counts,
        verdicts=tuple(judge(evidence)),
        estimate=estimate_job(job, evidence, loop_counts),
    )


def estimate_job(job: Job, evidence: Evidence, loop: dict[str, int]) -> Estimate:
    """The cost model's time for 100,000 chains x 300 steps in one launch, from what the machine code shows.

    That is instruction counts, resources, and the order of copies and products (`read_overlap`).
    """
    tile, shape, program = job.tile, job.shape, evidence.program
    if isinstance(tile, WideTile):
        overlap = read_overlap(program, wide_overlap(job.precision, tile.stages))
        work = wide_work(shape, tile, job.precision, overlap=overlap, **wide_counts(program))
    elif isinstance(tile, GraphTile):
        raise ValueError("the cost of the graph path is the library's: its fused kernel alone has no estimate")
    elif tile.kernel == "stream":
        work = stream_estimate(job, tile, evidence)
    else:
        bias_rows = 16 if narrow_layout(shape).bias == "mma" else 0
        work = narrow_work(
            shape,
            tile.block_chains,
            tile.num_warps,
            job.precision,
            loop,
            bias_rows=bias_rows,
            programs=programs(evidence),
        )
    return estimate(work, N_CHAINS, N_STEPS)


def programs(evidence: Evidence) -> int:
    """How many programs of a kernel a multiprocessor holds at once."""
    return resident_programs(evidence.shared, evidence.registers, evidence.warps, FACTS["sm_90"].shared_memory)


def read_overlap(program: Program, planned: Overlap) -> Overlap:
    """What hides the copies of the largest loop of products, from machine code.

    ``planned`` fills in what is not there to be read: how far the copy engine runs ahead, or all of it.
    """
    loop = largest_loop(program)
    order = copy_order(program, loop) if loop else None
    if order is None:
        return planned
    return Overlap(planned.ahead if order.ahead is None else order.ahead, order.products, order.other)


def stream_estimate(job: Job, tile: Tile, evidence: Evidence) -> TileWork:
    """Stream's work: the loop's rounds of a step, and with jitter what a step does around the loop as well."""
    layout, program = stream_layout(job.shape), evidence.program
    jittered = job.jitter != "none"
    return stream_work(
        job.shape,
        tile.block_chains,
        tile.num_warps,
        job.precision,
        stream_counts(program, layout, jittered),
        n_tiles=layout.n_tiles,
        programs=programs(evidence),
        overlap=read_overlap(program, stream_overlap(tile.num_stages)),
        starts=int(jittered),  # with jitter the loop begins anew in every step
    )


def stream_counts(program: Program, layout: StreamLayout, jittered: bool) -> Counter[str]:
    """Instructions that a warp issues in a step. Without jitter the flat loop does all of a step but at draws."""
    loop = largest_loop(program)
    if loop is None:
        return Counter()
    common, rare = path_counts(program, loop)
    if not jittered:
        return step_counts(common, rare, layout.n_tiles, layout.last_tiles)
    around = [other for other in program.loops if loop.blocks < other.blocks]
    outer = min(around, key=lambda other: len(other.blocks), default=loop)
    rest = count_kinds(program.inside(outer)) - count_kinds(program.inside(loop))
    return step_counts(rare, Counter(), layout.n_tiles - layout.last_tiles, 0) + rest


def wide_counts(program: Program) -> dict[str, float]:
    """Instructions around the products of a tile of outputs, and in a block of the pass over the state."""
    counts: dict[str, float] = {}
    tensor = program.tensor_loops
    around = [loop for loop in program.loops if any(inner.blocks < loop.blocks for inner in tensor)]
    if tensor and around:
        smallest = min(around, key=lambda loop: len(loop.blocks))
        held = next(inner for inner in tensor if inner.blocks < smallest.blocks)
        counts["epilogue"] = sum(1 for _ in program.inside(smallest)) - sum(1 for _ in program.inside(held))
    bound_loops = [
        sum(1 for _ in program.inside(loop))
        for loop in program.loops
        if not any(loop.blocks & inner.blocks for inner in tensor)
        and any(item.kind == "MUFU" for item in program.inside(loop))
        and any(item.kind == "LDG" for item in program.inside(loop))
    ]
    if bound_loops:
        counts["state_block"] = max(bound_loops)
    return counts


TABLE_KINDS = ("HGMMA", "HMMA", "FFMA", "MUFU", "LDG", "STG", "LDS", "STS", "LDL", "STL", "LDGSTS", "UTMALDG", "BAR")


def table(reports: Sequence[Report]) -> str:
    """The reports as text: one line each, counts in and outside of the loop of products, then the failed verdicts."""
    lines = [
        f"{'net':9}{'kernel':7}{'tile':31}{'prec':8}{'variant':8}{'regs':>5}{'stack':>6}{'shared':>8}{'loop':>6}"
        f"  {'verdicts':10}{'ms':>13}  {'limit':13}{'peak':>7}  in the loop of products | outside of it"
    ]
    for report in reports:
        job, guess = report.job, report.estimate
        inside = " ".join(f"{kind}:{report.loop[kind]}" for kind in TABLE_KINDS if report.loop.get(kind))
        rest = {kind: report.total.get(kind, 0) - report.loop.get(kind, 0) for kind in TABLE_KINDS}
        outside = " ".join(f"{kind}:{number}" for kind, number in rest.items() if number)
        verdict = "-" if not report.verdicts else "ok" if not report.failed else f"{len(report.failed)} FAILED"
        tail = f"{range_text(guess):>13}  {guess.limit:13}{share_text(guess):>7}" if guess else " " * 35
        lines.append(
            f"{job.net:9}{job.kernel:7}{job.tile_text:31}{job.precision:8}{job.variant:8}{report.registers:5}"
            f"{report.stack:6}{report.shared:8}{report.loop.get('all', 0):6}  {verdict:10}{tail}  {inside} | {outside}"
        )
        lines += [f"    FAILED {verdict.name}: {verdict.detail}" for verdict in report.failed]
    lines.append(f"ms: {N_CHAINS:,} chains x {N_STEPS} steps in one launch on an H100 or H200, {NOTE}; from")
    lines += [f"    {assumptions_text(gpu)}" for gpu in (FAST, SLOW)]
    return "\n".join(lines)


def range_text(guess: Estimate) -> str:
    """Both ends in milliseconds, in three figures."""
    return f"{three_figures(guess.low.milliseconds)}-{three_figures(guess.high.milliseconds)}"


def three_figures(value: float) -> str:
    """A positive number to read: 0.351, 58.2, 1240."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value < 100 else f"{float(f'{value:.3g}'):.0f}"


def share_text(guess: Estimate) -> str:
    """Share of the fp16 matrix peak, the slow end first."""
    return f"{100 * guess.high.peak_share:.0f}-{guess.low.peak_share:.0%}"


def assumptions_text(gpu: Gpu) -> str:
    """The rates of one end of the ranges."""
    return (
        f"{gpu.name}: {gpu.tensor_flops / 1e12:.0f} TFLOP/s of large products, {gpu.clock / 1e9:.3g} GHz; L2 "
        f"{gpu.l2_bandwidth / 1e12:.1f} TB/s ({gpu.l2_per_cycle:.0f} bytes a clock and multiprocessor), holds "
        f"{gpu.l2_capacity / 1e6:.0f} MB; memory {gpu.hbm_bandwidth / 1e12:.1f} TB/s; a load waits {gpu.latency:.0f} "
        f"cycles; a launch takes Python {1e6 * gpu.launch_seconds:.0f} us"
    )


ABOUT = """Compile every configuration that the plan can choose for the reference networks, without a GPU, and print
registers, stack, shared memory, instructions, verdicts on the machine code and the cost model's estimate. Exit status
1 when a verdict fails, 2 when the command cannot run."""


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m kaleido_kernels.inspect", description=ABOUT)
    parser.add_argument("--arch", choices=list(FACTS), default="sm_90", help="all but sm_90 are compiled only")
    parser.add_argument("--net", action="append", choices=list(NETWORKS), help="repeat for several; default: all six")
    parser.add_argument(
        "--precision",
        action="append",
        choices=list(FORM_NAMES),
        help="default: fp32 (as fp16x3, three fp16 products), fp16, bf16; ieee is fp32 without tensor cores",
    )
    parser.add_argument(
        "--variant",
        action="append",
        choices=("none", "normal", "uniform", "upstream", "checks"),
        help="kind of jitter, or chains that halt inside of a launch; default: none, normal and checks",
    )
    parser.add_argument("--json", action="store_true", help="a JSON list on standard output instead of a table")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; see the module's text for the exit status."""
    options = make_parser().parse_args(arguments)
    try:
        refuse_interpreter()
        if importlib.util.find_spec("triton") is None:
            raise RuntimeError("Triton is not installed, and it compiles the kernels: pip install triton (on Linux)")
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    precisions = dict.fromkeys(FORM_NAMES[name] for name in options.precision or FORMS)
    jobs = planned_jobs(options.net or list(NETWORKS), list(precisions), options.variant or VARIANTS, options.arch)
    reports = []
    for job in jobs:
        print(f"compiling {job.net} {job.kernel} {job.tile_text} {job.precision} {job.variant}", file=sys.stderr)
        reports.append(inspect_job(job, options.arch))
    print(json.dumps([report.to_json() for report in reports], indent=1) if options.json else table(reports))
    return 1 if any(report.failed for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
