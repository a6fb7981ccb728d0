"""A run of benchmarks: what it times, what it leaves out and what it keeps. No speed is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import call
from small_bench import SMALL, small_request

from kaleido_fast.benchmarking import cases, cold, contest, report, runner
from kaleido_fast.benchmarking.cases import BenchNetwork
from kaleido_fast.benchmarking.faults import DeviceLostError
from kaleido_fast.benchmarking.peers import build_peer
from kaleido_fast.errors import InputError


def test_a_run_times_everybody_and_its_record_holds_every_raw_timing(small_report):
    record = json.loads(json.dumps(report.as_record(small_report)))
    assert [entry["network"] for entry in record["results"]] == ["points1d", "points2d"]
    assert {"date", "command", "commit", "dirty", "machine", "versions", "quick"} <= record.keys()
    assert {"cpu", "cores", "threads", "system", "load_average"} <= record["machine"].keys()
    for entry in record["results"]:
        assert set(entry["contestants"]) == {"reference", "eager", "chunked"}
        assert len(entry["ceiling"]["seconds"]) == 3
        for contestant in entry["contestants"].values():
            seconds = contestant["seconds"]
            assert len(seconds) == 3
            speed = entry["n_chains"] * entry["n_steps"] / sorted(seconds)[1]
            assert contestant["chain_steps_per_second"]["median"] == pytest.approx(speed)
            assert contestant["flops_per_second"] == pytest.approx(speed * entry["flops_per_step"])
        assert entry["ratios"]["reference"].keys() == {"eager", "chunked"}
        assert entry["skipped"] == {"jax": "jax not installed"}


def test_progress_only_moves_forward_and_ends_at_one():
    shares: list[float] = []
    runner.run_bench(small_request(), lambda share, text: shares.append(share))
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_wrong_or_failing_peer_is_not_timed_and_says_why(monkeypatch):
    def build(peer, setting):
        if peer.name == "eager":
            return contest.Contestant(lambda z0, n: z0 * 0.5)
        raise RuntimeError("no compiler\nlong traceback")

    monkeypatch.setattr(runner, "build_peer", build)
    (result,) = runner.run_bench(small_request()).results
    assert result.peers == []
    assert "differs from the reference" in result.skipped["eager"]
    assert result.skipped["chunked"] == "no compiler"


def failing_peer(monkeypatch, answers: bool) -> None:
    """Peer eager fails on points2d; whether the device ``answers`` after that."""
    failed = []

    def build(peer, setting):
        if peer.name == "eager" and setting.model.spec == cases.network_spec("points2d"):
            failed.append(peer.name)
            raise RuntimeError("CUDA error: an illegal memory access\nlong traceback")
        return build_peer(peer, setting)

    monkeypatch.setattr(runner, "build_peer", build)
    monkeypatch.setattr(runner, "device_answers", lambda device: answers or not failed)


def test_a_lost_device_ends_the_run_and_what_was_measured_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    failing_peer(monkeypatch, answers=False)
    Path("README.md").write_text(f"{report.BEGIN}\nolder\n{report.END}\n")
    nets = ("--net", "points1d,points2d", "--peers", "eager,chunked", "--json", "bench.json")
    files = ("--readme", "README.md", "--picture", "bars.png")
    status, output, errors = call(monkeypatch, capsys, "bench", *SMALL, *nets, *files)
    assert status == 2
    assert "points1d" in output
    assert errors.count("\n") == 1
    assert "eager: CUDA error: an illegal memory access" in errors
    assert "points2d not measured, README.md left as it is, bars.png left as it is" in errors
    record = json.loads(Path("bench.json").read_text())
    assert [entry["network"] for entry in record["results"]] == ["points1d"]
    assert (record["unmeasured"], "takes no more work" in record["lost"]) == (["points2d"], True)
    assert "older" in Path("README.md").read_text()
    assert not Path("bars.png").exists()


def test_a_device_lost_before_anything_was_measured_is_an_error(monkeypatch):
    failing_peer(monkeypatch, answers=False)
    networks = [BenchNetwork("points2d", network="points2d"), BenchNetwork("points1d", network="points1d")]
    with pytest.raises(DeviceLostError, match="eager: CUDA error"):
        runner.run_bench(small_request(networks=networks))


def test_a_peer_that_fails_on_a_device_that_still_answers_costs_itself_alone(monkeypatch):
    failing_peer(monkeypatch, answers=True)
    (result,) = runner.run_bench(small_request(networks=[BenchNetwork("points2d", network="points2d")])).results
    assert result.peers == ["chunked"]
    assert result.skipped["eager"] == "CUDA error: an illegal memory access"


def test_engine_all_skips_what_cannot_run_and_a_name_is_refused():
    (result,) = runner.run_bench(small_request(engine="all", peers=[])).results
    assert "reference" in result.engines
    if "triton" not in result.engines:
        assert "cannot run here" in result.skipped["triton"]
        with pytest.raises(InputError, match="cannot run here"):
            runner.run_bench(small_request(engine="triton"))


def test_first_calls_are_measured_in_a_new_process():
    task = {"name": "points1d", "network": "points1d", "path": None, "n_chains": 20, "engine": "reference"}
    call = cold.measure_first_call({**task, "precision": "fp32", "device": "cpu", "threads": 1})
    assert call.cached and call.import_seconds > 0.05
    assert call.peak_bytes >= call.idle_bytes
    with pytest.raises(InputError, match="unknown engine 'tritn'"):
        cold.measure_first_call({**task, "engine": "tritn", "precision": "fp32", "device": "cpu", "threads": 1})
