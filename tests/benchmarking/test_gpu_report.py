"""The report of a GPU: its whole path with tiny networks in the interpreter, what fails, what is written. No speeds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("triton")

from kaleido_fast import InputError
from kaleido_fast.benchmarking import contest, tuning
from kaleido_fast.benchmarking.acceptance import measure_deviation
from kaleido_fast.benchmarking.cases import SIZES
from kaleido_fast.benchmarking.gpu import (
    checks,
    contestants,
    device,
    report,
    subjects,
    table,
    tiles,
    turns,
    work,
    workers,
)
from kaleido_fast.benchmarking.gpu.report import REPORT_PEERS, STAGES, ReportRequest, make_report
from kaleido_fast.benchmarking.gpu.workers import HereWorker, ProcessWorker, run_jobs
from kaleido_fast.benchmarking.peers import PEERS
from kaleido_fast.cli import gpu_report as command
from kaleido_kernels.tuned import read_tuned, tile_from_json

ROOT = Path(__file__).parents[2]
NETS = ("points2d",)
CPU = torch.device("cpu")


def request(out: Path, **options) -> ReportRequest:
    return ReportRequest("cpu", **{"networks": NETS, "quick": True, "out": out, "interpreter": True, **options})


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> report.Report:
    """A report of a network, made in this process; one kernel and one peer fail."""
    if torch.cuda.is_available():
        pytest.skip("for Triton's interpreter: kernels are compiled here")
    patch = pytest.MonkeyPatch()
    build, check = contestants.build_peer, checks.check_contestant

    def broken_peer(peer, setting):
        if peer.name == "chunked":
            raise RuntimeError("out of luck\nand a long traceback")
        return build(peer, setting)

    def broken_check(contestant, z0, expected, n_layers):
        if getattr(contestant.run, "options", {}).get("kernel") == "stream":
            expected = [*expected[:-1], expected[-1] + torch.tensor([0.0, 3.0])]
        return check(contestant, z0, expected, n_layers)

    patch.setattr(contestants, "build_peer", broken_peer)
    patch.setattr(checks, "check_contestant", broken_check)
    try:
        return make_report(request(tmp_path_factory.mktemp("report")), HereWorker)
    finally:
        patch.undo()


def test_every_network_is_tuned_and_timed_against_every_peer(whole):
    record = json.loads(whole.path.read_text())
    assert record["status"] == "done" and record["interpreter"]
    assert tuple(record["networks"]) == NETS
    assert record["ceilings"]["matrix"]["fp32"]["flops_per_second"] > 0
    assert record["ceilings"]["copy"]["memory"]["bytes_per_second"] > 0
    for found in record["networks"].values():
        timed = found["contestants"]
        peers = set(REPORT_PEERS) - set(record["skipped"]) - {"chunked"}
        assert set(timed) == {"triton-fp16", "triton-fp32", "fast_sample-fp16", *peers}
        assert set(found["tuning"]) == {"fp16", "fp32"}
        for entry in timed.values():
            assert len(entry["seconds"]) == whole.request.rounds and entry["p20"] <= entry["median"] <= entry["p80"]
            steps = found["n_chains"] * 300 / (entry["n_chains"] * entry["n_steps"])
            assert entry["milliseconds"] == pytest.approx(1e3 * entry["median"] * steps)


def test_what_fails_is_recorded_and_the_rest_goes_on(whole):
    record = whole.record
    wrong = [entry for entry in record["checks"] if entry["problem"]]
    assert {entry["kernel"] for entry in wrong} == {"stream"}
    assert {entry["kernel"] for entry in record["checks"] if not entry["problem"]} == {"narrow", "wide", "graph"}
    assert all(found["failed"]["chunked"] == "out of luck" for found in record["networks"].values())
    lines = "\n".join(table.failures(record))
    assert "points2d, chunked: out of luck" in lines and "differs from the reference by" in lines


def test_the_table_of_checks_shows_the_errors_of_what_failed_too(whole):
    text = whole.path.with_suffix(".md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| stream | fp16")]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3] == "0 of 1" and float(cells[4]) > 2
    assert cells[7].startswith("points2d: differs from the reference by 3") and "dim 1" in cells[7]
    (row,) = [line for line in text.splitlines() if line.startswith("| wide | fp16")]
    assert row.split("|")[3].strip() == "1 of 1" and row.split("|")[7].strip() == ""


def test_every_error_is_a_number_with_its_place(whole):
    entries = [*whole.record["checks"], *whole.record["proofs"]]
    entries += [timed for found in whole.record["networks"].values() for timed in found["contestants"].values()]
    assert len(entries) > 20
    for entry in entries:
        assert entry["error"] >= 0 and entry["relative_error"] >= 0
        assert entry["error_at"].keys() == {"step", "chain", "dim"} and entry["error_at"]["dim"] in (0, 1)


def test_checks_hold_errors_with_and_without_jitter_and_repeats(whole):
    for entry in [entry for entry in whole.record["checks"] if not entry["problem"]]:
        assert 0 <= entry["error"] < 1e-2 and 0 <= entry["jittered_error"] < 1e-2 and entry["same_bits_times"] >= 2


def test_only_tiles_that_gave_right_states_are_timed(whole):
    proved = {(p["network"], p["precision"], str(tile_from_json(p["tile"]))) for p in whole.record["proofs"]}
    assert not any(entry["problem"] for entry in whole.record["proofs"])
    for name, found in whole.record["networks"].items():
        for precision, entry in found["tuning"].items():
            for trial in entry["trials"]:
                assert (name, precision, str(tile_from_json(trial["tile"]))) in proved


def test_the_table_of_tiles_is_one_that_the_plan_reads(whole):
    path = whole.path.with_name("interpreter.tuned.json")
    tiles = read_tuned(path, whole.record["gpu"]["name"], whole.record["about"]["versions"]["triton"])
    assert len(tiles) == 2 * len(NETS)
    assert sorted(file.name for file in whole.path.parent.iterdir()) == [
        *("interpreter.json", "interpreter.md", "interpreter.tuned.json")
    ]


def test_the_table_for_people_names_everything_and_says_what_it_is(whole):
    text = whole.path.with_suffix(".md").read_text()
    for words in ("no speed means anything", "x best torch", "`points2d`", "published", "## Tiles", "cudagraph-fp16"):
        assert words in text, words
    assert "Traceback" not in text


def test_ratios_are_per_chain_and_step_and_of_peers_with_as_many_bits():
    ours = {"kind": "kernel", "precision": "bf16", "n_chains": 100, "n_steps": 300, "seconds": [1.0] * 3}
    ours["milliseconds"] = 1000.0
    fp16 = {**ours, "kind": "peer", "precision": "fp16", "n_steps": 30, "seconds": [0.5] * 3, "milliseconds": 5000.0}
    fp32 = {**ours, "kind": "peer", "precision": "fp32", "milliseconds": 2000.0}
    timed = {"ours": ours, "eager-fp16": fp16, "eager": fp32, "published": {**fp16, "milliseconds": 1.0}}
    assert table.best_torch(timed, "bf16") == "eager-fp16" and table.best_torch(timed, "fp32") == "eager"
    assert table.ratio(ours, fp16).value == pytest.approx(5.0)


@pytest.mark.interpreter
def test_stages_and_networks_narrow_it(tmp_path):
    made = make_report(request(tmp_path, networks=("points1d",), stages=("ceilings",)), HereWorker)
    assert made.record["networks"] == {} and made.record["checks"] == [] and made.record["ceilings"]["matrix"]


def test_a_device_that_cannot_be_looked_at_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(InputError, match="the GPU cannot be used"):
        make_report(request(tmp_path, networks=("points9d",)), HereWorker)
    assert list(tmp_path.iterdir()) == []


def planned(monkeypatch, folder: Path, *stages: str, networks=report.WORTH) -> dict:
    """What checks and proofs of a request would be, and until when, without doing them."""
    seen: dict = {}

    def instead(jobs, workers, until, finished, seconds=150.0):
        seen.update(jobs=jobs, until=until)

    monkeypatch.setattr(report, "run_jobs", instead)
    monkeypatch.setattr(report, "_networks", lambda *arguments: None)
    made = make_report(request(folder, networks=networks, stages=stages, minutes=3.0, overwrite=True), HereWorker)
    return {**seen, "seconds": seen["until"] - made.began}


@pytest.mark.interpreter
def test_checks_take_all_the_time_where_nothing_follows_and_a_share_where_something_does(monkeypatch, tmp_path):
    assert planned(monkeypatch, tmp_path, "checks")["seconds"] == pytest.approx(170)
    assert planned(monkeypatch, tmp_path, "ceilings", "checks")["seconds"] == pytest.approx(170)
    for stages in (("checks", "timing"), ("tuning",), STAGES):
        assert planned(monkeypatch, tmp_path, *stages)["seconds"] == pytest.approx(0.35 * 180 - 10)


@pytest.mark.interpreter
def test_work_is_done_in_the_order_of_its_worth_and_shown_from_small_to_large(monkeypatch, tmp_path, whole):
    assert sorted(report.WORTH) == sorted(SIZES) and report.WORTH[:2] == ("mnist", "digits")
    assert ReportRequest("cpu").networks == report.WORTH
    jobs = planned(monkeypatch, tmp_path, "checks", "tuning")["jobs"]
    for kind in ("check", "prove"):
        order = list(dict.fromkeys(job["network"] for job in jobs if job["kind"] == kind))
        assert order == list(report.WORTH), f"{kind}: {order}"
    assert command._request(("points1d,mnist", "digits"), 1, True, "cpu", tmp_path).networks == (
        *("mnist", "digits", "points1d"),
    )
    found = whole.record["networks"]["points2d"]
    text = table.speed_table({**whole.record, "networks": {"mnist": found, "points1d": found}})
    assert text.index("`points1d`") < text.index("`mnist`")


class Reading(HereWorker):
    """Reads what is on disk when a job begins."""

    def __init__(self, path: Path, seen: list) -> None:
        self.path, self.seen = path, seen

    def run(self, job, seconds, emit):
        if job["kind"] == "check":
            self.seen.append(len(json.loads(self.path.read_text())["checks"]))
        return super().run(job, seconds, emit)


@pytest.mark.interpreter
def test_checks_are_on_disk_as_they_finish_and_good_ones_are_told(tmp_path):
    seen: list[int] = []
    told: list[str] = []
    made = make_report(
        request(tmp_path, networks=("points1d",), stages=("checks",)),
        lambda: Reading(tmp_path / "interpreter.json", seen),
        told.append,
    )
    assert seen == list(range(len(made.record["checks"]))) and len(seen) > 5
    good = [line for line in told if "right; largest error" in line]
    assert len(good) == len(seen) and not [entry for entry in made.record["checks"] if entry["problem"]]
    assert any("check points1d fp16 narrow" in line and "same bits 2 times" in line for line in good), good
    assert all("after step" in line and "chain" in line and "relative" in line for line in good)


class Interrupting(HereWorker):
    def run(self, job, seconds, emit):
        if job["kind"] == "network":
            raise KeyboardInterrupt
        return super().run(job, seconds, emit)


@pytest.mark.interpreter
def test_ctrl_c_keeps_what_was_measured(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_report(request(tmp_path, stages=("ceilings", "timing")), Interrupting)
    record = json.loads((tmp_path / "interpreter.json").read_text())
    assert record["status"] == "interrupted" and record["ceilings"]["matrix"]


class Counting(HereWorker):
    """Does no network, and keeps the order of its jobs and of the ends of its process."""

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def run(self, job, seconds, emit):
        self.seen.append(job.get("network", job["kind"]))
        return super().run(job, seconds, emit) if job["kind"] == "facts" else ""

    def close(self) -> None:
        self.seen.append("end")


def test_networks_share_a_process_as_long_as_nothing_fails_in_it(tmp_path):
    seen: list[str] = []
    make_report(request(tmp_path, networks=report.WORTH, stages=("timing",)), lambda: Counting(seen))
    assert seen == ["facts", "end", *report.WORTH, "end"]


def travelled(value):
    """As it arrives from another process."""
    return json.loads(json.dumps(value))


class KilledError(BaseException):
    """Ends a process; nothing in it can catch that."""


class Replacing(HereWorker):
    """A process that a fault takes the GPU from, or that dies; after any problem another one does the next job."""

    def __init__(self, fault: dict) -> None:
        self.fault = fault
        self.known: list = []

    def run(self, job, seconds, emit):
        self.known.append(travelled(job.get("known")))
        try:
            problem = super().run(travelled(job), seconds, lambda value: emit(travelled(value)))
        except KilledError:
            problem = "the process ended with status -11"
        if problem:
            self.fault["lost"] = False
        return problem


@pytest.fixture
def sticky(monkeypatch):
    """A fault that makes everything fail in its process from then on: {"lost": whether it has happened there}."""
    fault = {"lost": False}
    measure, check, build = tiles.engine_measure, contestants.check_contestant, contestants.build_peer

    def touch(culprit: bool) -> None:
        fault["lost"] = fault["lost"] or culprit
        if fault["lost"]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ...")

    def broken_measure(model, precision, *rest):
        measured = measure(model, precision, *rest)

        def tile_measure(tile):
            touch(tile == fault.get("tile") and precision == fault["precision"])
            return measured(tile)

        return tile_measure

    def broken_build(peer, setting):
        if peer.name == fault.get("killer"):
            raise KilledError
        touch(peer.name == fault.get("peer"))
        return build(PEERS["eager"] if peer.module == "compile" else peer, setting)

    def broken_check(*arguments):
        touch(False)
        return check(*arguments)

    for module in (work, tuning):
        monkeypatch.setattr(module, "device_answers", lambda device: not fault["lost"])
    monkeypatch.setattr(tiles, "engine_measure", broken_measure)
    monkeypatch.setattr(contestants, "build_peer", broken_build)
    monkeypatch.setattr(contestants, "check_contestant", broken_check)
    return fault


OURS = {"triton-fp16", "triton-fp32", "fast_sample-fp16"}


@pytest.mark.interpreter
def test_a_tile_that_takes_the_gpu_from_its_process_costs_itself_alone(monkeypatch, tmp_path, sticky):
    facts: dict = {}
    device.facts_of({"device": "cpu", "networks": ["points1d"], "tiny": True}, facts.update)
    tile = facts["networks"]["points1d"]["tiles"]["fp16"][1]
    sticky |= {"tile": tile_from_json(tile), "precision": "fp16"}
    monkeypatch.setattr(report, "_peers", lambda report: ["eager"])
    told: list[str] = []
    workers: list[Replacing] = []

    def new_worker():
        workers.append(Replacing(sticky))
        return workers[-1]

    made = make_report(request(tmp_path, networks=("points1d",), stages=("tuning", "timing")), new_worker, told.append)
    found = made.record["networks"]["points1d"]
    assert made.record["status"] == "done" and not made.record["failed"]
    assert set(found["contestants"]) == {*OURS, "eager"} and set(found["tuning"]) == {"fp16", "fp32"}
    problems = {json.dumps(trial["tile"]): trial["problem"] for trial in found["tuning"]["fp16"]["trials"]}
    assert [key for key, problem in problems.items() if problem] == [json.dumps(tile)]
    assert problems[json.dumps(tile)] == "CUDA error: an illegal memory access was encountered"
    assert len(found["failed"]) == 1 and found["at_work"] == ""
    assert any("the rest goes on in a new process" in line for line in told)
    before = workers[0].known[-1]["trials"]
    assert list(before.values()) == [found["tuning"]["fp16"]["trials"][0]["seconds_per_step"]]


@pytest.mark.interpreter
def test_a_peer_that_takes_the_gpu_or_the_process_costs_itself_alone(monkeypatch, tmp_path, sticky):
    sticky |= {"peer": "eager", "killer": "chunked"}
    monkeypatch.setattr(report, "_peers", lambda report: ["published", "eager", "chunked"])
    made = make_report(request(tmp_path, networks=("points1d",), stages=("timing",)), lambda: Replacing(sticky))
    (found,) = made.record["networks"].values()
    assert set(found["contestants"]) == {*OURS, "published"}
    assert found["failed"] == {
        "eager": "CUDA error: an illegal memory access was encountered",
        "chunked": "the process ended with status -11",
    }
    assert not made.record["failed"]


@pytest.mark.interpreter
def test_what_is_quick_to_build_is_timed_and_written_before_what_is_slow(monkeypatch, tmp_path, sticky):
    """A compiler that never comes back loses itself: the network's time is over, and all others have their timings."""
    monkeypatch.setattr(report, "_peers", lambda report: ["compile", "eager", "compile-fp16"])
    built = contestants.build_peer
    on_disk = {}

    def build(peer, setting):
        if peer.module == "compile":
            (found,) = json.loads((tmp_path / "interpreter.json").read_text())["networks"].values()
            on_disk[peer.name] = {name: timed["seconds"] for name, timed in found["contestants"].items()}
        return built(peer, setting)

    monkeypatch.setattr(contestants, "build_peer", build)
    sticky["killer"] = "compile"
    made = make_report(request(tmp_path, networks=("points1d",), stages=("timing",)), lambda: Replacing(sticky))
    (found,) = made.record["networks"].values()
    assert set(on_disk["compile"]) == {*OURS, "eager"}, "nothing was written before the slow peer was built"
    assert set(found["contestants"]) == {*OURS, "eager", "compile-fp16"}
    assert found["failed"] == {"compile": "the process ended with status -11"}
    for name, seconds in on_disk["compile"].items():
        assert found["contestants"][name]["seconds"] == seconds, f"{name} was timed again"


class Failing(HereWorker):
    """Gives a part of a network and fails."""

    def run(self, job, seconds, emit):
        return "the process ended with status -11" if job["kind"] == "network" else super().run(job, seconds, emit)


@pytest.mark.interpreter
def test_a_network_that_crashes_is_recorded(tmp_path):
    made = make_report(request(tmp_path, stages=("timing",)), Failing)
    assert made.record["failed"] == dict.fromkeys(NETS, "the process ended with status -11")
    assert made.record["status"] == "done"


def entry(seconds: float, kind: str = "peer") -> contestants.Entry:
    return contestants.Entry(None, kind, "", torch.zeros(1, 1), None, 0.0, 1, seconds)  # type: ignore[arg-type]


def work_on(record: dict, **job) -> work.Work:
    job = {"rounds": 20, "seconds": 10.0, **job}
    return work.Work(job, None, CPU, None, time.monotonic(), record, lambda value: None)  # type: ignore[arg-type]


def test_the_slowest_peers_are_left_out_until_all_rounds_fit():
    record: dict = {"failed": {}}
    entries = {"ours": entry(0.3, "kernel"), "slow": entry(5.0), "slower": entry(7.0), "fast": entry(0.01)}
    turns.keep_within(work_on(record), entries, 10.0)
    assert set(entries) == {"ours", "fast"} and set(record["failed"]) == {"slow", "slower"}
    assert "no time was left for 20 timings" in record["failed"]["slow"]
    turns.keep_within(work_on(record), entries, 0.1)
    assert set(entries) == {"ours"}, "ours is timed whatever it takes, its peers only if there is time"


def test_a_contestant_that_fails_in_its_turn_costs_itself_alone():
    record: dict = {"failed": {}, "contestants": {}}
    model = subjects.report_network("points2d", tiny=True)
    z0 = contest.start_states(model, 5, CPU)
    count = iter(range(100))

    def fails_later(z0, n_steps):
        if next(count) == 1:
            raise RuntimeError("out of memory\nby far")
        return z0

    found = measure_deviation(z0, z0, 1)
    entries = {
        name: contestants.Entry(contest.Contestant(run), "peer", "", z0, found, 0.0)
        for name, run in (("a", lambda z0, n: z0), ("late", fails_later), ("b", lambda z0, n: z0))
    }
    at_work = work_on(record, rounds=3)
    at_work.job["n_chains"], at_work.model = 5, model
    turns.time_in_turns(at_work, entries)
    assert record["failed"] == {"late": "out of memory"} and set(record["contestants"]) == {"a", "b"}
    assert all(len(timed["seconds"]) == 3 for timed in record["contestants"].values())


def test_different_bits_of_the_same_work_are_found():
    count = iter(range(100))

    def unstable(z0, steps):
        return z0 + (next(count) == 2)

    with pytest.raises(InputError, match="run 3 of the same work differs from the first in 4 of 4 chains"):
        checks.repeated(unstable, torch.zeros(4, 2), 1, 5)


FAKE_WORKER = """
import json, os, subprocess, sys, time
lost = False
for line in sys.stdin:
    job = json.loads(line)
    print(json.dumps({"value": {"seen": job["name"]}}), flush=True)
    if job["name"] == "crash":
        print("the last words", file=sys.stderr, flush=True)
        os._exit(7)
    if job["name"] == "half":
        os.write(1, b'{"end": "a line that nev')
        os._exit(9)
    if job["name"] == "list":
        print("[1]", flush=True)
    if job["name"] == "compile":
        compiler = subprocess.Popen(["sleep", "600"])
        print(json.dumps({"value": {"seen": compiler.pid}}), flush=True)
        time.sleep(600)
    if job["name"] == "hang":
        if "pids" in job:
            with open(job["pids"], "a") as pids:
                pids.write(f"{os.getpid()}\\n")
        time.sleep(600)
    lost = lost or job["name"] == "illegal access"
    problem = "CUDA error" if lost else "bad" if job["name"] == "fails" else ""
    print(json.dumps({"end": problem}), flush=True)
"""


@pytest.fixture
def fake_workers(monkeypatch):
    popen = subprocess.Popen
    monkeypatch.setattr(
        workers.subprocess, "Popen", lambda args, **more: popen([sys.executable, "-c", FAKE_WORKER], **more)
    )
    return [ProcessWorker({}), ProcessWorker({})]


def test_a_job_that_crashes_or_hangs_costs_itself_alone(fake_workers):
    told = {}
    names = ["a", "crash", "b", "hang", "fails", "c"]
    run_jobs(
        [{"name": name} for name in names],
        fake_workers,
        time.monotonic() + 30,
        lambda job, found, problem: told.update({job["name"]: (found.get("seen"), problem)}),
        seconds=1.0,
    )
    assert told["crash"] == ("crash", "the process ended with status 7: the last words")
    assert told["hang"] == ("hang", "stopped after 1 s")
    assert told["fails"] == ("fails", "bad")
    assert all(told[name] == (name, "") for name in "abc")
    assert all(worker._started is None for worker in fake_workers)


def test_a_process_that_an_error_of_cuda_has_ruined_does_no_further_job(fake_workers):
    told = {}
    names = ["a", "illegal access", "b", "c", "d"]
    run_jobs(
        [{"name": name} for name in names],
        fake_workers[:1],
        time.monotonic() + 60,
        lambda job, found, problem: told.update({job["name"]: problem}),
    )
    assert told == {**dict.fromkeys(names, ""), "illegal access": "CUDA error"}


def is_alive(pid: int) -> bool:
    """Whether a process runs: one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float = 60.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


def test_an_answer_that_cannot_be_read_is_a_crash(fake_workers, monkeypatch):
    monkeypatch.setattr(workers, "END_SECONDS", 0.5)
    told = {}
    names = ["half", "a", "list", "b"]
    run_jobs(
        [{"name": name} for name in names],
        fake_workers[:1],
        time.monotonic() + 60,
        lambda job, found, problem: told.update({job["name"]: problem}),
    )
    problems = {"half": "the process ended with status 9", "list": "the process gave no answer that can be read"}
    assert told == {**dict.fromkeys(names, ""), **problems}


@pytest.mark.parametrize("problem", [BrokenPipeError, KeyboardInterrupt])
def test_what_telling_raises_reaches_the_caller_and_ends_all_work(fake_workers, problem):
    told = []

    def finished(job, found, trouble):
        told.append(job["name"])
        if len(told) == 3:
            raise problem("nobody reads")

    with pytest.raises(problem, match="nobody reads"):
        run_jobs([{"name": f"{n}"} for n in range(50)], fake_workers, time.monotonic() + 60, finished)
    assert len(told) == 3
    assert all(worker._started is None for worker in fake_workers)


def test_what_a_worker_raises_reaches_the_caller():
    class Broken(HereWorker):
        def run(self, job, seconds, emit):
            raise ZeroDivisionError("a mistake")

    with pytest.raises(ZeroDivisionError, match="a mistake"):
        run_jobs([{"name": "a"}], [Broken()], time.monotonic() + 60, lambda job, found, problem: None)


def test_compilers_end_with_the_process_that_started_them(fake_workers):
    found: dict[str, int] = {}
    problem = fake_workers[0].run({"name": "compile"}, 5.0, found.update)
    assert problem == "stopped after 5 s" and isinstance(found["seen"], int)
    assert wait_until(lambda: not is_alive(found["seen"]))


def test_a_process_that_does_not_end_is_left(fake_workers, monkeypatch):
    """As one that waits inside the driver: no signal reaches it."""
    worker = fake_workers[0]
    assert worker.run({"name": "a"}, 60.0, lambda value: None) == ""
    process = worker._started.process
    monkeypatch.setattr(workers, "END_SECONDS", 0.2)
    closing = threading.Thread(target=worker.close, daemon=True)
    with monkeypatch.context() as patch:
        patch.setattr(workers.os, "killpg", lambda *args: None)
        patch.setattr(process, "kill", lambda: None)
        closing.start()
        closing.join(30.0)
    assert (
        not closing.is_alive() and worker._started is None and worker.run({"name": "b"}, 60.0, lambda value: None) == ""
    )
    worker.close()
    process.kill()
    process.wait()


INTERRUPTED = f"""
import subprocess, sys, time
from kaleido_fast.benchmarking.gpu import workers
popen = subprocess.Popen
workers.subprocess.Popen = lambda args, **more: popen([sys.executable, "-c", {FAKE_WORKER!r}], **more)
jobs = [{{"name": "hang", "pids": sys.argv[1]}}] * 40
told = lambda job, found, problem: print("told", problem, flush=True)
try:
    workers.run_jobs(jobs, [workers.ProcessWorker({{}}) for _ in range(4)], time.monotonic() + 600, told, 300.0)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_after_ctrl_c_no_job_is_begun_or_told_and_no_process_stays(tmp_path):
    pids = tmp_path / "pids"
    pids.touch()
    parent = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(pids)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert wait_until(lambda: pids.read_text().count("\n") == 4)
    parent.send_signal(signal.SIGINT)
    out, errors = parent.communicate(timeout=60)
    children = [int(pid) for pid in pids.read_text().split()]
    left = [pid for pid in children if is_alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert (parent.returncode, out, errors) == (130, "", "")
    assert not left and len(children) == 4


ALONE = """
import sys, time
from kaleido_fast.benchmarking.gpu import workers

def hang(job, emit):
    emit({"seen": "job"})
    time.sleep(600)

workers.attempt = hang
workers.main("run")
"""


def test_a_worker_whose_parent_is_gone_ends_in_the_middle_of_a_job():
    process = subprocess.Popen(
        [sys.executable, "-c", ALONE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("{}\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline()) == {"value": {"seen": "job"}}
    process.stdin.close()  # as the system does when its parent ends
    assert process.wait(timeout=60) == -signal.SIGKILL
    process.stdout.close()


def test_jobs_after_the_time_are_not_begun(fake_workers):
    told = []
    run_jobs([{"name": "a"}], fake_workers, time.monotonic() - 1, lambda job, found, problem: told.append(problem))
    assert told == ["not reached in time"]


def invoke(*options: str):
    return CliRunner().invoke(command.command, list(options))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--only", "mnisst"], "did you mean 'mnist'"),
        (["--only", " , "], "names nothing"),
        (["--quick", "--minutes", "nan"], "no number of minutes"),
        (["--device", "cuda:99"], "this machine has"),
        (["--quick", "--out", "a file/folder"], "cannot be made: Not a directory"),
        (["--quick", "--only", "mnisst", "--out", "new"], "did you mean 'mnist'"),
        (["--from", "no.json"], None),
        (["--readme", "no.md"], "is not a file"),
    ],
)
def test_bad_input_is_refused_in_one_line(options, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a file").write_text("")
    if text is None:
        Path("README.md").write_text(f"{command.BEGIN}\n{command.END}")
        options, text = [*options, "--readme", "README.md"], "cannot be read"
    elif "--out" not in options:
        options = [*options, "--out", "new"]
    result = invoke(*options)
    assert isinstance(result.exception, InputError) and text in str(result.exception)
    assert "\n" not in str(result.exception) and not Path("new").exists()


def test_the_folder_of_the_report_is_made(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "_measure", lambda request: request.out / "GPU.json")
    assert invoke("--quick", "--device", "cpu", "--out", str(tmp_path / "some" / "folder")).exception is None
    assert (tmp_path / "some" / "folder").is_dir() and not list((tmp_path / "some" / "folder").iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_the_path_can_be_tried_and_no_readme_is_written(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"{command.BEGIN}\nnot yet\n{command.END}")
    for options, text in (
        (["--minutes", "1"], "--quick tries"),
        (["--quick", "--readme", str(readme)], "hold no speed"),
    ):
        result = invoke(*options, "--out", str(tmp_path))
        assert isinstance(result.exception, InputError) and text in str(result.exception)
    assert "not yet" in readme.read_text()


def test_a_readme_is_made_from_a_report_that_was_kept(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text(f"before\n{command.BEGIN}\nold\n{command.END}\nafter\n")
    Path("tried.json").write_text(whole.path.read_text())
    result = invoke("--from", "tried.json", "--readme", "README.md")
    assert isinstance(result.exception, InputError) and "holds no timings of a GPU" in str(result.exception)
    Path("GPU.json").write_text(json.dumps({**whole.record, "interpreter": False}))
    assert invoke("--from", "GPU.json", "--readme", "README.md").exception is None
    text = Path("README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "[GPU.md](GPU.md)" in text and "`points2d`" in text
    Path("broken.json").write_text("{")
    result = invoke("--from", "broken.json", "--readme", "README.md")
    assert isinstance(result.exception, InputError) and "is not a GPU's report" in str(result.exception)


def test_the_readme_has_a_place_for_it():
    text = (ROOT / "README.md").read_text()
    assert text.count(command.BEGIN) == text.count(command.END) == 1


def test_names_are_known():
    assert set(REPORT_PEERS) <= PEERS.keys() and {"ceilings", "checks", "tuning", "timing"} == set(STAGES)


def run_script(*options: str, timeout: int, **more) -> subprocess.CompletedProcess:
    """The script as from a plain checkout: isolated from what is installed of the package."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    command_line = [sys.executable, str(ROOT / "benchmarks" / "gpu_report.py"), *options]
    return subprocess.run(command_line, env=env, capture_output=True, text=True, timeout=timeout, **more)


def test_the_script_ends_bad_input_with_one_line_and_status_2(tmp_path):
    result = run_script("--only", "mnisst", "--quick", "--out", str(tmp_path), timeout=60)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "did you mean 'mnist'" in result.stderr


@pytest.mark.slow
@pytest.mark.interpreter
def test_the_script_runs_to_its_end_in_the_interpreter_from_any_folder(tmp_path):
    result = run_script("--quick", "--out", str(tmp_path), timeout=900, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    record = json.loads((tmp_path / "interpreter.json").read_text())
    assert record["status"] == "done" and len(record["networks"]) == 6 and not record["failed"]
    assert not [entry for entry in record["checks"] if entry["problem"]]
    assert all("triton-fp16" in found["contestants"] for found in record["networks"].values())


@pytest.mark.gpu
def test_a_quick_report_of_this_gpu(tmp_path):
    result = run_script("--quick", "--only", "points2d", "--minutes", "3", "--out", str(tmp_path), timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    (path,) = [path for path in tmp_path.glob("*.json") if ".tuned." not in path.name]
    record = json.loads(path.read_text())
    assert not record["interpreter"] and record["networks"]["points2d"]["contestants"]["triton-fp16"]["error"] < 1e-2
