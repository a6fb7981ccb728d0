"""Launches that leave Triton's own path out: the same kernels and arguments, and the usual path where it is needed."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from compiling import ROOT, run_python, run_script

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
