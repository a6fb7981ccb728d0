"""Processes that do the jobs of a report: what crashes, hangs or cannot be read costs itself alone."""

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

pytest.importorskip("triton")

from killing import wait_until

from kaleido_fast.benchmarking.gpu import workers
from kaleido_fast.benchmarking.gpu.workers import HereWorker, ProcessWorker, run_jobs

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
    wait_until(lambda: not is_alive(found["seen"]))


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
    wait_until(lambda: pids.read_text().count("\n") == 4)
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
