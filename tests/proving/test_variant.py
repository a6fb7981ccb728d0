"""What is inspected is what is launched: Triton's cache keys, compared in processes without the interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

ROOT = Path(__file__).parents[2]


def run_python(*arguments: str, interpret: str = "0") -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, where kernels are compiled unless they are to be interpreted."""
    # What stood there before may be another Triton.
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def run_script(script: str, *arguments: str) -> str:
    """Runs Python text where kernels are compiled; returns what it printed."""
    result = run_python("-c", script, *arguments)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout


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
        plan = plan_kernel(model.spec, precision, FACTS)
        plain, jittered = (TritonEngine(model, request, plan, torch.device("cpu")) for request in requests)
        for job in planned_jobs([name], [form]):
            assert job.variant in ("none", "normal", "checks") and plan.choice.tile == job.tile
            launched = launch(jittered if job.variant == "normal" else plain, job.variant, shape.dim)
            assert launched == variant_key(variant_of(job)), f"{job}: another kernel is launched than inspected"
            compared += 1
assert compared == 9 * len(sys.argv[1:]) and not found
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


KEYS = """
from dataclasses import replace
import torch
from kaleido_kernels.graph import kernel as graph
from kaleido_kernels.narrow import kernel as narrow
from kaleido_kernels.wide import kernel as wide
from kaleido_kernels.proving.fake_driver import compile_only, compile_variant, variant_key
from kaleido_kernels.graph.plan import GraphTile
from kaleido_kernels.arguments import QUIET
from kaleido_kernels.shapes import NetShape
from kaleido_kernels.tile import Tile
from kaleido_kernels.wide.plan import WideTile

shape = NetShape((3, 9, 3), activation="silu")
variants = [
    narrow.variant(shape, "fp16", Tile("narrow", 64, 4)),
    wide.variant(shape, "fp16", WideTile(64, 64, 64, 64, 4, 2)),
    graph.variant(shape, "bf16", GraphTile(16)),
    graph.activation_variant(shape, "bf16"),
]
for variant in variants:
    key = variant_key(variant)
    assert compile_variant(variant).hash == key == variant_key(variant)
    others = [
        replace(variant, num_warps=2 * variant.num_warps),
        replace(variant, num_stages=variant.num_stages + 1),
        replace(variant, constants={**variant.constants, "USE_ASM": False}),
    ]
    keys = {key, variant_key(variant, "sm_80"), variant_key(variant, "gfx942"), *map(variant_key, others)}
    assert len(keys) == 6, variant
others = {"jitter": "normal", "init": "normal", "has_start": True}
others |= {"has_ids": False, "keep_draws": False, "checks": True}
kinds = [QUIET, *(QUIET._replace(**{name: value}) for name, value in others.items())]
keys = {variant_key(narrow.variant(shape, "fp16", Tile("narrow", 64, 4), kind)) for kind in kinds}
assert len(keys) == 1 + len(QUIET)
"""


def test_a_key_is_the_compiled_kernels_and_of_all_that_it_is_made_from():
    run_script(KEYS)


ORDER = """
import sys
from kaleido_kernels.graph import kernel as graph
from kaleido_kernels.narrow import kernel as narrow
from kaleido_kernels.stream import kernel as stream
from kaleido_kernels.wide import kernel as wide
from kaleido_kernels.proving.fake_driver import variant_key
from kaleido_kernels.graph.plan import GraphTile
from kaleido_kernels.arguments import QUIET
from kaleido_kernels.shapes import NetShape
from kaleido_kernels.tile import Tile
from kaleido_kernels.wide.plan import WideTile

shape, kind = NetShape((3, 9, 3)), QUIET._replace(jitter="normal", init="normal")
makers = {
    "narrow": lambda: narrow.variant(shape, "fp16", Tile("narrow", 64, 4), kind),
    "stream": lambda: stream.variant(shape, "fp16", Tile("stream", 64, 4, 2), kind),
    "wide": lambda: wide.variant(shape, "fp16", WideTile(64, 64, 64, 64, 4, 2), kind),
    "graph": lambda: graph.variant(shape, "fp16", GraphTile(16), kind),
}
keys = {name: variant_key(makers[name]()) for name in sys.argv[1:]}
print(*(keys[name] for name in sorted(keys)))
"""


def test_a_key_does_not_depend_on_what_else_a_process_has_launched():
    names = ["graph", "narrow", "stream", "wide"]
    together = run_script(ORDER, *names).split()
    assert run_script(ORDER, *names[::-1]).split() == together
    for name, key in zip(names, together, strict=True):
        assert run_script(ORDER, name).split() == [key], name


RESTORED = """
import torch
from triton.runtime import JITFunction, driver
from kaleido_kernels.launch import LaunchRequest, allocate_outputs
from kaleido_kernels.schedule import Schedule
from kaleido_kernels.proving.fake_driver import compile_only, fake_device, keys_only
from kaleido_kernels.schedule import Schedule
from kaleido_kernels.launch import LaunchRequest, allocate_outputs
from kaleido_kernels.narrow.kernel import launch_narrow
from kaleido_kernels.narrow.pack import pack_narrow
from kaleido_kernels.shapes import NetShape
from kaleido_kernels.tile import Tile

shape, run = NetShape((3, 9, 3)), JITFunction.run
layers = [(torch.ones(9, 3), torch.ones(9)), (torch.ones(3, 9), torch.ones(3))]
packed = pack_narrow(layers, shape, "fp16")
request = LaunchRequest(5, Schedule(), chain_ids=torch.arange(5))
outputs = allocate_outputs(request, shape, torch.device("cpu"))
outputs.final.fill_(7)
told = []

def launch():
    launch_narrow(packed, request, Tile("narrow", 64, 4), outputs)

for watched in (compile_only, keys_only):
    with fake_device("sm_80") as outer:
        with watched(lambda *all: told.append(all), "sm_90"):
            launch()
        assert driver.active is outer and JITFunction.run is run
    try:
        with watched(None):
            raise KeyError
    except KeyError:
        assert JITFunction.run is run
(_, compiled, arguments, grid), (kernel, key, _, _) = told
assert compiled.metadata.target.arch == 90 and "sm_90" in compiled.asm["ptx"]
assert compiled.hash == key and kernel.__name__ == "narrow_kernel" and grid == (1,)
assert arguments["final_ptr"] is outputs.final and arguments["BLOCK"] == 64
assert list(arguments) == kernel.arg_names
assert outputs.final.eq(7).all(), "something ran"
try:
    launch()  # on tensors in main memory
except (RuntimeError, ValueError):
    pass
else:
    raise AssertionError("the device that is not there has stayed")
"""


def test_a_device_that_is_not_there_runs_nothing_and_goes():
    run_script(RESTORED)


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


DIRECT = """
import sys
from contextlib import contextmanager
import torch
from triton import knobs
from triton.runtime import JITFunction, driver
from kaleido_kernels.launch import LaunchRequest, Outputs
from kaleido_kernels.schedule import Schedule
from kaleido_kernels.proving.fake_driver import fake_device
from kaleido_kernels.schedule import Schedule
from kaleido_kernels.launch import LaunchRequest, Outputs
from kaleido_kernels.narrow.kernel import launch_narrow, narrow_kernel
from kaleido_kernels.narrow.pack import pack_narrow
from kaleido_kernels.shapes import NetShape
from kaleido_kernels.tile import Tile

N = 33
shape = NetShape((3, 9, 3))
layers = [(torch.ones(9, 3), torch.ones(9)), (torch.ones(3, 9), torch.ones(3))]
packed = pack_narrow(layers, shape, "fp16")
calls = []

def launcher(source, metadata):
    def call(x, y, z, stream, function, packed_metadata, launch_metadata, enter, exit, *values):
        plain = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values]
        calls.append((source, function, (x, y, z), plain))
        enter and enter(launch_metadata)
    return call

def state(shift):
    # Values that start ``shift`` of them behind a multiple of 16 bytes.
    whole = torch.zeros(N * 3 + 16)
    first = -whole.data_ptr() // 4 % 4 + shift
    return whole[first : first + N * 3].view(N, 3)

def launch(start=state(0)):
    # The call that reached the launcher, and whether Triton's own path made it.
    request = LaunchRequest(N, Schedule(n_draws=1), seed=7, chain_ids=torch.arange(N), start=start)
    outputs = Outputs(torch.zeros(N, 3), torch.zeros(N), torch.zeros(N, 1, 3))
    usual = []

    def profile(frame, event, argument):
        if event == "call" and frame.f_code is JITFunction.run.__code__:
            usual.append(frame)

    sys.setprofile(profile)
    launch_narrow(packed, request, Tile("narrow", 64, 4), outputs)
    sys.setprofile(None)
    return calls[-1], bool(usual)

def attributes(call):
    # Those of start_ptr.
    return call[0].attrs[(narrow_kernel.arg_names.index("start_ptr"),)]
"""
DIRECT_CASES = {
    "the second launch is direct and as the first": """
(first, usual), (second, again) = launch(), launch()
assert usual and not again
assert first[0] is second[0] and first[1] is second[1] and first[2] == second[2] == (1, 1, 1)
names = narrow_kernel.arg_names
assert len(first[3]) == len(second[3]) == len(names)
moved = {"draws_ptr", "final_ptr", "residual_ptr", "chain_ids_ptr", "saved_ptr", "calm_in_ptr", "calm_ptr", "halt_ptr"}
for name, a, b in zip(names, first[3], second[3]):
    assert a == b or name in moved, name
""",
    "views off a multiple of 16 bytes take another kernel": """
launch()
aligned, usual = launch()
assert attributes(aligned) == [["tt.divisibility", 16]] and not usual
for shift in (1, 2, 3):
    off, usual = launch(state(shift))
    assert attributes(off) == [] and usual and off[1] is not aligned[1], shift
back, usual = launch(state(4))
assert back[1] is aligned[1] and not usual
off, _ = launch(state(1))
assert attributes(off) == []
""",
    "an unaligned first launch is not kept": """
off, _ = launch(state(1))
aligned, usual = launch()
assert usual and attributes(aligned) == [["tt.divisibility", 16]] and off[1] is not aligned[1]
""",
    "each device has its own": """
made = {}
for device in (0, 1, 0, 1):
    fake.device = device
    call, usual = launch()
    assert usual == (device not in made)
    assert made.setdefault(device, call[1]) is call[1], "another device's kernel"
assert made[0] is not made[1]
""",
    "what replaces Triton's path sees every launch": """
launch()
assert not launch()[1]
run, seen = JITFunction.run, []

def watching(self, *args, **kwargs):
    seen.append(self)
    return run(self, *args, **kwargs)

JITFunction.run = watching
launch(), launch()
JITFunction.run = run
assert seen == [narrow_kernel] * 2
assert not launch()[1]
""",
    "hooks are called": """
launch()
narrow_kernel.add_pre_run_hook(lambda *args, **kwargs: seen.append("before"))
entered, seen = [], []
launch()
narrow_kernel.pre_run_hooks.clear()
assert seen == ["before"]
hook = lambda metadata: entered.append(metadata.get()["name"])
knobs.runtime.launch_enter_hook.add(hook)
assert not launch()[1]
knobs.runtime.launch_enter_hook.remove(hook)
assert entered == ["narrow_kernel"]
""",
    "what is compiled for debugging is": """
launch()
knobs.runtime.debug = True
call, usual = launch()
knobs.runtime.debug = False
assert usual and not launch()[1]
""",
    "on AMD the sizes of tensors are compiled in": """
with fake_device("gfx942") as other:
    other.launcher_cls = launcher
    assert launch()[1] and launch()[1]
""",
    "other drivers have their own": """
fake.device = "the first"
launch()
with fake_device() as other:
    other.launcher_cls, other.device = launcher, "the first"
    assert launch()[1] and not launch()[1]
assert not launch()[1]
""",
}


def test_launches_that_leave_tritons_path_out():
    """Each case on a device of its own; the last name printed is that of the one that failed."""
    script = DIRECT
    for name, lines in DIRECT_CASES.items():
        script += f"print({name!r})\nwith fake_device() as fake:\n    fake.launcher_cls = launcher\n"
        script += "".join(f"    {line}\n" for line in lines.splitlines())
    run_script(script)


def test_the_benchmark_of_launches_prints_its_table():
    script = str(ROOT / "benchmarks" / "launch_overhead.py")
    options = ("--network", "points1d", "--network", "points2d", "--precision", "bf16", "--repeats", "2")
    result = run_python(script, *options)
    assert result.returncode == 0, result.stderr[-2000:]
    _, *lines = result.stdout.splitlines()
    assert [line.split()[:3] for line in lines] == [["points1d", "narrow", "bf16"], ["points2d", "narrow", "bf16"]]
    for line in lines:
        call, launch, inside, usual = map(float, line.split()[3:])
        assert min(call, launch, inside, usual) > 0
    refused = run_python(script, "--network", "points1d", interpret="1")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "TRITON_INTERPRET" in refused.stderr
