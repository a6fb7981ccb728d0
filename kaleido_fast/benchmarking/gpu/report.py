"""The whole report: stages in order of worth, each inside its share of the time, written down as they finish."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kaleido_fast.benchmarking.gpu.jobs import CeilingsJob, CheckJob, FactsJob, NetworkJob, ProveJob, ReportJob
from kaleido_fast.benchmarking.gpu.table import markdown
from kaleido_fast.benchmarking.gpu.workers import Worker, run_jobs
from kaleido_fast.benchmarking.machine import command_line
from kaleido_fast.benchmarking.peers import PEERS, missing_modules
from kaleido_fast.errors import InputError
from kaleido_fast.system.files import atomic_path
from kaleido_fast.system.outputs import check_outputs
from kaleido_fast.system.tuned import table_name
from kaleido_kernels.tuned import tile_from_json

FORMAT = "kaleido-fast GPU report"
FORMAT_VERSION = 1
STAGES = ("ceilings", "checks", "tuning", "timing")
NETWORK_STAGES = {"tuning", "timing"}
# Networks in the order of what a report is made for: one that is cut short has these first.
WORTH = ("mnist", "digits", "deep128", "cifar", "points2d", "points1d")
# What timing takes most of the time of is last, and left out first.
REPORT_PEERS = (
    *("published", "eager", "eager-fp16", "eager-bf16", "chunked-fp16", "cudagraph-fp16", "chunked", "cudagraph"),
    *("jax", "compile-fp16", "compile"),
)
WEIGHTS = {"mnist": 1.5, "cifar": 2.0}  # of the time for networks
PROOF_SHARE = 0.35  # of all time, until when checks and tiles are proved, where something follows
LAST_SECONDS = 10.0
LAST_RESTART = 20.0  # seconds under which no network goes on in a new process: its start takes ten
WORKERS = 12


@dataclass(frozen=True)
class ReportRequest:
    """What to measure.

    Args:
        device: a CUDA device, or "cpu" for Triton's interpreter or the emulator.
        networks, stages: which of them.
        minutes: for everything.
        quick: fewer timings of less work each.
        out: folder of the report.
        interpreter: stand-ins of a few values' width on the CPU, to try the path itself; no speed means anything.
        emulate: whether that is done with compiled kernels in the emulator.
    """

    device: str
    networks: tuple[str, ...] = WORTH
    stages: tuple[str, ...] = STAGES
    minutes: float = 9.5
    quick: bool = False
    out: Path = Path("benchmarks/results")
    interpreter: bool = False
    emulate: bool = False
    overwrite: bool = False

    @property
    def rounds(self) -> int:
        """Timings of each contestant."""
        return 2 if self.interpreter else 5 if self.quick else 20


class Report:
    """The record as it grows, and the files it lies in.

    Args:
        request: what is measured.
        tell: called with a line to show as things finish.
    """

    def __init__(self, request: ReportRequest, tell: Callable[[str], None]) -> None:
        self.request, self.began, self._tell = request, time.monotonic(), tell
        self.record: dict[str, Any] = {"format": FORMAT, "version": FORMAT_VERSION, "status": "running"}
        self.record |= {
            "quick": request.quick,
            "interpreter": request.interpreter,
            "emulated": request.emulate,
            "minutes": request.minutes,
        }
        self.record |= {"ceilings": {}, "checks": [], "proofs": [], "networks": {}, "failed": {}}

    def begin(self, gpu: dict[str, Any]) -> None:
        """Take the GPU's name for the files, and refuse to replace those of an earlier report."""
        stem = self.stem(gpu["name"])
        names = {"report": ".json", "tables": ".md", "tiles": ".tuned.json"}
        files = {role: self.request.out / f"{stem}{ending}" for role, ending in names.items()}
        check_outputs(files, overwrite=self.request.overwrite)
        self.record["gpu"] = gpu

    def stem(self, gpu: str) -> str:
        """Name of the report's files, without ending: the GPU's."""
        if self.request.interpreter:
            return "emulator" if self.request.emulate else "interpreter"
        return Path(table_name(gpu)).stem

    @property
    def path(self) -> Path:
        """The JSON file."""
        return self.request.out / f"{self.stem(self.record['gpu']['name'])}.json"

    def until(self, share: float = 1.0) -> float:
        """`time.monotonic` when a share of the time is over."""
        return self.began + share * (60 * self.request.minutes) - LAST_SECONDS

    def tell(self, text: str) -> None:
        """A line with the time that has passed."""
        self._tell(f"{time.monotonic() - self.began:6.1f} s  {text}")

    def save(self) -> None:
        """Write record, table and tuned tiles as they are now."""
        self.record["seconds"] = time.monotonic() - self.began
        _write(self.path, json.dumps(self.record, indent=1) + "\n")
        _write(self.path.with_suffix(".md"), markdown(self.record))
        tiles = tuned_table(self.record)
        if tiles["tiles"]:
            _write(self.path.with_suffix(".tuned.json"), json.dumps(tiles, indent=1, sort_keys=True) + "\n")


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def tuned_table(record: Mapping[str, Any]) -> dict[str, Any]:
    """The GPU's table of tiles, as `kaleido_kernels.tuned.read_tuned` takes it."""
    found = [entry for network in record["networks"].values() for entry in network.get("tuning", {}).values()]
    return {
        "format": "kaleido-fast tuned tiles",
        "device": record["gpu"]["name"],
        "triton": record["about"]["versions"]["triton"],
        "tiles": {entry["key"]: entry["best"] for entry in found},
    }


def make_report(
    request: ReportRequest, new_worker: Callable[[], Worker], tell: Callable[[str], None] = lambda text: None
) -> Report:
    """Measure everything that is asked for; a case that fails is recorded, and the rest goes on.

    Raises:
        InputError: not even the device could be looked at.
        KeyboardInterrupt: Ctrl-C; what was measured is written.
    """
    report = Report(request, tell)
    worker = new_worker()
    try:
        facts = _facts(report, worker)
        if "ceilings" in request.stages:
            _ceilings(report, worker)
        worker.close()  # its memory and context are free for other processes now
        proved = _proofs(report, facts, new_worker) if {"checks", "tuning"} & set(request.stages) else {}
        if NETWORK_STAGES & set(request.stages):
            _networks(report, worker, proved)
        report.record["status"] = "done"
    except KeyboardInterrupt:
        report.record["status"] = "interrupted"
        raise
    finally:
        worker.close()
        if "gpu" in report.record:
            report.save()
    return report


def _common(request: ReportRequest) -> ReportJob:
    return {
        "device": request.device,
        "quick": request.quick,
        "tiny": request.interpreter,
        "rounds": request.rounds,
    }


def _facts(report: Report, worker: Worker) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    job: FactsJob = {"kind": "facts", **_common(report.request), "networks": list(report.request.networks)}
    problem = worker.run(job, 120.0, facts.update)
    if problem:
        raise InputError(f"the GPU cannot be used: {problem}")
    report.begin(facts["gpu"])
    report.record["about"] = facts["about"]
    report.record["about"]["command"] = command_line(sys.argv)
    report.tell(f"{facts['gpu']['name']}: {', '.join(report.request.networks)}")
    report.save()
    return facts


def _ceilings(report: Report, worker: Worker) -> None:
    job: CeilingsJob = {"kind": "ceilings", **_common(report.request)}
    problem = worker.run(job, 90.0, report.record["ceilings"].update)
    if problem:
        report.record["failed"]["ceilings"] = problem
    for name, found in report.record["ceilings"].get("matrix", {}).items():
        report.tell(f"matrix product {name}: {found['flops_per_second'] / 1e12:.1f} TFLOP/s")
    report.save()


def _proofs(report: Report, facts: Mapping[str, Any], new_worker: Callable[[], Worker]) -> dict[str, Any]:
    """Check kernels, and prove tiles so that only those are timed that gave right states; in several processes."""
    request, common = report.request, _common(report.request)
    checks: list[CheckJob | ProveJob] = []
    tiles: list[CheckJob | ProveJob] = []
    for name, network in facts["networks"].items():
        for precision, kernels in network["kernels"].items():
            if "checks" in request.stages:
                checks += [
                    CheckJob(kind="check", **common, network=name, precision=precision, kernel=kernel)
                    for kernel in kernels
                ]
            if "tuning" in request.stages and precision != "bf16":  # which takes the tile of fp16
                found = network["tiles"][precision]
                found = found[:3] if request.quick or request.interpreter else found
                tiles += [
                    ProveJob(kind="prove", **common, network=name, precision=precision, tile=tile) for tile in found
                ]
    proved: dict[str, dict[str, list[Any]]] = {name: {} for name in request.networks}

    def finished(job: CheckJob | ProveJob, found: dict[str, Any], problem: str) -> None:
        entry: dict[str, Any] = {"network": job["network"], "precision": job["precision"]}
        if job["kind"] == "check":
            what = job["kernel"]
            report.record["checks"].append({**entry, "kernel": what, **found, "problem": problem})
        else:
            what = tile_from_json(job["tile"]).name
            report.record["proofs"].append({**entry, "tile": job["tile"], **found, "problem": problem})
            if not problem:
                proved[job["network"]].setdefault(job["precision"], []).append(job["tile"])
        report.tell(f"{job['kind']} {job['network']} {job['precision']} {what}: {problem or _right(found)}")
        report.save()

    n_workers = 1 if request.interpreter else min(WORKERS, os.cpu_count() or 1)
    share = PROOF_SHARE if NETWORK_STAGES & set(request.stages) else 1.0
    run_jobs([*checks, *tiles], [new_worker() for _ in range(n_workers)], report.until(share), finished)
    good = sum(not entry["problem"] for entry in report.record["checks"])
    report.tell(
        f"checks: {good} of {len(report.record['checks'])} right; tiles proved: {_count(proved)} of {len(tiles)}"
    )
    report.save()
    return proved


def _right(found: Mapping[str, Any]) -> str:
    """What a check or a proof found, in one line."""
    at = found["error_at"]
    place = f"after step {at['step']} (chain {at['chain']}, dim {at['dim']})"
    text = f"right; largest error {found['error']:.2g} {place}, relative {found['relative_error']:.2g}"
    if "jittered_error" in found:
        text += f", with jitter {found['jittered_error']:.2g}"
    return text + (f", same bits {found['same_bits_times']} times" if "same_bits_times" in found else "")


def _count(proved: Mapping[str, Mapping[str, list[Any]]]) -> int:
    return sum(len(tiles) for network in proved.values() for tiles in network.values())


def _networks(report: Report, worker: Worker, proved: Mapping[str, Any]) -> None:
    request, peers = report.request, _peers(report)
    for place, name in enumerate(request.networks):
        rest = sum(WEIGHTS.get(other, 1.0) for other in request.networks[place:])
        seconds = max(0.0, (report.until() - time.monotonic()) * WEIGHTS.get(name, 1.0) / rest)
        job: NetworkJob = {
            "kind": "network",
            **_common(request),
            "network": name,
            "n_chains": 60 if request.interpreter else 100_000,
            "seconds": seconds,
            "timing_seconds": 0.005 if request.interpreter else 0.02 if request.quick else 0.04,
            "tiles": proved.get(name, {}),
            "peers": peers,
            "tune": "tuning" in request.stages,
            "time": "timing" in request.stages,
            "keep": not request.interpreter,
            "known": {},
        }
        found: dict[str, Any] = {}
        problem = "not reached in time" if seconds < 1 else _network(report, worker, job, found)
        if problem:
            report.record["failed"][name] = problem
        report.tell(f"{name}: {problem or _headline(found)}")
        report.save()


def _network(report: Report, worker: Worker, job: NetworkJob, found: dict[str, Any]) -> str:
    """Measure a network; when a tile or a contestant costs the process, the rest goes on in another without it.

    Args:
        report, worker: as everywhere.
        job: with the time for all of it.
        found: gets what is known so far.

    Returns:
        Why it is not whole, or nothing.
    """
    until, lost = time.monotonic() + job["seconds"], set[str]()
    while True:
        left = until - time.monotonic()
        most = min(1.25 * left + 15, report.until() + LAST_SECONDS / 2 - time.monotonic())
        keep = partial(_keep, report, job["network"], found)
        problem = worker.run({**job, "seconds": left, "known": dict(found)}, most, keep)
        culprit = found.get("at_work", "")
        if not problem or not culprit:
            return problem
        found["failed"].setdefault(culprit, problem)
        if culprit in lost or until - time.monotonic() < LAST_RESTART:
            return problem
        lost.add(culprit)
        report.tell(f"{job['network']}, {culprit}: {problem}; the rest goes on in a new process")


def _keep(report: Report, name: str, found: dict[str, Any], value: dict[str, Any]) -> None:
    found.update(value)
    report.record["networks"][name] = found
    report.save()


def _headline(found: Mapping[str, Any]) -> str:
    timed = found.get("contestants", {})
    if "triton-fp16" not in timed:
        return f"{len(timed)} contestants timed"
    return f"{len(timed)} contestants timed; fp16 {timed['triton-fp16']['milliseconds']:.3g} ms"


def _peers(report: Report) -> list[str]:
    """Peers whose libraries are here; the others are named in the record. Quick runs leave out slow builds."""
    peers: list[str] = []
    skipped = report.record.setdefault("skipped", {})
    for name in REPORT_PEERS:
        missing = missing_modules(PEERS[name])
        if missing:
            skipped[name] = f"{' and '.join(missing)} not installed"
        elif (report.request.quick or report.request.interpreter) and not PEERS[name].in_quick:
            skipped[name] = "takes long to build: leave out --quick"
        else:
            peers.append(name)
    return peers
