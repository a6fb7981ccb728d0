"""Contestants in processes of their own: what they may do to others, and what is left of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from killing import wait_until
from small_bench import SMALL, bench_apart, children_of, small_request

from kaleido_fast.benchmarking import contest, runner
from kaleido_fast.benchmarking.apart import CAN_STOP, Apart, LostError, StateFiles
from kaleido_fast.benchmarking.cases import BenchNetwork
from kaleido_fast.benchmarking.host import Entry, Host, Work
from kaleido_fast.benchmarking.peers import PEERS, Peer

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")

HEAD = "from kaleido_fast.benchmarking.contest import Contestant\nimport os, signal, sys, threading, time\n"
RIGHT = """
def build(setting):
    def run(z0, n):
        for _ in range(n):
            z0 = setting.model(z0)
        return z0
    return Contestant(run)
"""
ODD = {  # a module, and how its peer is spoken of; None where it is timed
    "broken": ("import a_library_that_is_not_there", "No module named 'a_library_that_is_not_there'"),
    "exits": (
        "def build(setting): print('out of licences', file=sys.stderr, flush=True); os._exit(3)",
        "status 3: out",
    ),
    "quits": ("def build(setting): sys.exit(4)", "ended with status 4"),
    "killed": ("def build(setting): os.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL"),
    "aborts": ("def build(setting): return Contestant(lambda z0, n: os.abort())", "ended by SIGABRT"),
    "hangs": ("def build(setting): return Contestant(lambda z0, n: time.sleep(1000))", "no answer for 8 s"),
    "raises": ("def build(setting): raise RuntimeError('no compiler\\n' * 9)", "no compiler"),
    "wrong": ("def build(setting): return Contestant(lambda z0, n: z0 * 0.5)", "differs from the reference"),
    "talks": ("print('a' * 2**20); print('b' * 2**20, file=sys.stderr)" + RIGHT, None),
    "prints bytes": ("os.write(1, bytes(range(256)) * 2**10)" + RIGHT, None),
    "late": (  # fails when it is timed, after it was checked
        RIGHT.replace("for _", "calls.append(n)\n        if len(calls) > 2: os._exit(5)\n        for _") + "calls = []",
        "status 5",
    ),
}


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """Gives the peer of an odd module."""
    (tmp_path / "odd_peers").mkdir()
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str, text: str) -> Peer:
        module = name.replace(" ", "_")
        (tmp_path / "odd_peers" / f"{module}.py").write_text(HEAD + text)
        return Peer(name, f"odd_peers.{module}", "odd")

    return make


@pytest.mark.slow
def test_odd_peers_cost_themselves_alone_and_are_named_with_the_reason(odd, monkeypatch):
    monkeypatch.setattr(runner, "PATIENCE", {False: 8.0})
    peers = [odd(name, text) for name, (text, _) in ODD.items()]
    networks = [BenchNetwork(name, network=name) for name in ("points1d", "points2d")]
    found = runner.run_bench(small_request(peers=[*peers, PEERS["eager"]], networks=networks, apart=True))
    for result in found.results:  # on the second network everybody gets another chance
        assert set(result.timings) == {"reference", "eager"} | {name for name, (_, why) in ODD.items() if why is None}
        for name, (_, why) in ODD.items():
            assert why is None or why in result.skipped[name], (name, result.skipped[name])
        assert all(len(timing.seconds) == 3 and min(timing.seconds) > 0 for timing in result.timings.values())
    assert children_of(os.getpid()) == [], "processes are left"


def test_processes_of_their_own_find_what_one_process_finds():
    def results(apart: bool) -> list[tuple[str, float, dict[str, int]]]:
        (found,) = runner.run_bench(small_request(apart=apart)).results
        return [(name, timing.error, timing.error_at) for name, timing in found.timings.items()]

    assert results(True) == results(False)


@pytest.mark.skipif(not CAN_STOP, reason="processes cannot be stopped here")
def test_nobody_uses_a_core_between_turns(odd, tmp_path):
    spin = "def spin():\n    while True: pass\nthreading.Thread(target=spin, daemon=True).start()\n"
    holder = Apart("spins", tmp_path, StateFiles(tmp_path), 60.0)
    try:
        network = BenchNetwork("points1d", network="points1d")
        holder.build(Entry("spins", "fp32", odd("spins", spin + RIGHT)), Work(network, 9, "cpu", 1, True))
        z0 = contest.start_states(network.model(), 9, torch.device("cpu"))
        expected = contest.reference_states(network.model(), z0)

        def state() -> tuple[str, int]:
            fields = Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()
            return fields[0], int(fields[11]) + int(fields[12])

        for turn in (lambda: holder.check(z0, expected), lambda: holder.time(2)):
            turn()
            wait_until(lambda: state()[0] == "T")
            before = state()
            time.sleep(0.3)
            assert state() == before
    finally:
        holder.close()
    with pytest.raises(LostError, match="its process ended by SIGKILL"):
        holder.time(2)


def test_states_are_handed_over_bit_by_bit_and_once(tmp_path):
    files = StateFiles(tmp_path)
    whole = torch.randn(40, 3, 6)
    part = whole[:, 1]
    path = files.path(part)
    assert files.path(part) == path != files.path(whole[:, 1])
    assert torch.equal(torch.load(path), part)
    assert path.stat().st_size < whole.nbytes
    files.clear()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_no_process_outlives_the_command(signal_name):
    if signal_name == "SIGKILL" and sys.platform != "linux":
        pytest.skip("a process cannot be bound to another one here")
    args = ("--steps", "1000000", *(arg for arg in SMALL if arg not in ("--steps", "2")))  # it does not end by itself
    command = [sys.executable, "-m", "kaleido_fast", "bench", "--net", "points1d", "--peers", "eager", *args]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    wait_until(lambda: len(children_of(process.pid)) == 3 or process.poll() is not None)
    assert process.poll() is None
    process.send_signal(getattr(signal, signal_name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "Traceback" not in errors, errors
    wait_until(lambda: children_of(process.pid) == [])


def test_it_works_in_a_spawned_process(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=bench_apart, args=(tmp_path / "timed",))
    process.start()
    process.join()
    assert (tmp_path / "timed").read_text() == "reference eager chunked"


def test_a_host_holds_one_contestant_at_a_time():
    host, network = Host(), BenchNetwork("points1d", network="points1d")
    work = Work(network, 9, "cpu", 1, True)
    z0 = contest.start_states(network.model(), 9, torch.device("cpu"))
    assert host.build(Entry("ceiling", "fp32"), work).flops > 0
    assert host.time(1) > 0
    built = host.build(Entry("eager", "fp32", PEERS["eager"]), work)
    assert (built.precision, built.flops) == ("fp32", 0)
    with pytest.raises(AssertionError, match="after check"):
        host.time(1)
    host.check(z0, contest.reference_states(network.model(), z0))
    assert host.time(1) > 0
