"""The first minutes with a GPU, without one: order of cases, lines as they come, what is refused; the path emulated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kaleido_fast import InputError
from kaleido_fast.benchmarking.gpu import first_contact
from kaleido_fast.benchmarking.gpu.contact import NETS, OTHERS, cases, timed_cases, why_not
from kaleido_fast.benchmarking.gpu.first_contact import ContactRequest, look_at, make_contact
from kaleido_fast.benchmarking.gpu.prepared import manifest_here, unpack
from kaleido_fast.benchmarking.gpu.workers import ProcessWorker

ROOT = Path(__file__).parent.parent
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
    assert [case.precision for case in timed_cases()[:6]] == ["fp16"] * 6 and len(timed_cases()) == 15


def test_lines_are_told_and_on_disk_as_cases_finish(tmp_path):
    told: list[str] = []
    out = tmp_path / "log.jsonl"

    def answer(job, emit):
        assert len(out.read_text().splitlines()) == len(told)  # everything that was told is on disk
        emit(FOUND)
        return "the process ended with status -11" if job["kernel"] == "graph" else ""

    right, made = make_contact(
        ContactRequest("cuda", 1.0, ("mnist", "digits"), workers=1), out, lambda: FakeWorker(answer), told.append
    )
    entries = [json.loads(line) for line in out.read_text().splitlines()]
    n_graph = 2 * 2  # of both networks, checked and timed
    assert made == len(told) == len(entries) and right == made - n_graph
    assert sum("PROBLEM the process ended with status -11" in line for line in told) == n_graph
    assert "mnist" in told[0] and "fp16" in told[0] and "error 0.002" in told[0] and "'chain': 17" in told[0]
    assert all(entry["error"] == 2e-3 for entry in entries)


def test_what_is_not_reached_in_time_is_told(tmp_path):
    told: list[str] = []
    request = ContactRequest("cuda", 0.0, ("digits",), workers=1)
    right, made = make_contact(request, tmp_path / "log", lambda: FakeWorker(lambda job, emit: ""), told.append)
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
    result = run_script("--out", str(tmp_path))
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert "no GPU can be used here" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prepare"], "--prepare needs --archive FILE"),
        (["--only", "mnits"], "mnist"),
        (["--prepare", "--archive", "/nowhere/kernels.tar.xz"], "/nowhere does not exist"),
        (["--out", "/nowhere", "--emulate"], "/nowhere does not exist"),
    ],
)
def test_bad_options_are_one_line(arguments, message):
    result = run_script(*arguments)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and message in result.stderr


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
    result = run_script("--emulate", "--only", "points1d", "--minutes", "30", "--workers", "2", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert "emulated sm_90, capability 9.0" in lines[0]
    entries = [json.loads(line) for line in (tmp_path / "first_contact.jsonl").read_text().splitlines()]
    assert len(entries) == 4 + 2 and not any(entry["problem"] for entry in entries)
    assert all(entry["same_bits"] for entry in entries if not entry["timed"])


@pytest.mark.slow
def test_a_prepared_archive_spares_all_compiling(tmp_path):
    """Every variant of a first contact and of the kernels' tests, found in another folder; 20 minutes."""
    pytest.importorskip("triton")
    archive, cache = tmp_path / "kernels.tar.xz", tmp_path / "cache"
    made = run_script("--prepare", "--archive", str(archive), "--workers", "2")
    assert made.returncode == 0, made.stdout + made.stderr
    kernels = unpack(archive, cache, manifest_here(None)).kernels
    environment = {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    request = ContactRequest("cpu", 60.0, chains=1, repeats=0, timed_chains=1, workers=2, compile_only=True)
    right, all_cases = make_contact(
        request, tmp_path / "log", lambda: ProcessWorker(environment, "compile"), lambda line: None
    )
    assert right == all_cases
    assert not list(cache.rglob("*.ttir")), "something was compiled anew"
    print(f"{kernels} kernels, {archive.stat().st_size:,} bytes", end=" ")
