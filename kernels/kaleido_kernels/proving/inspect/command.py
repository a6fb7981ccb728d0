"""``python -m kaleido_kernels.inspect --arch sm_90 [--net NAME ...] [--precision P ...] [--json]``.

Compiles every configuration that the plan can choose for the reference networks, prints resources, instructions and
verdicts, and the cost model's estimate. Exit status 1 when a verdict fails, 2 when the command cannot run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence

from kaleido_kernels.proving.architectures import FACTS
from kaleido_kernels.proving.inspect.compiling import refuse_interpreter
from kaleido_kernels.proving.inspect.jobs import FORM_NAMES, FORMS, VARIANTS, planned_jobs
from kaleido_kernels.proving.inspect.report import inspect_job
from kaleido_kernels.proving.inspect.table import table
from kaleido_kernels.shapes import NETWORKS

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
        choices=("none", "normal", "uniform", "upstream", "flow", "checks"),
        help="kind of jitter, steps by parts, or chains that halt inside; default: none, normal, flow and checks",
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
        print(f"compiling {job.net} {job.kernel} {job.tile.short_name} {job.precision} {job.variant}", file=sys.stderr)
        reports.append(inspect_job(job, options.arch))
    print(json.dumps([report.to_json() for report in reports], indent=1) if options.json else table(reports))
    return 1 if any(report.failed for report in reports) else 0
