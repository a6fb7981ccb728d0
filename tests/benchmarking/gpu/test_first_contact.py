"""The first minutes with a GPU, without one: order of cases, lines as they come, what is refused; the path emulated."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kaleido_fast import InputError
from kaleido_fast.benchmarking.acceptance import measure_deviation
from kaleido_fast.benchmarking.gpu import first_contact
from kaleido_fast.benchmarking.gpu.contact import NETS, OTHERS, cases, largest, timed_cases, why_not
from kaleido_fast.benchmarking.gpu.first_contact import ContactRequest, look_at, make_contact
from kaleido_fast.benchmarking.gpu.prepared import manifest_here, unpack
from kaleido_fast.benchmarking.gpu.workers import ProcessWorker

ROOT = Path(__file__).parents[3]
ABOUT = {"name": "an H100", "capability": [9, 0], "versions": {"torch": "2"}, "commit": "0123", "changed": False}
FOUND = {"runs": "wide", "first_s": 0.5, "error": 2e-3, "error_at": {"step": 3, "chain": 17, "dim": 1}}


class FakeWorker:
    """Answers jobs as a test wants it."""

    def __init__(self, answer):
        self.answer, self.closed = answer, False

    def run(self, job, seconds, emit):
        return self.answer(job, emit)

    def close(self):
        self.closed = True


def run_script(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "first_contact.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})


def test_what_matters_most_comes_first():
    checks = cases()
    assert [(case.network, case.precision) for case in checks[:6]] == [(net, "fp16") for net in NETS]
    assert NETS[:2] == ("mnist", "digits")
    assert [case.precision for case in checks[:18]] == ["fp16"] * 6 + ["fp32"] * 6 + ["bf16"] * 6
    assert len(checks) == 18 + len(OTHERS) and len(set(checks)) == len(checks)
    assert {case.network for case in cases(("digits",))} == {"digits"}
    assert [case.precision for case in timed_cases()[:6]] == ["fp16"] * 6 and len(timed_cases()) == 18


def test_lines_are_told_and_on_disk_as_cases_finish(tmp_path):
    told: list[str] = []
    out = tmp_path / "log.jsonl"

    def answer(job, emit):
        lines = [json.loads(line)["line"] for line in out.read_text().splitlines()]
        assert len([line for line in lines if line != "run"]) == len(told)  # everything that was told is on disk
        emit(FOUND)
        return "the process ended with status -11" if job["kernel"] == "graph" else ""

    def answer_all() -> tuple[int, int]:
        request = ContactRequest("cuda", 1.0, ("mnist", "digits"), workers=1)
        return make_contact(request, ABOUT, out, lambda: FakeWorker(answer), told.append)

    right, made = answer_all()
    run, *entries = [json.loads(line) for line in out.read_text().splitlines()]
    assert run["line"] == "run" and run.items() >= ABOUT.items() and run["date"].endswith("+00:00")
    n_graph = 2 * 2  # of both networks, checked and timed
    assert made == len(told) == len(entries) and right == made - n_graph
    assert sum("PROBLEM the process ended with status -11" in line for line in told) == n_graph
    assert "mnist" in told[0] and "fp16" in told[0] and "error 0.002" in told[0] and "'chain': 17" in told[0]
    assert all(entry["error"] == 2e-3 for entry in entries)
    kinds = ["check"] * len(cases(("mnist", "digits"))) + ["time"] * len(timed_cases(("mnist", "digits")))
    assert [entry["line"] for entry in entries] == kinds
    assert all(f" {kind} " in line for kind, line in zip(kinds, told, strict=True))
    answer_all()  # one after the other in a file, and told apart
    runs = [json.loads(line)["line"] for line in out.read_text().splitlines()]
    assert runs == 2 * ["run", *kinds]


def test_what_is_not_told_is_not_counted_as_right(tmp_path):
    """A pipe that nobody reads ends the run."""
    request = ContactRequest("cuda", 1.0, ("mnist",), workers=2)

    def nobody(line):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        make_contact(request, ABOUT, tmp_path / "log", lambda: FakeWorker(lambda job, emit: ""), nobody)
    with pytest.raises(InputError, match="cannot write"):
        make_contact(request, ABOUT, tmp_path, lambda: FakeWorker(lambda job, emit: ""), lambda line: None)


UNREAD = """
from kaleido_fast.benchmarking.gpu import first_contact
first_contact.look_at = lambda device, worker, busy: {}
first_contact.headline = lambda found: "a GPU"
first_contact.main()
"""


def test_lines_that_nobody_reads_end_the_run_without_a_traceback(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", UNREAD, "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (1, "")


def test_nan_is_the_largest_error_wherever_it_comes():
    errors = [torch.tensor([[0.0, error]]) for error in (0.5, float("nan"), 0.7, float("inf"))]
    deviations = [measure_deviation(error, torch.zeros(1, 2), step) for step, error in enumerate(errors)]
    for order in itertools.permutations(deviations):
        assert largest(order).step == 1, [deviation.error for deviation in order]
    assert largest([deviations[2], deviations[0]]).step == 2


def test_what_is_not_reached_in_time_is_told(tmp_path):
    told: list[str] = []
    request = ContactRequest("cuda", 0.0, ("digits",), workers=1)
    right, made = make_contact(request, ABOUT, tmp_path / "log", lambda: FakeWorker(lambda job, emit: ""), told.append)
    assert right == 0 and made == len(told) and all("not reached in time" in line for line in told)


def test_older_and_busy_devices_are_refused():
    assert "capability 8.0: an H100 or H200 (9.0)" in why_not("an A100", (8, 0), {})
    assert "in use by others (30,000 MiB taken, 0 % busy)" in why_not(
        "an H100", (9, 0), {"memory.used": "30000", "utilization.gpu": "0"}
    )
    assert "99 % busy" in why_not("an H100", (9, 0), {"memory.used": "3", "utilization.gpu": "99"})
    assert why_not("an H100", (9, 0), {"memory.used": "500", "utilization.gpu": "[N/A]"}) == ""
    refused = FakeWorker(lambda job, emit: emit({"refused": "too old"}) or "")
    with pytest.raises(InputError, match="too old"):
        look_at("cuda", refused, busy=False)
    assert refused.closed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_device_the_first_line_says_so(tmp_path):
    archive = tmp_path / "kernels.tar.xz"
    archive.write_bytes(b"junk")
    result = run_script("--out", str(tmp_path / "out"), "--archive", str(archive))
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert "no GPU can be used here" in result.stderr
    assert list(tmp_path.iterdir()) == [archive]


def test_the_look_ends_its_process_whatever_comes():
    def interrupted(job, emit):
        raise KeyboardInterrupt

    worker = FakeWorker(interrupted)
    with pytest.raises(KeyboardInterrupt):
        look_at("cuda", worker, busy=False)
    assert worker.closed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prepare"], "--prepare needs --archive FILE"),
        (["--only", "mnits"], "mnist"),
        (["--only", ","], "names no network"),
        (["--only", ""], "names no network"),
        (["--minutes", "nan"], "nan is no number of minutes"),
        (["--minutes", "inf"], "inf is no number of minutes"),
        (["--prepare", "--archive", "k", "--emulate", "--out", "o"], "leave out --out and --emulate"),
        (["--prepare", "--archive", "k", "--busy", "--minutes", "3"], "leave out --minutes and --busy"),
        (["--prepare", "--archive", "k", "--only", "mnits"], "mnist"),
        (["--prepare", "--archive", "/nowhere/kernels.tar.xz"], "/nowhere does not exist"),
        (["--out", "/dev/null/folder", "--emulate"], "/dev/null/folder cannot be made: Not a directory"),
    ],
)
def test_bad_options_are_one_line(arguments, message):
    result = run_script(*arguments)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and message in result.stderr


def test_networks_may_be_separated_by_spaces_too():
    assert first_contact._networks(" points2d, mnist ,") == ("mnist", "points2d")
    assert first_contact._networks(None) == NETS


def test_networks_that_are_named_are_prepared_alone(tmp_path, monkeypatch):
    """With the tests of the kernels, which take part whatever is named."""
    jobs, tests = [], []
    monkeypatch.setattr(first_contact, "run_jobs", lambda found, *args: jobs.extend(found))
    monkeypatch.setattr(first_contact, "_run_tests", lambda *args: tests.append(args))
    with pytest.raises(InputError, match="no compiled kernels"):
        first_contact.prepare(tmp_path / "k", lambda text: None, 1, ("digits",))
    assert {job["network"] for job in jobs} == {"digits"} and len(jobs) == len(cases(("digits",))) and len(tests) == 1


@pytest.mark.parametrize(
    "module, message",
    [
        ("raise SystemExit('No module named pytest')", "No module named pytest"),
        ("print('1 failed'); exit(1)", "1 failed"),
    ],
)
def test_nothing_is_packed_unless_all_tests_of_the_kernels_pass(tmp_path, module, message):
    """pytest that is missing ends with the same status as tests that fail."""
    (tmp_path / "pytest.py").write_text(module)
    with pytest.raises(InputError, match=f"do not all pass in the emulator, so nothing is packed: {message}") as told:
        first_contact._run_tests({"PYTHONPATH": str(tmp_path)}, 1)
    assert "\n" not in str(told.value)


DOCUMENTED = sorted(set(re.findall(r"pytest (--emulate[^`\n]*)", (ROOT / "docs" / "gpu.md").read_text())))


@pytest.mark.parametrize("line", [*DOCUMENTED, "--emulate tests/kernels/test_*.py", "--emulate-how early --emulate"])
def test_documented_lines_run_the_tests_of_the_kernels_emulated(line):
    assert DOCUMENTED
    pytest.importorskip("triton")
    command = f"{shlex.quote(sys.executable)} -m pytest {line} -p no:cacheprovider --collect-only -q"
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-500:] + result.stderr
    assert "tests/kernels/test_narrow.py::" in result.stdout and "tests/test_model.py" not in result.stdout


def test_how_to_emulate_needs_emulating():
    command = [sys.executable, "-m", "pytest", "--emulate-how", "early", "tests/kernels/test_narrow.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 4 and "pass --emulate too" in result.stderr


def test_an_archive_of_no_use_is_told_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "kernels").write_bytes(b"junk")
    first_contact._use(tmp_path / "kernels")
    assert "damaged" in capsys.readouterr().out
    first_contact._use(tmp_path / "none")
    assert "kernels are compiled anew" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_path_in_the_emulator(tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "some" / "folder"
    result = run_script("--emulate", "--only", "points1d", "--minutes", "30", "--workers", "2", "--out", str(out))
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert "emulated sm_90, capability 9.0" in lines[0]
    run, *entries = [json.loads(line) for line in (out / "first_contact.jsonl").read_text().splitlines()]
    assert run["name"] == "emulated sm_90" and run["versions"]["triton"]
    assert len(entries) == 4 + 2 and not any(entry["problem"] for entry in entries)
    assert all(entry["same_bits"] for entry in entries if entry["line"] == "check")


@pytest.mark.slow
def test_a_prepared_archive_spares_all_compiling(tmp_path):
    """Every variant of a first contact and of the kernels' tests, found in another folder; 20 minutes."""
    pytest.importorskip("triton")
    archive, cache = tmp_path / "kernels.tar.xz", tmp_path / "cache"
    made = run_script("--prepare", "--archive", str(archive), "--workers", "2")
    assert made.returncode == 0, made.stdout + made.stderr
    kernels = unpack(archive, cache, manifest_here(None)).kernels
    environment = {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    sizes = {"chains": 1, "repeats": 0, "timed_chains": 1}
    long = first_contact.EMULATED_SECONDS  # the reference of cifar alone takes two minutes on a CPU
    request = ContactRequest("cpu", 60.0, **sizes, seconds=long, workers=2, compile_only=True)
    right, all_cases = make_contact(
        request, ABOUT, tmp_path / "log", lambda: ProcessWorker(environment, "compile"), lambda line: None
    )
    assert right == all_cases
    assert not list(cache.rglob("*.ttir")), "something was compiled anew"
    first_contact._run_tests({"TRITON_CACHE_DIR": str(tmp_path / "tests"), "OMP_NUM_THREADS": "1"}, 2)
    launched = {path.parent.name for path in (tmp_path / "tests").glob("*/*.cubin")}
    assert launched and not launched - {path.name for path in cache.iterdir()}, "tests launch what was not prepared"
    print(f"{kernels} kernels, {archive.stat().st_size:,} bytes", end=" ")
