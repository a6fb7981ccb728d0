"""The Triton engine through `fast_sample`, under Triton's interpreter (no GPU) and on a GPU where there is one.

Triton reads TRITON_INTERPRET when kernels are decorated, hence processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_states_close, random_mlp

from kaleido_fast import fast_sample

pytest.importorskip("triton", reason="needs Triton")

INTERPRETED = """
import torch
from conftest import assert_states_close, order_products, random_mlp
from kaleido_fast import Outcome, Trace, fast_sample
from kaleido_fast.engines.reference import ReferenceEngine

def agree(widths, atol, n=21, **options):
    model = random_mlp(*widths)
    own = {} if options.get("sampler") == "flow" else {"burn_in": 1, "tol": None}
    options = {"n_chains": n, **own, **options}
    got = fast_sample(model, engine="triton", **options)
    want = fast_sample(model, engine="reference", **options)
    what = f"{widths} {options}: {got.plan.kernel}"
    assert got.stats.engine == "triton"
    assert_states_close(got.draws, want.draws, atol=atol, what=what)
    assert_states_close(got.residual, want.residual, atol=2 * atol, what=what + " residual")
    return got
"""
CASES = {
    "narrow": "agree((5, 11, 13, 5), 2e-5, burn_in=3, n_draws=2, thin=3, jitter=0.2)",
    "narrow-fp16": 'agree((5, 11, 13, 5), 4e-3, burn_in=0, precision="fp16")',
    "stream": "agree((7, 150, 140, 7), 2e-5, n=9, first_chain=2**32 - 3)",
    "wide": 'agree((7, 300, 7), 2e-5, n=9, jitter=0.1, noise="uniform", settle=0)',
    "flow": """
for widths in ((5, 11, 13, 5), (7, 150, 140, 7), (7, 300, 7)):
    agree(widths, 2e-5, n=9, sampler="flow", n_draws=2, steps=4, first_chain=2**32 - 3)
""",
    "flow-fp16": 'agree((5, 11, 13, 5), 4e-3, sampler="flow", steps=2, precision="fp16")',
    "flow, neighbours and draws": """
order_products()
flow = {"sampler": "flow", "steps": 3}
many = agree((5, 11, 5), 2e-5, n=70, n_draws=2, trace=Trace((3, 69), (0, 2, 4)), **flow)
few = fast_sample(random_mlp(5, 11, 5), engine="triton", n_chains=2, first_chain=68, **flow)
assert torch.equal(many.draws[68:, :1], few.draws)
""",
    "upstream": 'agree((3, 9, 3), 2e-5, noise="upstream", jitter=0.05, burn_in=3)',
    "neighbours": """
order_products()
many = agree((5, 11, 5), 2e-5, n=70, jitter=0.3, burn_in=3, trace=Trace((3, 69), (0, 2, 4)))
few = fast_sample(random_mlp(5, 11, 5), engine="triton", n_chains=2, first_chain=68, burn_in=3, jitter=0.3)
assert torch.equal(many.draws[68:], few.draws)
assert torch.equal(many.trace[1, 2], few.final[1])
""",
    "freezing": """
order_products()
model = random_mlp(5, 16, 5, scale=0.5, seed=3)
a = fast_sample(model, engine="triton", n_chains=40, burn_in=60)
b = fast_sample(model, engine="reference", n_chains=40, burn_in=60)
assert (a.steps == b.steps).float().mean() > 0.9
assert a.stats.work_saved > 0.5
assert_states_close(a.final, b.final, atol=2e-4)
few = fast_sample(model, engine="triton", n_chains=3, first_chain=17, burn_in=60)
for name in ("steps", "outcome", "period", "final", "residual"):
    assert torch.equal(getattr(a, name)[17:20], getattr(few, name)), name
""",
    "compiling": """
from kaleido_fast import forget_packed
from kaleido_fast.engines import triton as engine

model = random_mlp(3, 9, 3)

def compiling(**options):
    return fast_sample(model, engine="triton", n_chains=5, burn_in=1, tol=None, **options).stats.compile_seconds

assert compiling() == 0, "nothing is compiled in the interpreter"
forget_packed()
engine._compiles = lambda device: True
assert compiling() > 0
assert compiling() == 0 == compiling(seed=5)
assert compiling(jitter=0.1) > 0, "another variant of the kernel"
assert compiling(jitter=0.2) == 0
""",
    "cycles": """
from known_maps import cycle_map
for period in (2, 3):
    options = {"n_chains": 20, "burn_in": 41, "n_draws": 3, "thin": 5, "max_period": 8}
    run = fast_sample(cycle_map(period), engine="triton", **options)
    assert set(run.period.tolist()) == {period} and set(run.outcome.tolist()) == {Outcome.CYCLE}
    walked = fast_sample(cycle_map(period), engine="triton", retire_cycles=True, **options)
    assert_states_close(walked.draws, run.draws, atol=1e-5)
    assert walked.stats.chain_steps < run.stats.chain_steps
""",
    "nan": """
model = random_mlp(2, 2, 2)
with torch.no_grad():  # 3e38 (x + y) may overflow in both hidden values, whose difference is then NaN
    model.linears[0].weight.fill_(3e38)
    model.linears[0].bias.zero_()
    model.linears[1].weight.copy_(torch.tensor([[1.0, -1.0], [1.0, -1.0]]))
    model.linears[1].bias.zero_()
run = {engine: fast_sample(model, engine=engine, n_chains=40, burn_in=9) for engine in ("triton", "reference")}
bad = run["triton"].outcome == Outcome.NON_FINITE
assert 0 < bad.sum() < 40
assert torch.equal(run["triton"].outcome, run["reference"].outcome)
assert bool(run["triton"].final[~bad].isfinite().all())
""",
}


@pytest.mark.parametrize("case", CASES)
def test_engine_agrees_with_the_reference_under_the_interpreter(case):
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(["tests", ".", "kernels"]),
    }
    command = [sys.executable, "-c", INTERPRETED + CASES[case]]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]


PRETENDED_GPU = """
import os, torch
torch.cuda.is_available = lambda: True

def pytest_collection_finish(session):
    names = [item.path.stem for item in session.items]
    skipped = sum(bool(list(item.iter_markers("skip"))) for item in session.items)
    print("interpreted", "TRITON_INTERPRET" in os.environ, "skipped", skipped, *sorted(set(names)))
"""


def test_where_there_is_a_gpu_the_kernels_tests_are_for_it(tmp_path):
    """They, and nothing else that imports kernels, switch no interpreter on: all tests would run in it."""
    (tmp_path / "pretended_gpu.py").write_text(PRETENDED_GPU)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(tmp_path)
    folder = Path(__file__).parents[1]
    names = sorted(path.stem for path in (folder / "kernels").glob("test_*.py"))
    others = ("benchmarking/test_tuning", "benchmarking/gpu/test_report", "cli/test_gpu_report", "engines/test_triton")
    files = [str(folder / f"{name}.py") for name in (*(f"kernels/{name}" for name in names), *others)]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "pretended_gpu", "-m", "gpu", *files]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    (told,) = [line for line in result.stdout.splitlines() if line.startswith("interpreted")]
    assert told.startswith("interpreted False skipped 0 ") and set(names) <= set(told.split())


@pytest.mark.gpu
@pytest.mark.parametrize("widths", [(1, 10, 10, 1), (64, 128, 128, 64), (64, 256, 256, 64), (784, 500, 784)])
@pytest.mark.parametrize(
    ("precision", "atol", "rtol"), [("fp32", 1e-5, 0.0), ("tf32", 4e-3, 0.0), ("fp16", 4e-3, 0.0), ("bf16", 3e-2, 0.0)]
)
def test_one_step_on_a_gpu_agrees_with_the_reference(widths, precision, atol, rtol):
    model = random_mlp(*widths, scale=1.0)
    options = {"n_chains": 1000, "burn_in": 0, "device": "cuda", "precision": precision}
    got = fast_sample(model, engine="triton", **options)
    want = fast_sample(model, engine="reference", **options)
    assert_states_close(got.draws, want.draws, atol=atol, rtol=rtol, what=f"{widths} {precision} {got.plan.kernel}")


@pytest.mark.gpu
@pytest.mark.parametrize("widths", [(1, 10, 10, 1), (64, 128, 128, 64), (64, 256, 256, 64), (784, 500, 784)])
@pytest.mark.parametrize(("precision", "atol"), [("fp32", 5e-5), ("fp16", 3e-2)])
def test_a_flow_on_a_gpu_agrees_with_the_reference(widths, precision, atol):
    model = random_mlp(*widths, scale=1.0)
    options = {"n_chains": 1000, "sampler": "flow", "steps": 4, "n_draws": 2, "device": "cuda", "precision": precision}
    got = fast_sample(model, engine="triton", **options)
    want = fast_sample(model, engine="reference", **options)
    assert_states_close(got.draws, want.draws, atol=atol, what=f"{widths} {precision} {got.plan.kernel}")


@pytest.mark.gpu
@pytest.mark.parametrize("widths", [(2, 50, 50, 2), (64, 256, 256, 64), (784, 500, 500, 784)])
def test_a_thousand_repeats_on_a_gpu_give_the_same_bits(widths):
    model = random_mlp(*widths)
    options = {"n_chains": 4096, "burn_in": 9, "device": "cuda", "engine": "triton", "precision": "bf16", "tol": None}
    first = fast_sample(model, **options).draws
    for _ in range(1000):
        assert torch.equal(fast_sample(model, **options).draws, first)


@pytest.mark.gpu
def test_draws_beyond_two_to_the_31_elements_on_a_gpu():
    model = random_mlp(2, 16, 2)
    n_draws = 2**31 // (2 * 4096) + 3
    if torch.cuda.mem_get_info()[0] < 10 * n_draws * 4096 * 2:
        pytest.skip("needs 20 GiB of GPU memory")
    result = fast_sample(model, n_chains=4096, burn_in=0, n_draws=n_draws, device="cuda", engine="triton", tol=None)
    assert torch.equal(
        result.draws[4095, -1],
        fast_sample(
            model, n_chains=1, first_chain=4095, burn_in=n_draws - 1, device="cuda", engine="triton", tol=None
        ).final[0],
    )
