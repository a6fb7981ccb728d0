"""The report of a GPU: its whole path with tiny networks in the interpreter, what fails, what is written. No speeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from gpu_reports import NETS, request

from kaleido_fast import InputError
from kaleido_fast.benchmarking.cases import SIZES
from kaleido_fast.benchmarking.gpu import report, table
from kaleido_fast.benchmarking.gpu.report import REPORT_PEERS, STAGES, ReportRequest, make_report
from kaleido_fast.benchmarking.gpu.workers import HereWorker
from kaleido_fast.benchmarking.peers import PEERS
from kaleido_fast.cli import gpu_report as command
from kaleido_kernels.tuned import read_tuned, tile_from_json


def test_every_network_is_tuned_and_timed_against_every_peer(gpu_report):
    record = json.loads(gpu_report.path.read_text())
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
            assert (
                len(entry["seconds"]) == gpu_report.request.rounds and entry["p20"] <= entry["median"] <= entry["p80"]
            )
            steps = found["n_chains"] * 300 / (entry["n_chains"] * entry["n_steps"])
            if entry["kind"] == "public":
                assert "milliseconds" not in entry, "a call's own cost would be multiplied"
            else:
                assert entry["milliseconds"] == pytest.approx(1e3 * entry["median"] * steps)


def test_what_fails_is_recorded_and_the_rest_goes_on(gpu_report):
    record = gpu_report.record
    wrong = [entry for entry in record["checks"] if entry["problem"]]
    assert {entry["kernel"] for entry in wrong} == {"stream"}
    assert {entry["kernel"] for entry in record["checks"] if not entry["problem"]} == {"narrow", "wide", "graph"}
    assert all(found["failed"]["chunked"] == "out of luck" for found in record["networks"].values())
    lines = "\n".join(table.failures(record))
    assert "points2d, chunked: out of luck" in lines and "differs from the reference by" in lines


def test_every_error_is_a_number_with_its_place(gpu_report):
    entries = [*gpu_report.record["checks"], *gpu_report.record["proofs"]]
    entries += [timed for found in gpu_report.record["networks"].values() for timed in found["contestants"].values()]
    assert len(entries) > 20
    for entry in entries:
        assert entry["error"] >= 0 and entry["relative_error"] >= 0
        assert entry["error_at"].keys() == {"step", "chain", "dim"} and entry["error_at"]["dim"] in (0, 1)


def test_checks_hold_errors_with_and_without_jitter_and_repeats(gpu_report):
    for entry in [entry for entry in gpu_report.record["checks"] if not entry["problem"]]:
        assert 0 <= entry["error"] < 1e-2 and 0 <= entry["jittered_error"] < 1e-2 and entry["same_bits_times"] >= 2


def test_only_tiles_that_gave_right_states_are_timed(gpu_report):
    proved = {(p["network"], p["precision"], str(tile_from_json(p["tile"]))) for p in gpu_report.record["proofs"]}
    assert not any(entry["problem"] for entry in gpu_report.record["proofs"])
    for name, found in gpu_report.record["networks"].items():
        for precision, entry in found["tuning"].items():
            for trial in entry["trials"]:
                assert (name, precision, str(tile_from_json(trial["tile"]))) in proved


def test_the_table_of_tiles_is_one_that_the_plan_reads(gpu_report):
    path = gpu_report.path.with_name("interpreter.tuned.json")
    tiles = read_tuned(path, gpu_report.record["gpu"]["name"], gpu_report.record["about"]["versions"]["triton"])
    assert len(tiles) == 2 * len(NETS)
    assert sorted(file.name for file in gpu_report.path.parent.iterdir()) == [
        *("interpreter.json", "interpreter.md", "interpreter.tuned.json")
    ]


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
def test_work_is_done_in_the_order_of_its_worth_and_shown_from_small_to_large(monkeypatch, tmp_path, gpu_report):
    assert sorted(report.WORTH) == sorted(SIZES) and report.WORTH[:2] == ("mnist", "digits")
    assert ReportRequest("cpu").networks == report.WORTH
    jobs = planned(monkeypatch, tmp_path, "checks", "tuning")["jobs"]
    for kind in ("check", "prove"):
        order = list(dict.fromkeys(job["network"] for job in jobs if job["kind"] == kind))
        assert order == list(report.WORTH), f"{kind}: {order}"
    assert command._request(("points1d,mnist", "digits"), 1, True, "cpu", tmp_path).networks == (
        *("mnist", "digits", "points1d"),
    )
    found = gpu_report.record["networks"]["points2d"]
    text = table.speed_table({**gpu_report.record, "networks": {"mnist": found, "points1d": found}})
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


class Failing(HereWorker):
    """Gives a part of a network and fails."""

    def run(self, job, seconds, emit):
        return "the process ended with status -11" if job["kind"] == "network" else super().run(job, seconds, emit)


@pytest.mark.interpreter
def test_a_network_that_crashes_is_recorded(tmp_path):
    made = make_report(request(tmp_path, stages=("timing",)), Failing)
    assert made.record["failed"] == dict.fromkeys(NETS, "the process ended with status -11")
    assert made.record["status"] == "done"


def test_names_are_known():
    assert set(REPORT_PEERS) <= PEERS.keys() and {"ceilings", "checks", "tuning", "timing"} == set(STAGES)
