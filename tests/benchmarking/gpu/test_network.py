"""One network of the report of a GPU: what takes the GPU or the process costs itself alone."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from gpu_reports import request

from kaleido_fast.benchmarking import tuning
from kaleido_fast.benchmarking.gpu import contestants, device, report, tiles, work
from kaleido_fast.benchmarking.gpu.report import make_report
from kaleido_fast.benchmarking.gpu.workers import HereWorker
from kaleido_fast.benchmarking.peers import PEERS
from kaleido_kernels.tuned import tile_from_json


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
