"""Memory: blocks that shrink to what there is, and what happens where it runs out all the same."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.parameter import is_lazy

from kaleido_fast import InputError, ModelSpec, SamplingMemoryError, fast_sample, sample_op
from kaleido_fast.cli import main
from kaleido_fast.engines.reference import ReferenceEngine
from kaleido_fast.planning.facts import H200, DeviceFacts
from kaleido_fast.planning.plan import make_plan
from kaleido_fast.planning.request import SampleRequest
from kaleido_fast.running.packed import PACKED

MODEL = random_mlp(6, 11, 13, 6)
FACTS = DeviceFacts("cpu", has_numba=True)
CIFAR = ModelSpec((3072, *[2000] * 10, 3072))
OPTIONS: dict[str, Any] = {"n_chains": 64, "burn_in": 5, "engine": "reference", "tol": None, "block_chains": 16}


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 10**6),
    n_draws=st.integers(1, 50),
    memory=st.integers(2**24, 2**38),
    widths=st.sampled_from([(2, 50, 2), (64, 256, 64), CIFAR.widths]),
    tol=st.sampled_from([None, 1e-3]),
)
def test_a_plan_fits_the_memory_or_is_refused(n, n_draws, memory, widths, tol):
    spec, request = ModelSpec(widths), SampleRequest(n_chains=n, n_draws=n_draws, tol=tol)
    plenty = make_plan(request, spec, replace(FACTS, memory=2**60), spec.dim)
    try:
        plan = make_plan(request, spec, replace(FACTS, memory=memory), spec.dim)
    except InputError as problem:
        assert "are free: pass at most about" in str(problem)
        return
    assert plan.draws_bytes + plan.working_bytes <= memory
    assert plan.block_chains <= plenty.block_chains
    assert plan.block_chains % plan.tile_rows == 0
    if plan.block_chains < plenty.block_chains:
        assert plenty.draws_bytes + plenty.working_bytes > memory, "blocks shrink only where they must"


@pytest.mark.parametrize("kernel", ["wide", "graph"])
def test_the_scratch_of_wide_kernels_is_counted(kernel):
    request = SampleRequest(n_chains=1, tol=None, precision="bf16", kernel=kernel)
    plan = make_plan(request, CIFAR, H200, CIFAR.dim)
    assert plan.working_bytes > 2 * 4 * CIFAR.n_parameters + 2**25


def test_blocks_shrink_before_a_run_is_refused():
    request = SampleRequest(n_chains=20_000, tol=None)
    plenty = make_plan(request, CIFAR, replace(FACTS, memory=2**60), CIFAR.dim)
    tight = replace(FACTS, memory=plenty.draws_bytes + plenty.working_bytes - 1)
    assert make_plan(request, CIFAR, tight, CIFAR.dim).block_chains < plenty.block_chains
    with pytest.raises(InputError, match="are free"):
        make_plan(request, CIFAR, tight, CIFAR.dim, block_chains=plenty.block_chains)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 200), st.sampled_from(["reference", "cpu"]), st.sampled_from([None, 1e-2]))
def test_the_size_of_blocks_changes_no_bit(block, engine, tol):
    options = {"n_chains": 70, "burn_in": 20, "engine": engine, "tol": tol}
    got, want = fast_sample(MODEL, block_chains=block, **options), fast_sample(MODEL, **options)
    assert torch.equal(got.draws, want.draws) and torch.equal(got.steps, want.steps)
    assert got.plan.block_chains == block


@pytest.mark.parametrize("block", [0, -1, 2.5, True, "many"])
def test_bad_block_sizes_are_named(block):
    with pytest.raises(InputError, match="block_chains is"):
        fast_sample(MODEL, n_chains=3, block_chains=block)


def live_tensors() -> int:
    """Values in all tensors that Python can see; lazy parameters of other tests have none."""
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    return sum(tensor.numel() for tensor in tensors if not is_lazy(tensor))


class Starved:
    """The reference engine until its n-th call, in which memory runs out."""

    def __init__(self, monkeypatch, at: int, problem: BaseException) -> None:
        calls = itertools.count(1)  # of several threads, each of which gets a number of its own
        whole = ReferenceEngine.advance

        def advance(self, *arguments):
            held = torch.ones(1000)  # as an engine's own buffers
            if next(calls) == at:
                raise type(problem)(*problem.args)  # a new one: the given one would keep the frames that it passed
            assert held is not None
            return whole(self, *arguments)

        monkeypatch.setattr(ReferenceEngine, "advance", advance)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    RuntimeError("CUDA error: out of memory"),
    MemoryError(),
]


@pytest.mark.parametrize(
    ("how", "at", "problem"),
    [
        *(("function", at, problem) for at in (1, 3) for problem in OUT_OF_MEMORY),
        *((how, at, OUT_OF_MEMORY[0]) for at in (1, 3) for how in ("operator", "devices", "settling")),
    ],
    ids=lambda value: f"{type(value).__name__}" if isinstance(value, Exception) else str(value),
)
def test_out_of_memory_says_what_to_pass_and_keeps_nothing(how, at, problem, monkeypatch):
    z0 = torch.zeros(64, 6, dtype=torch.float64)  # converted by the run

    def run() -> None:
        if how == "operator":
            sample_op(MODEL, z0=z0, **{**OPTIONS, "n_chains": None})
        else:
            extras: dict[str, dict[str, Any]] = {"devices": {"device": ["cpu", "cpu"]}, "settling": {"tol": 1e-3}}
            extra = extras.get(how, {})
            fast_sample(MODEL, z0=z0, **{**OPTIONS, **extra})

    run()  # what stays from the first run: the copy of the weights
    for engines in PACKED._models:
        engines.drop_engines()
    gc.collect()
    gc.disable()
    try:
        before = live_tensors()
        Starved(monkeypatch, at, problem)
        with pytest.raises(SamplingMemoryError, match="pass block_chains=8 ") as caught:
            run()
        assert live_tensors() == before, "the error, still held, keeps no tensor"
    finally:
        gc.enable()
    text = str(caught.value)
    assert caught.value.block_chains == 8
    assert "\n" not in text and "out of memory on cpu" in text and "blocks of 16 chains" in text
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    run()  # and the next one works


@pytest.mark.parametrize("ending", ["npy", "safetensors"])
def test_the_command_line_says_what_to_pass(ending, monkeypatch, tmp_path, small_checkpoint, capsys):
    Starved(monkeypatch, 1, OUT_OF_MEMORY[0])
    command = ["kaleido-fast", "sample", "--model", str(small_checkpoint), "--engine", "reference", "--device", "cpu"]
    command += ["--chains", "50", "--out", str(tmp_path / f"a.{ending}"), "--block-chains", "20", "--quiet"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        main()
    *_, told = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert told.startswith("kaleido-fast: out of memory on cpu") and "pass block_chains=10 (--block-chains)" in told
    assert not (tmp_path / f"a.{ending}").exists(), "nothing half-written"


def test_other_errors_are_left_as_they_are(monkeypatch):
    Starved(monkeypatch, 2, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug") as caught:
        fast_sample(MODEL, **OPTIONS)
    assert not isinstance(caught.value, InputError)


def test_following_the_advice_ends(monkeypatch):
    """A caller who passes what the error says comes down to one chain at a time."""
    whole = ReferenceEngine.advance

    def advance(self, chains, *arguments):
        if len(chains) > 3:
            raise torch.OutOfMemoryError("too many")
        return whole(self, chains, *arguments)

    want = fast_sample(MODEL, **OPTIONS)
    monkeypatch.setattr(ReferenceEngine, "advance", advance)
    block, tries = None, 0
    while True:
        try:
            got = fast_sample(MODEL, **{**OPTIONS, "block_chains": block})
            break
        except SamplingMemoryError as problem:
            block, tries = problem.block_chains, tries + 1
    assert (block, tries) == (2, 5)
    assert torch.equal(got.draws, want.draws)


REAL = """
import resource, sys
from conftest import random_mlp
from kaleido_fast import SamplingMemoryError, fast_sample
model = random_mlp(256, 32, 256)
fast_sample(model, n_chains=10, burn_in=1, engine="reference", device="cpu")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, resource.RLIM_INFINITY))
try:
    fast_sample(model, n_chains=200_000, burn_in=1, engine="reference", device="cpu")
except SamplingMemoryError as problem:
    print(problem)
got = fast_sample(model, n_chains=1000, burn_in=1, engine="reference", device="cpu")
print("then", len(got.draws))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_memory_that_really_runs_out():
    path = [str(Path(__file__).parents[1]), *filter(None, sys.path)]
    code = f"import sys; sys.path[:0] = {path!r}\n{REAL}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    told, then = result.stdout.splitlines()
    assert told.startswith("out of memory on cpu with blocks of")
    assert then == "then 1000"
