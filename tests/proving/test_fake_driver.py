"""Devices that are not there: keys of what is compiled for them, and nothing runs."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from compiling import run_script

KEYS = """
from dataclasses import replace
import torch
from kaleido_kernels.graph import kernel as graph
from kaleido_kernels.narrow import kernel as narrow
from kaleido_kernels.onchip import kernel as onchip
from kaleido_kernels.onchip.plan import OnchipTile
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


GLUON = """
from dataclasses import replace
from ring_kernel import ring_variant
from kaleido_kernels.proving.fake_driver import compile_variant, variant_key

variants = [ring_variant(1), ring_variant(2), ring_variant(2, layers=3)]
variants += [replace(variants[0], signature={**variants[0].signature, "scratch_ptr": "*bf16"})]
keys = {variant_key(variant) for variant in variants}
assert len(keys) == 4
made = [compile_variant(variant) for variant in variants[:3]]
assert {each.hash for each in made} | {variant_key(variants[3])} == keys
assert [each.metadata.num_warps for each in made] == [8, 12, 12]
assert all("brx.idx" in each.asm["ptx"] and each.metadata.tensordesc_meta[0]["swizzle"] == 3 for each in made)
"""


def test_a_gluon_kernel_is_compiled_from_its_signature_with_layouts():
    run_script(GLUON)


ORDER = """
import sys
from kaleido_kernels.graph import kernel as graph
from kaleido_kernels.narrow import kernel as narrow
from kaleido_kernels.onchip import kernel as onchip
from kaleido_kernels.onchip.plan import OnchipTile
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
    "onchip": lambda: onchip.variant(shape, "fp16", OnchipTile(3), kind),
    "stream": lambda: stream.variant(shape, "fp16", Tile("stream", 64, 4, 2), kind),
    "wide": lambda: wide.variant(shape, "fp16", WideTile(64, 64, 64, 64, 4, 2), kind),
    "graph": lambda: graph.variant(shape, "fp16", GraphTile(16), kind),
}
keys = {name: variant_key(makers[name]()) for name in sys.argv[1:]}
print(*(keys[name] for name in sorted(keys)))
"""


def test_a_key_does_not_depend_on_what_else_a_process_has_launched():
    names = ["graph", "narrow", "onchip", "stream", "wide"]
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
