"""The first minutes with a GPU: a line a case as it goes, each case in a process that may die or hang alone.

First whether states are right, several cases at a time, the networks that matter most first; then milliseconds, alone.
``benchmarks/first_contact.py`` starts the command; docs/gpu.md says what it must print.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

import kaleido_fast
from kaleido_fast.benchmarking.gpu.contact import NETS, Case, cases, timed_cases
from kaleido_fast.benchmarking.gpu.jobs import ContactJob
from kaleido_fast.benchmarking.gpu.prepared import Manifest, manifest_here, pack, unpack
from kaleido_fast.benchmarking.gpu.workers import ProcessWorker, Worker, run_jobs
from kaleido_fast.benchmarking.machine import source_commit
from kaleido_fast.benchmarking.program import run_program
from kaleido_fast.errors import InputError, unknown_name
from kaleido_fast.system.files import check_folder, check_writable, write_error

CHECKED, REPEATS, TIMED_CHAINS = 1000, 10, 100_000
EMULATED_CHAINS = 150  # some whole tiles and a ragged one
CASE_SECONDS, LOOK_SECONDS = 60.0, 120.0
EMULATED_SECONDS = 1800.0
WORKERS = 12
LOG = "first_contact.jsonl"
ROOT = Path(kaleido_fast.__file__).parent.parent
HEAD = ("line", "network", "precision", "kernel", "runs", "at_s", "problem")


@dataclass(frozen=True)
class ContactRequest:
    """What to do.

    Args:
        device: such as "cuda".
        minutes: for everything; cases that are not reached are reported as such.
        networks: which of `NETS`.
        chains, repeats, timed_chains: sizes.
        seconds: most for one case.
        workers: processes of the checks.
        compile_only: kernels do not run, so that no state is right.
    """

    device: str
    minutes: float
    networks: tuple[str, ...] = NETS
    chains: int = CHECKED
    repeats: int = REPEATS
    timed_chains: int = TIMED_CHAINS
    seconds: float = CASE_SECONDS
    workers: int = WORKERS
    compile_only: bool = False

    def job(self, case: Case, timed: bool) -> ContactJob:
        """A case as a worker takes it."""
        return {
            "kind": "contact",
            "device": self.device,
            "network": case.network,
            "precision": case.precision,
            "kernel": case.kernel,
            "timed": timed,
            "compile_only": self.compile_only,
            "chains": self.chains,
            "repeats": self.repeats,
            "timed_chains": self.timed_chains,
        }


def make_contact(
    request: ContactRequest,
    about: dict[str, Any],
    out: Path,
    new_worker: Callable[[], Worker],
    tell: Callable[[str], None],
) -> tuple[int, int]:
    """Check all cases, then time some; every line is shown and added to ``out`` as its case finishes.

    Args:
        request: what to do.
        about: of the GPU, as `look_at` returns it: the first line that is added, which marks the start of a run.
        out: file of JSON lines.
        new_worker: makes what does the cases.
        tell: called with a line to show.

    Returns:
        Number of cases without a problem, and of all.

    Raises:
        InputError: ``out`` cannot be written.
    """
    began = time.monotonic()
    until = began + 60 * request.minutes
    right: list[bool] = []

    def finished(job: ContactJob, found: dict[str, Any], problem: str) -> None:
        entry: dict[str, Any] = {"line": "time" if job["timed"] else "check"}
        entry |= {"network": job["network"], "precision": job["precision"], "kernel": job["kernel"]}
        entry |= {**found, "problem": problem, "at_s": round(time.monotonic() - began, 1)}
        right.append(not problem)
        _log(out, entry)
        tell(line_of(entry))

    _log(out, {"line": "run", "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), **about})
    checks = [request.job(case, timed=False) for case in cases(request.networks)]
    workers = [new_worker() for _ in range(max(1, min(request.workers, os.cpu_count() or 1)))]
    run_jobs(checks, workers, until, finished, request.seconds)
    timings = [request.job(case, timed=True) for case in timed_cases(request.networks)]
    run_jobs(timings, [new_worker()], until, finished, request.seconds)  # alone: nothing else may use the GPU
    return sum(right), len(checks) + len(timings)


def _log(out: Path, entry: dict[str, Any]) -> None:
    try:
        with out.open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
    except OSError as problem:
        raise write_error(out, problem) from problem


def line_of(entry: dict[str, Any]) -> str:
    """A case's entry as a line for people."""
    head = f"{entry['at_s']:6.1f} s  {entry['line']:6}{entry['network']:9}{entry['precision']:5}"
    head += f"{entry.get('runs', entry['kernel']):7}"
    values = [f"{name} {_short(value)}" for name, value in entry.items() if name not in HEAD]
    if entry["problem"]:
        values.append(f"PROBLEM {entry['problem']}")
    return head + "  ".join(values)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def look_at(device: str, worker: Worker, busy: bool) -> dict[str, Any]:
    """What the GPU is, and what runs on it: name, capability, sizes, state, versions, commit.

    Raises:
        InputError: there is none, or it cannot be used for this; ``busy`` takes one that others use.
    """
    found: dict[str, Any] = {}
    try:
        problem = worker.run({"kind": "look", "device": device, "busy": busy}, LOOK_SECONDS, found.update)
    finally:
        worker.close()
    if problem:
        raise InputError(f"no GPU can be used here: {problem}")
    refused = found.pop("refused")
    if refused:
        raise InputError(refused)
    commit, changed = source_commit(ROOT / "kaleido_fast")
    return {**found, "commit": commit, "changed": changed}


def headline(found: dict[str, Any]) -> str:
    """What `look_at` found, in one line."""
    capability = ".".join(map(str, found["capability"]))
    return (
        f"{found['name']}, capability {capability}, {found['multiprocessors']} multiprocessors, "
        f"{found['shared_memory']:,} bytes of shared memory, {_versions(found['versions'])}"
    )


def _versions(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def prepare(archive: Path, tell: Callable[[str], None], workers: int, networks: Sequence[str] = NETS) -> Manifest:
    """Compile every variant that a first contact with these networks and the kernels' own tests launch, and pack them.

    Raises:
        InputError: a variant that does not compile, a test that fails in the emulator, or an archive that cannot be
            written.
    """
    check_folder(archive)
    with tempfile.TemporaryDirectory(prefix="kaleido-fast-") as folder:
        cache = Path(folder)
        environment = {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
        request = ContactRequest("cpu", 0.0, chains=1, repeats=0, compile_only=True)
        jobs = [request.job(case, timed=False) for case in cases(networks)]

        def finished(job: ContactJob, found: dict[str, Any], problem: str) -> None:
            tell(f"{job['network']} {job['precision']} {job['kernel']}{': ' + problem if problem else ''}")
            if problem:
                problems.append(problem)

        problems: list[str] = []
        makers = [ProcessWorker(environment, "compile") for _ in range(workers)]
        run_jobs(jobs, makers, time.monotonic() + 3600, finished, EMULATED_SECONDS)
        if problems:
            raise InputError(f"{len(problems)} of {len(jobs)} cases do not compile; the first: {problems[0]}")
        tell("the kernels' tests, in the emulator")
        _run_tests(environment, workers)
        return pack(cache, archive, source_commit(ROOT / "kaleido_fast")[0])


def _run_tests(environment: Mapping[str, str], workers: int) -> None:
    """Run the kernels' tests in the emulator: one that is only compiled stops at its first wrong value.

    Raises:
        InputError: they cannot be run, or not all pass, so that some of what they launch may not be compiled.
    """
    tests = sorted(str(path) for path in (ROOT / "tests" / "kernels").glob("test_*.py"))
    options = ["--emulate", "-q", "-n", str(workers), "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    if result.returncode != 0:
        lines = [line.strip() for line in (result.stdout + result.stderr).splitlines() if line.strip()]
        last = lines[-1][-200:] if lines else f"status {result.returncode}"
        raise InputError(f"the kernels' tests do not all pass in the emulator, so nothing is packed: {last}")


def _finite(context: click.Context, parameter: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is no number of minutes: give one such as 3", context, parameter)
    return value


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--prepare", "prepared", is_flag=True, help="Compile all kernels into ARCHIVE; needs no GPU.")
@click.option("--archive", type=click.Path(path_type=Path), help="Archive of compiled kernels, to write or to use.")
@click.option("--out", type=click.Path(path_type=Path), default=Path(), help=f"Folder of {LOG}; made if needed [here].")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0.1),
    default=3.0,
    show_default=True,
    callback=_finite,
    help="For everything.",
)
@click.option("--only", metavar="NAMES", help=f"Networks, separated by commas, of {', '.join(NETS)} [all].")
@click.option("--busy", is_flag=True, help="Use a GPU that others use as well; its times mean little.")
@click.option("--emulate", is_flag=True, help="Try the whole path without a GPU, in the emulator: minutes a network.")
@click.option("--workers", type=click.IntRange(min=1), default=WORKERS, show_default=True, help="Processes at a time.")
@click.pass_context
def command(
    context: click.Context,
    prepared: bool,
    archive: Path | None,
    out: Path,
    minutes: float,
    only: str | None,
    busy: bool,
    emulate: bool,
    workers: int,
) -> None:
    """Check the fused kernels on this GPU, then time them: one line a case as it goes.

    The line holds what ran, the largest error and where, whether repeats had the same bits, or milliseconds for 100,000
    chains x 300 steps. Exit status 1 when a case had a problem, 2 when there is no GPU for it.
    """
    networks = _networks(only)
    if prepared:
        _prepare(context, archive, networks, workers)
        return
    with tempfile.TemporaryDirectory(prefix="kaleido-fast-") as data:
        environment = {"XDG_DATA_HOME": data}  # no tiles that were measured here before
        if emulate:
            environment |= {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
        request = _request(networks, minutes, emulate, workers)

        def new_worker() -> ProcessWorker:
            return ProcessWorker(environment, "emulate" if emulate else "run")

        about = look_at(request.device, new_worker(), busy)  # before all else: the first line says if there is no GPU
        _make_folder(out)
        click.echo(headline(about))
        if archive is not None:
            _use(archive)
        right, made = make_contact(request, about, out / LOG, new_worker, click.echo)
    click.echo(f"{right} of {made} cases without a problem; {out / LOG}")
    sys.exit(0 if right == made else 1)


def _prepare(context: click.Context, archive: Path | None, networks: Sequence[str], workers: int) -> None:
    """What ``--prepare`` does; options of a run on a GPU are refused."""
    given = ("out", "minutes", "busy", "emulate")
    idle = [f"--{name}" for name in given if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if idle:
        raise click.UsageError(f"--prepare runs nothing on a GPU: leave out {' and '.join(idle)}")
    if archive is None:
        raise click.UsageError("--prepare needs --archive FILE: where the compiled kernels go")
    tell = partial(click.echo, err=True)
    manifest = prepare(archive, tell, min(workers, os.cpu_count() or 1), networks)
    size = archive.stat().st_size
    click.echo(f"{archive}: {manifest.kernels} kernels for Triton {manifest.triton}, {size:,} bytes")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise InputError(f"folder {folder} cannot be made: {problem.strerror}; name another with --out") from problem
    check_writable(folder / LOG)


def _networks(only: str | None) -> tuple[str, ...]:
    if only is None:
        return NETS
    names = [name.strip() for name in only.split(",") if name.strip()]
    if not names:
        raise InputError(f"--only {only!r} names no network: name some of {', '.join(NETS)}, or leave it out")
    for name in names:
        if name not in NETS:
            raise unknown_name("network", name, NETS)
    return tuple(name for name in NETS if name in names)


def _request(networks: Sequence[str], minutes: float, emulate: bool, workers: int) -> ContactRequest:
    if not emulate:
        return ContactRequest("cuda", minutes, tuple(networks), workers=workers)
    sizes = {"chains": EMULATED_CHAINS, "repeats": 1, "timed_chains": EMULATED_CHAINS}
    return ContactRequest("cpu", minutes, tuple(networks), **sizes, seconds=EMULATED_SECONDS, workers=workers)  # type: ignore[arg-type]


def _use(archive: Path) -> None:
    """Unpack an archive where Triton looks; for one that is of no use it says so, and kernels are compiled anew."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")  # noqa: PTH111 - as Triton does; Path raises where there is no home
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path(home) / ".triton" / "cache")
    here = manifest_here(source_commit(ROOT / "kaleido_fast")[0])
    try:
        click.echo(f"{archive}: {unpack(archive, cache, here).kernels} kernels in the cache")
    except InputError as problem:
        click.echo(f"{problem}; kernels are compiled anew")


def main() -> None:
    """Run the command line and end this process."""
    run_program(command, "first_contact", "what was found is written")
