"""Configurations of `fast_sample` and `sample_op`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import kaleido_fast as kf
from benchmarks.bits.case import Case, Found, Note
from benchmarks.bits.networks import (
    CYCLING,
    LARGER,
    NETWORKS,
    SHAPES,
    Network,
    around_mlp,
    given_states,
    normed,
    not_finite,
    residual,
    sequential,
)

Options = dict[str, Any]

JITTERED: Options = {"burn_in": 4, "jitter": 0.3, "settle": 1}
RECURSIONS: dict[str, Options] = {
    "still": {"burn_in": 4, "tol": None},
    "normal": JITTERED,
    "uniform": {**JITTERED, "noise": "uniform"},
    "upstream": {"burn_in": 4, "noise": "upstream"},
    "upstream-far": {"burn_in": 3, "noise": "upstream", "jitter": 0.2, "n_draws": 2},
    "init-normal": {"burn_in": 2, "init": "normal", "tol": None},
    "no-step-clean": {"burn_in": 4, "jitter": 0.3, "settle": 0},
    "draws": {"burn_in": 3, "n_draws": 3, "thin": 4, "jitter": 0.2, "settle": 2},
    "late-ids": {**JITTERED, "first_chain": 2**40 + 7, "seed": 2**63 + 5},
    "freeze": {"burn_in": 23, "tol": 0.02},
    "patient": {"burn_in": 23, "tol": 0.05, "patience": 3, "check_every": 5},
    "freeze-draws": {"burn_in": 7, "n_draws": 4, "thin": 4, "tol": 0.05, "max_period": 8},
    "blocks": {**JITTERED, "n_chains": 70, "block_chains": 24},
    "blocks-freeze": {"burn_in": 15, "tol": 0.05, "n_chains": 70, "block_chains": 24},
    "z0": {"burn_in": 2, "z0": "given", "tol": None},
    "trace": {**JITTERED, "trace": kf.Trace(chains=(0, 3, 7), steps=(0, 1, 4, 5))},
    "trace-freeze": {"burn_in": 15, "tol": 0.05, "trace": kf.Trace(chains=(2, 5), steps=(0, 3, 16))},
}
LONG_RECURSIONS: dict[str, Options] = {
    "defaults": {},
    "mixing": {"burn_in": 5, "n_draws": 12, "jitter": 0.3},
    "many-freeze": {"n_chains": 300, "burn_in": 99, "tol": 1e-4, "n_draws": 3, "thin": 7},
    "one-chain": {"n_chains": 1, "burn_in": 9, "tol": None},
}
CYCLES: dict[str, Options] = {
    "cycle": {"burn_in": 39, "max_period": 8},
    "retire": {"burn_in": 39, "max_period": 8, "retire_cycles": True, "n_draws": 4, "thin": 3},
    "no-cycle": {"burn_in": 19, "max_period": 1},
}
FLOW: Options = {"sampler": "flow", "steps": 4}
FLOWS: dict[str, Options] = {
    "flow": FLOW,
    "flow-draws": {**FLOW, "n_draws": 3, "noise_from": 1.0, "noise_to": 0.05},
    "flow-one-step": {**FLOW, "steps": 1, "n_draws": 2},
    "flow-late-ids": {**FLOW, "first_chain": 2**40 + 7, "seed": 2**63 + 5, "n_draws": 2},
    "flow-blocks": {**FLOW, "n_chains": 70, "block_chains": 24},
    "flow-z0": {**FLOW, "z0": "given", "n_draws": 2},
    "flow-trace": {**FLOW, "n_draws": 2, "trace": kf.Trace(chains=(0, 3, 7), steps=(0, 1, 4, 5, 8))},
}
KERNELS = ("narrow", "stream", "wide", "graph")
# In the interpreter by kernel "narrow" alone: they take a second and more.
LENGTHY = {"blocks", "blocks-freeze", "trace", "trace-freeze", "init-normal", "no-step-clean", "patient"}


def sampled(network: Network, options: Options) -> Found:
    """A call of `fast_sample`: all of its result that does not depend on the time."""
    model, options = network(), {"n_chains": 12, **options}
    if isinstance(options.get("z0"), str):
        options["z0"] = given_states(model, options["n_chains"])
    result = kf.fast_sample(model, **options)
    parts = [getattr(result, name) for name in ("draws", "residual", "steps", "period", "outcome", "trace")]
    plan = result.plan
    return [
        Note(f"{plan.engine}; {plan.kernel}; blocks of {plan.block_chains}"),
        *parts,
        result.stats,
        result.request.as_dict(),
        result.model_hash,
    ]


def sampling(name: str, network: Network, interpreted: bool = False, **options: Any) -> Case:
    return Case(name, partial(sampled, network, options), interpreted)


def host_cases() -> Iterator[Case]:
    """Engines that need no GPU."""
    for engine in ("reference", "cpu"):
        for net, network in NETWORKS.items():
            yield sampling(f"{engine}/{net}", network, engine=engine, **RECURSIONS["draws"])
        for name, options in {**RECURSIONS, **LONG_RECURSIONS, **FLOWS}.items():
            yield sampling(f"{engine}/small/{name}", SHAPES["small"], engine=engine, **options)
        for net, network in CYCLING.items():
            for name, options in CYCLES.items():
                yield sampling(f"{engine}/{net}/{name}", network, engine=engine, **options)
        for precision in ("fp64", "tf32", "fp16", "bf16"):
            for name, options in (("draws", RECURSIONS["draws"]), ("freeze", RECURSIONS["freeze"]), ("flow", FLOW)):
                options = {"engine": engine, "precision": precision, **options}
                yield sampling(f"{engine}/small/{name}/{precision}", SHAPES["small"], **options)
            if precision != "fp64":
                polished = {"engine": engine, "precision": precision, "polish": 3, **RECURSIONS["draws"]}
                yield sampling(f"{engine}/unequal/polish/{precision}", SHAPES["unequal"], **polished)
    for place, device in enumerate(
        ("cpu", "cpu:0", ["cpu"], ["cpu", "cpu"], "auto", torch.device("cpu"), [], "cuda:7")
    ):
        yield sampling(f"devices/{place}", SHAPES["small"], device=device, **JITTERED)
    yield sampling("digits/jitter", lambda: "attractors", n_chains=20)
    yield sampling("digits/freeze", lambda: "builtin:digits", n_chains=20, jitter=0, burn_in=60)
    yield sampling("digits/draws", lambda: "attractors", n_chains=4, n_draws=4, burn_in=3, thin=9, engine="reference")


def triton_cases() -> Iterator[Case]:
    """Kernels, in Triton's interpreter."""
    for kernel in KERNELS:
        on: Options = {"interpreted": True, "engine": "triton", "kernel": kernel}
        for name, options in RECURSIONS.items():
            if kernel == "narrow" or name not in LENGTHY:
                yield sampling(f"triton/{kernel}/tiny/{name}", SHAPES["tiny"], **on, **options)
        for net in ("small", "bottleneck", "unequal", "one-layer", "some-bias", "sigmoid-part", "steep-leak", "gelu"):
            yield sampling(f"triton/{kernel}/{net}", SHAPES[net], **on, **JITTERED)
        for precision in ("tf32", "fp16", "bf16"):
            low: Options = {**on, "precision": precision}
            yield sampling(f"triton/{kernel}/small/{precision}", SHAPES["small"], **low, burn_in=2, tol=None)
            yield sampling(f"triton/{kernel}/tiny/polish/{precision}", SHAPES["tiny"], **low, **JITTERED, polish=2)
        for net in ("even128", "faint-layer", "past-fp16", "overflow", "wide300"):
            yield sampling(f"triton/{kernel}/{net}", LARGER[net], **on, burn_in=1, tol=None)
    on = {"interpreted": True, "engine": "triton"}
    for name, options in CYCLES.items():
        yield sampling(f"triton/turn/{name}", CYCLING["turn"], **on, **options)
    for net in ("past-fp16", "faint-layer"):
        for precision in ("fp16", "tf32"):
            yield sampling(f"triton/{net}/{precision}", LARGER[net], **on, precision=precision, burn_in=1, tol=None)
    for net in ("relu", "leaky_relu", "gelu_tanh", "silu", "tanh", "sigmoid", "tanh-part", "deep", "one-value"):
        yield sampling(f"triton/{net}", SHAPES[net], **on, **JITTERED)
    yield sampling("triton/auto-in-interpreter", SHAPES["small"], interpreted=True, **JITTERED)
    yield sampling("triton/digits", lambda: "attractors", kernel="stream", interpreted=True, n_chains=8, burn_in=1)


def module_cases() -> Iterator[Case]:
    """Modules of the caller: general ones, and those that are an MLP after all."""
    place: Options = {"dim": 6, "data_range": (-1.0, 1.0)}
    for name, options in (
        ("draws", RECURSIONS["draws"]),
        ("freeze", RECURSIONS["freeze"]),
        ("tile-7", {**JITTERED, "n_chains": 20, "tile_chains": 7}),
        ("tile-16", {**JITTERED, "n_chains": 20, "tile_chains": 16}),
        ("fp64", {**JITTERED, "precision": "fp64"}),
        ("by-cpu", {**JITTERED, "engine": "cpu"}),
        ("bf16", {**JITTERED, "precision": "bf16"}),
        ("two-devices", {**JITTERED, "device": ["cpu", "cpu:0"]}),
        ("blocks", RECURSIONS["blocks"]),
        ("range", {**JITTERED, "data_range": (-0.1, 0.1)}),
        ("flow", FLOWS["flow-draws"]),
    ):
        yield sampling(f"module/residual/{name}", residual, **{**place, **options})
    yield sampling("module/residual/no-dim", residual, **JITTERED)
    yield sampling("module/around-mlp", around_mlp, **place, **JITTERED)
    yield sampling("module/sequential", sequential, **JITTERED)
    yield sampling("module/sequential/range", sequential, **JITTERED, data_range=(0.1, 0.9))
    yield sampling("module/normed", normed, **JITTERED)
    yield sampling("module/double", lambda: SHAPES["small"]().double(), **JITTERED, engine="reference")
    yield sampling("module/half", lambda: SHAPES["small"]().bfloat16(), **JITTERED)


def op_cases() -> Iterator[Case]:
    """The operator; its plan is not to be seen."""

    def run(options: Options) -> Found:
        model, options = SHAPES["small"](), {"n_chains": 12, **options}
        if "z0" in options:
            options["z0"] = given_states(model, options["n_chains"])
        return list(kf.sample_op(model, **options))

    for name in ("still", "normal", "uniform", "draws", "late-ids", "freeze", "freeze-draws", "blocks", "z0"):
        yield Case(f"op/{name}", partial(run, RECURSIONS[name]))
    for name, options in (
        ("upstream", {"noise": "upstream", "jitter": 0.01, "burn_in": 4}),
        ("retire", {"burn_in": 39, "tol": 0.01, "retire_cycles": True, "n_draws": 2}),
        ("polish", {**JITTERED, "precision": "tf32", "polish": 2, "engine": "reference"}),
        ("fp64", {**JITTERED, "precision": "fp64"}),
        ("cuda", {**JITTERED, "engine": "triton"}),
        ("flow", FLOWS["flow-draws"]),
        ("tol-with-jitter", {"jitter": 0.1, "tol": 0.1}),
        ("true-chains", {"n_chains": True}),
    ):
        yield Case(f"op/{name}", partial(run, options))
    yield Case("op/narrow", partial(run, {**JITTERED, "kernel": "narrow"}), interpreted=True)


REFUSED: dict[str, Options] = {
    "no-chains": {"n_chains": 0},
    "half-chain": {"n_chains": 1.5},
    "seed": {"seed": -1},
    "init": {"init": "gauss"},
    "noise": {"noise": "norml"},
    "precision": {"precision": "fp8"},
    "engine": {"engine": "gpu"},
    "kernel": {"kernel": "broad"},
    "kernel-of-cpu": {"kernel": "wide", "engine": "cpu"},
    "no-gpu": {"engine": "triton"},
    "jitter": {"jitter": float("nan")},
    "tol": {"tol": 0.0},
    "tol-with-jitter": {"tol": 0.1, "jitter": 0.1},
    "copies": {"n_draws": 3, "thin": 2, "settle": 2, "jitter": 0.1},
    "settle-upstream": {"noise": "upstream", "settle": 2},
    "polish-fp32": {"polish": 2},
    "polish-long": {"polish": 99, "burn_in": 5, "precision": "tf32"},
    "too-many-steps": {"burn_in": 2**31},
    "trace-chain": {"trace": kf.Trace((12,), (0,))},
    "trace-step": {"trace": kf.Trace((0,), (999,))},
    "z0-shape": {"z0": torch.zeros(3, 6)},
    "z0-range": {"z0": torch.full((12, 6), 2.0)},
    "tile-of-mlp": {"tile_chains": 8},
    "block": {"block_chains": 0},
    "steps": {"sampler": "flow", "steps": 0},
    "noise-to": {"sampler": "flow", "noise_to": 0.9},
    "steps-of-kaleidoscope": {"steps": 3},
    "jitter-of-flow": {"sampler": "flow", "jitter": 0.1},
    "dim": {"dim": 7},
    "range": {"data_range": (0.0, 2.0)},
}


def refused_cases() -> Iterator[Case]:
    """Bad values: the text is hashed."""
    for name, options in REFUSED.items():
        yield sampling(f"refused/{name}", SHAPES["small"], **options)
    yield sampling("refused/weights", not_finite)
    yield sampling("refused/no-model", lambda: 3)
    yield sampling("refused/unknown-model", lambda: "digit")
    shape: Options = {"widths": (3, 4, 3)}
    for name, spec in (("widths", {"widths": (3, 4)}), ("bound", {"bound": "relu"}), ("low", {"low": -2.0})):
        yield Case(f"refused/spec-{name}", partial(specified, {**shape, **spec}))


def specified(options: Options) -> Found:
    return [kf.ModelSpec(**options)]
