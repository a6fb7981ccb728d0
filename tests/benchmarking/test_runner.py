"""A run of benchmarks: what it times, what it leaves out and what it keeps. No speed is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import call
from small_bench import SMALL, small_request

from kaleido_fast.benchmarking import cases, cold, contest, crew, host, readme, report, runner
from kaleido_fast.benchmarking.cases import BenchNetwork
from kaleido_fast.benchmarking.faults import DeviceLostError
from kaleido_fast.benchmarking.peers import PEERS, build_peer
from kaleido_fast.errors import InputError


def test_a_run_times_everybody_and_its_record_holds_every_raw_timing(small_report):
    record = json.loads(json.dumps(report.as_record(small_report)))
    assert [entry["network"] for entry in record["results"]] == ["points1d", "points2d"]
    assert {"date", "command", "commit", "dirty", "machine", "versions", "quick"} <= record.keys()
    assert {"cpu", "instruction_set", "others_share", "cores", "threads", "system", "load_average"} <= record[
        "machine"
    ].keys()
    for entry in record["results"]:
        assert set(entry["contestants"]) == {"reference", "eager", "chunked"}
        assert len(entry["ceiling"]["seconds"]) == 3
        assert entry["precision"] == "fp32" and "others_share" in entry
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

    monkeypatch.setattr(host, "build_peer", build)
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

    monkeypatch.setattr(host, "build_peer", build)
    monkeypatch.setattr(crew, "device_answers", lambda device: answers or not failed)


def test_a_lost_device_ends_the_run_and_what_was_measured_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    failing_peer(monkeypatch, answers=False)
    monkeypatch.setattr(runner.BenchRequest, "in_processes", False)
    Path("README.md").write_text(f"{readme.BEGIN}\n{readme.END}\n")
    nets = ("--net", "points1d,points2d", "--peers", "eager,chunked", "--json", "bench.json")
    files = ("--readme", "README.md", "--picture", "bars.png")
    status, output, errors = call(monkeypatch, capsys, "bench", *SMALL, *nets, *files)
    assert status == 2
    assert "points1d" in output
    assert errors.count("\n") == 1
    assert "eager: CUDA error: an illegal memory access" in errors
    assert "points2d in fp32 not measured, README.md left as it is, bars.png left as it is" in errors
    record = json.loads(Path("bench.json").read_text())
    assert [entry["network"] for entry in record["results"]] == ["points1d"]
    assert (record["unmeasured"], "takes no more work" in record["lost"]) == (["points2d in fp32"], True)
    assert Path("README.md").read_text() == f"{readme.BEGIN}\n{readme.END}\n"
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


def test_each_precision_meets_peers_of_as_many_bits_and_its_own_ceiling():
    chosen = [PEERS[name] for name in ("eager", "eager-bf16", "chunked-bf16")]
    found = runner.run_bench(small_request(precisions=["fp32", "bf16", "fp64"], peers=chosen)).results
    assert [(one.precision, one.peers) for one in found] == [
        ("fp32", ["eager"]),
        ("bf16", ["eager-bf16", "chunked-bf16"]),
        ("fp64", []),
    ]
    assert all(one.ceiling() > 0 for one in found)


def test_steps_follow_from_the_speed_where_none_are_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(runner, "steps_for", lambda seconds, quick: asked.append((seconds, quick)) or 4)
    (result,) = runner.run_bench(small_request(n_steps=None, quick=True)).results
    ((seconds, quick),) = asked
    assert (result.n_steps, quick, seconds > 0) == (4, True, True)


def test_an_engine_that_fails_is_told_and_the_others_are_timed(monkeypatch):
    def fails(*args):
        raise RuntimeError("no loops\nlong traceback")

    monkeypatch.setattr(host, "engine_contestant", fails)
    found = runner.run_bench(small_request())
    assert found.failures == ["reference on points1d in fp32: no loops"]
    assert [one.peers for one in found.results] == [["eager", "chunked"]]
    with pytest.raises(InputError, match="nothing could be timed: reference on points1d in fp32: no loops"):
        runner.run_bench(small_request(peers=[]))
