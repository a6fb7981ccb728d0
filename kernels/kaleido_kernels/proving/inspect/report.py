"""One kernel compiled and judged."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from kaleido_kernels.proving.evidence import Evidence, Verdict
from kaleido_kernels.proving.inspect.compiling import Compiled, compile_job, disassemble
from kaleido_kernels.proving.inspect.estimating import estimate_job
from kaleido_kernels.proving.inspect.jobs import Job
from kaleido_kernels.proving.roofline.model import Estimate
from kaleido_kernels.proving.sass.rounds import count_kinds
from kaleido_kernels.proving.verdicts import has_body, judge, largest_loop, register_file, shared_memory


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
            "tile": asdict(cast("Any", self.job.tile)),
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


def evidence_of(job: Job, compiled: Compiled, arch: str) -> Evidence:
    """What the verdicts are about."""
    tile = job.tile
    return Evidence(
        kernel=job.kernel,
        precision=job.precision,
        jitter=job.jitter,
        arch=arch,
        warps=compiled.warps,
        registers=compiled.registers,
        stack=compiled.stack,
        shared=compiled.shared,
        use_tma=tile.use_tma,
        ttir=compiled.ttir,
        ttgir=compiled.ttgir,
        program=disassemble(compiled.binary),
        warp_groups=compiled.warps % 4 == 0 and tile.chains >= 64,
        loads_ahead=getattr(tile, "loads_ahead", 0),
    )
