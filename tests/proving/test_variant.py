"""What is inspected is what is launched: Triton's cache keys, compared in processes without the interpreter."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from compiling import run_script

LAUNCHED = """
import sys
from dataclasses import replace
import torch
from conftest import random_mlp
from kaleido_kernels.tile import GpuFacts
from kaleido_kernels.schedule import Checks
from kaleido_fast.engines.triton import TritonEngine
from kaleido_fast.planning.facts import H200
from kaleido_fast.planning.plan import plan_kernel
from kaleido_fast.planning.request import SampleRequest
from kaleido_kernels.proving.inspect.compiling import variant_of
from kaleido_kernels.proving.inspect.jobs import planned_jobs
from kaleido_kernels.proving.fake_driver import keys_only, variant_key
from kaleido_kernels.shapes import NETWORKS

torch.set_num_threads(1)
FACTS = replace(H200, gpu=GpuFacts(n_sm=2))
found = []

def keep(kernel, key, arguments, grid):
    found.append(key)

def launch(engine, variant, dim):
    chains, state = torch.arange(9), torch.zeros(9, dim)
    with keys_only(keep):
        if variant == "checks":
            checks = Checks(1e-4, 2, 4, torch.zeros(9, dtype=torch.int32), None)
            engine.checked(chains, state, 0, 20, checks, lambda done: None)
        else:
            engine.advance(chains, None, 0, 20, torch.zeros(9, 1, dim), lambda done: None)
    return found.pop()

compared = 0
for name in sys.argv[1:]:
    shape = NETWORKS[name]
    model = random_mlp(*shape.widths, bound=shape.bound, low=shape.low, high=shape.high)
    for precision, form in (("fp32", "fp16x3"), ("fp16", "fp16"), ("bf16", "bf16")):
        options = {"n_chains": 9, "burn_in": 19, "tol": None, "engine": "triton", "precision": precision}
        requests = [SampleRequest(jitter=jitter, **options) for jitter in (0.0, 0.1)]
        requests.append(SampleRequest(sampler="flow", **{**options, "burn_in": 0}))
        plan = plan_kernel(model.spec, precision, FACTS)
        plain, jittered, flow = (TritonEngine(model, request, plan, torch.device("cpu")) for request in requests)
        for job in planned_jobs([name], [form]):
            assert plan.choice.tile == job.tile
            engine = {"none": plain, "normal": jittered, "flow": flow, "checks": plain}[job.variant]
            launched = launch(engine, job.variant, shape.dim)
            assert launched == variant_key(variant_of(job)), f"{job}: another kernel is launched than inspected"
            compared += 1
assert compared == 12 * len(sys.argv[1:]) and not found
"""


@pytest.mark.parametrize(
    "nets", ["points1d points2d digits deep128 mnist", pytest.param("cifar", marks=pytest.mark.slow)]
)
def test_what_is_inspected_is_what_an_engine_launches(nets):
    run_script(LAUNCHED, *nets.split())


GRAPH = """
import torch
from kaleido_kernels.graph import kernel as graph
from kaleido_kernels.graph.pack import pack_graph
from kaleido_kernels.proving.fake_driver import keys_only, variant_key
from kaleido_kernels.graph.plan import GraphTile
from kaleido_kernels.arguments import QUIET
from kaleido_kernels.launch import LaunchRequest, allocate_outputs
from kaleido_kernels.schedule import Schedule
from kaleido_kernels.shapes import NetShape

shape, tile, cpu = NetShape((3, 9, 3), activation="silu"), GraphTile(16), torch.device("cpu")
layers = [(torch.ones(9, 3), torch.ones(9)), (torch.ones(3, 9), torch.ones(3))]
for precision in ("fp32", "fp16", "bf16"):
    runner = graph.GraphRunner(pack_graph(layers, shape, precision), tile, capture=False)
    for jitter, start in (("none", None), ("normal", torch.zeros(5, 3))):
        schedule = Schedule(jitter=0.0 if jitter == "none" else 0.1)
        request = LaunchRequest(5, schedule, start=start)
        launched = []
        with keys_only(lambda kernel, key, arguments, grid: launched.append(key)):
            runner.launch(request, allocate_outputs(request, shape, cpu))
        kind = QUIET._replace(jitter=jitter)
        first = "noise" if start is None else "given"
        made = [graph.variant(shape, precision, tile, kind, first=first), graph.activation_variant(shape, precision)]
        made.append(graph.variant(shape, precision, tile, kind))
        assert launched == [variant_key(variant) for variant in made], (precision, jitter)
"""


def test_what_is_compiled_ahead_of_time_is_what_the_graph_path_launches():
    run_script(GRAPH)


UNTYPED = """
from untyped_kernels import typed, unheard, untyped
from kaleido_kernels.variant import Variant

signature = {"out_ptr": "*i64", "n": "i64"}
Variant(typed, signature, {}, 1, 1)
for kernel in (untyped, unheard):
    try:
        Variant(kernel, signature, {}, 1, 1)
    except ValueError as problem:
        assert "n is i64, the kernel says nothing" in str(problem), problem
    else:
        raise AssertionError(kernel)
"""


def test_numbers_whose_type_the_kernel_does_not_say_are_refused():
    """Triton takes the type of the first launch's value then; a chain id beyond 2**32 was cut by a later launch."""
    run_script(UNTYPED)


def test_names_that_are_not_the_kernels_are_refused():
    from kaleido_kernels.narrow.kernel import narrow_kernel, variant
    from kaleido_kernels.shapes import NetShape
    from kaleido_kernels.tile import Tile
    from kaleido_kernels.variant import Variant

    made = variant(NetShape((3, 9, 3)), "fp16", Tile("narrow", 64, 4))
    short = {name: kind for name, kind in made.signature.items() if name != "every"}
    for signature, constants in (
        (short, made.constants),
        (made.signature, {**made.constants, "ROWS": 3}),
        ({**short, "every": "i32", "ROWS": "i32"}, made.constants),
        ({n: kind for n, kind in made.signature.items() if n != "seed"}, {**made.constants, "seed": 1}),
    ):
        with pytest.raises(ValueError, match="narrow_kernel: "):
            Variant(narrow_kernel, signature, constants, 4, 1)
    shuffled = Variant(narrow_kernel, dict(reversed(made.signature.items())), made.constants, 4, 1)
    assert [*shuffled.signature, *shuffled.constants] == narrow_kernel.arg_names
