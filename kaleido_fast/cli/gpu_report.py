"""The command line of the report of a GPU; ``benchmarks/gpu_report.py`` starts it."""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

import kaleido_fast
from kaleido_fast.benchmarking.gpu.report import FORMAT, FORMAT_VERSION, STAGES, WORTH, ReportRequest, make_report
from kaleido_fast.benchmarking.gpu.table import readme_part
from kaleido_fast.benchmarking.gpu.workers import ProcessWorker
from kaleido_fast.benchmarking.program import run_program
from kaleido_fast.benchmarking.readme import check_place, write_between
from kaleido_fast.cli.parameters import overwrite_option
from kaleido_fast.errors import InputError, unknown_name
from kaleido_fast.system.devices import resolve_device
from kaleido_fast.system.files import check_writable

BEGIN = "<!-- gpu report: begin -->"
END = "<!-- gpu report: end -->"
RESULTS = Path(kaleido_fast.__file__).parent.parent / "benchmarks" / "results"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--only",
    multiple=True,
    metavar="NAME",
    help=f"Networks ({', '.join(WORTH)}) or stages ({', '.join(STAGES)}); repeat, or separate by commas [all].",
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0.5),
    default=9.5,
    show_default=True,
    help="Time for everything; what does not fit is left out and named.",
)
@click.option("--quick", is_flag=True, help="Fewer, shorter timings; without a GPU the path alone, in the interpreter.")
@click.option("--emulate", is_flag=True, help="Try the path with compiled kernels in the emulator: minutes a network.")
@click.option("--device", default="auto", show_default=True, help="cuda, cuda:1, ...")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the report [benchmarks/results].")
@overwrite_option
@click.option("--readme", type=click.Path(path_type=Path), help="Write the table between the markers of this file.")
@click.option(
    "--from", "source", type=click.Path(path_type=Path), help="Measure nothing: take this report's JSON file."
)
def command(
    only: tuple[str, ...],
    minutes: float,
    quick: bool,
    emulate: bool,
    device: str,
    out: Path | None,
    overwrite: bool,
    readme: Path | None,
    source: Path | None,
) -> None:
    """Check, tune and time the fused kernels on this GPU against all its peers, and write NAME.json and NAME.md.

    Every contestant first has to reproduce the reference's states. A case that fails is recorded, the rest goes on; the
    files are whole and up to date whenever it is stopped.
    """
    if readme is not None:
        check_place(readme, BEGIN, END)
    if source is None:
        request = replace(_request(only, minutes, quick, device, out or RESULTS, emulate), overwrite=overwrite)
        if request.interpreter and readme is not None:
            raise InputError("--readme without a GPU: the table would hold no speed; run it on a machine that has one")
        _make_folder(request.out)
        source = _measure(request)
    if readme is not None:
        link = Path(os.path.relpath(source.with_suffix(".md"), readme.parent)).as_posix()
        write_between(readme, BEGIN, END, readme_part(read_report(source), link))


def _request(
    only: tuple[str, ...], minutes: float, quick: bool, device: str, folder: Path, emulate: bool = False
) -> ReportRequest:
    if not math.isfinite(minutes):
        raise InputError(f"--minutes {minutes} is no number of minutes: give one such as 9.5")
    names = [name.strip() for text in only for name in text.split(",") if name.strip()]
    if only and not names:
        raise InputError(f"--only {','.join(only)!r} names nothing: name networks or stages, or leave it out")
    for name in names:
        if name not in WORTH and name not in STAGES:
            raise unknown_name("network or stage", name, (*WORTH, *STAGES))
    target = resolve_device("cpu" if emulate else device)
    if target.type == "cpu" and not quick:
        raise InputError(
            "there is no GPU here: --quick tries the whole path in Triton's interpreter with tiny networks, "
            "--quick --emulate in the emulator"
        )
    return ReportRequest(
        device=str(target),
        networks=tuple(name for name in WORTH if name in names) or WORTH,
        stages=tuple(name for name in STAGES if name in names) or STAGES,
        minutes=minutes,
        quick=quick,
        out=folder,
        interpreter=target.type == "cpu",
        emulate=emulate,
    )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise InputError(f"folder {folder} cannot be made: {problem.strerror}; name another with --out") from problem
    check_writable(folder / "report.json")


def _measure(request: ReportRequest) -> Path:
    """Make the report in processes of their own, with a table of tiles of their own."""
    with tempfile.TemporaryDirectory(prefix="kaleido-fast-") as data:
        environment = {"XDG_DATA_HOME": data, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # JAX would take all memory
        if request.interpreter:
            environment |= {"TRITON_INTERPRET": "0" if request.emulate else "1", "OMP_NUM_THREADS": "1"}
        tell = partial(click.echo, err=True)
        launches = "emulate" if request.emulate else "run"
        report = make_report(request, lambda: ProcessWorker(environment, launches), tell)
    click.echo(f"{report.path}, {report.path.with_suffix('.md')}")
    return report.path


def read_report(path: Path) -> dict[str, Any]:
    """The record of a report of a GPU.

    Raises:
        InputError: no such file, or not a report of a GPU.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = record["format"] == FORMAT and record["version"] == FORMAT_VERSION and not record["interpreter"]
    except OSError as problem:
        raise InputError(f"report {path} cannot be read: {problem.strerror}") from problem
    except (ValueError, KeyError, TypeError) as problem:
        raise InputError(f"{path} is not a GPU's report: give a JSON file that gpu_report.py wrote") from problem
    if not known or not record["networks"]:
        raise InputError(f"{path} holds no timings of a GPU: make it again with gpu_report.py on one")
    return dict(record)


def main() -> None:
    """Run the command line and end this process."""
    run_program(command, "gpu_report", "what was measured is written")
