"""What engines are compared with: one adapter a file, each with ``build(setting) -> Contestant``."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kaleido_fast.benchmarking.contest import Contestant, Procedure, one_line
from kaleido_fast.errors import InputError, unknown_name
from kaleido_fast.model import KaleidoMLP

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """What an adapter gets.

    Args:
        model: on ``device``, without gradients.
        n_chains: rows of every call.
        device: where the states lie.
        threads: CPU threads that every contestant may use.
        quick: whether to spend little time on finding the best variant.
        precision: of weights and states, where the adapter has a choice.
        seconds: after which no further variant is tried.
    """

    model: KaleidoMLP
    n_chains: int
    device: torch.device
    threads: int
    quick: bool = False
    precision: str = "fp32"
    seconds: float = math.inf

    def network(self) -> tuple[KaleidoMLP, torch.dtype]:
        """The model and its dtype in this precision; a copy where that is not fp32."""
        dtype = DTYPES[self.precision]
        return (self.model if dtype == torch.float32 else copy.deepcopy(self.model).to(dtype)), dtype


@dataclass(frozen=True)
class Peer:
    """An entry of the registry.

    Args:
        name: as in ``--peers``.
        module: of this package, or one of another package (with a dot).
        about: what it is, in a few words.
        needs: modules that must be importable.
        devices: kinds of device it runs on.
        in_quick: part of a quick run where no peer is named.
        precision: of its weights and states.
        any_rows: whether it takes any number of chains, whatever it was built for.
    """

    name: str
    module: str
    about: str
    needs: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    in_quick: bool = True
    precision: str = "fp32"
    any_rows: bool = False


CPU, GPU = ("cpu",), ("cuda",)
BITS = {"fp64": 64, "fp32": 32, "tf32": 32, "fp16": 16, "bf16": 16}  # of operands: whose speeds may be compared
PEERS = {
    peer.name: peer
    for peer in (
        Peer("eager", "eager", "x = model(x) in a loop", any_rows=True),
        Peer("chunked", "chunked", "eager over chunks, the best of several sizes"),
        # a cold start of the C++ compiler alone took 50 s
        Peer("compile", "compile", "torch.compile, the best of its modes", in_quick=False),
        # hardly slower than eager, and a tenth of the time of a quick run
        Peer(
            "published",
            "published",
            "the published procedure: noise, error and clamp each step",
            in_quick=False,
            any_rows=True,
        ),
        Peer("jax", "jax", "jit of a loop over the steps", ("jax",)),
        Peer("onnxruntime", "onnxruntime", "one session call a step, bound buffers", ("onnxruntime", "onnx")),
        Peer("openvino", "openvino", "one inference call a step, bound buffers", ("openvino", "onnx"), CPU),
        Peer("cudagraph", "cudagraph", "eager, one step in a CUDA graph", devices=GPU),
        Peer("eager-fp16", "eager", "eager in 16-bit floats", devices=GPU, precision="fp16", any_rows=True),
        Peer("eager-bf16", "eager", "eager in bfloat16", precision="bf16", any_rows=True),
        Peer("chunked-bf16", "chunked", "chunked in bfloat16", devices=CPU, in_quick=False, precision="bf16"),
        Peer("openvino-bf16", "openvino", "openvino in bfloat16", ("openvino", "onnx"), CPU, precision="bf16"),
        Peer("chunked-fp16", "chunked", "chunked in 16-bit floats", devices=GPU, precision="fp16"),
        Peer("cudagraph-fp16", "cudagraph", "cudagraph in 16-bit floats", devices=GPU, precision="fp16"),
        Peer("compile-fp16", "compile", "compile in 16-bit floats", devices=GPU, in_quick=False, precision="fp16"),
    )
}


def find_peer(name: str) -> Peer:
    """The peer called ``name``; an unknown one raises `InputError` with the nearest name."""
    if name not in PEERS:
        raise unknown_name("peer", name, ("all", "none", *PEERS))
    return PEERS[name]


def why_absent(peer: Peer, device: torch.device) -> str | None:
    """Why a peer cannot run here; None if it can."""
    if device.type not in peer.devices:
        return f"runs on {' and '.join(peer.devices)} only"
    missing = missing_modules(peer)
    if missing:
        return f"{' and '.join(missing)} not installed: pip install 'kaleido-fast[peers]'"
    return None


def missing_modules(peer: Peer) -> list[str]:
    """Modules that a peer needs and that are not installed."""
    return [name for name in peer.needs if importlib.util.find_spec(name) is None]


def same_bits(precision: str, other: str) -> bool:
    """Whether operands have as many bits, so that speeds may be compared."""
    return BITS[precision] == BITS[other]


def choose_peers(
    names: tuple[str, ...], device: torch.device, *, quick: bool, precisions: Iterable[str] = ("fp32",)
) -> tuple[list[Peer], dict[str, str]]:
    """Peers to time and, by name, why others are left out.

    Args:
        names: peers asked for; "all" or nothing for every one that can run here, "none" for none.
        device: where.
        quick: leave out those that take long to build, unless asked for by name.
        precisions: of the engines that they are compared with.

    Raises:
        InputError: an unknown name, or one asked for that cannot run here, or has nobody to be compared with.
    """
    if names == ("none",):
        return [], {}
    precisions, chosen, skipped = list(precisions), [], {}
    by_name = bool(names) and "all" not in names
    for peer in [find_peer(name) for name in names if name != "all"] if by_name else PEERS.values():
        reason = why_absent(peer, device)
        if reason is None and not any(same_bits(peer.precision, precision) for precision in precisions):
            reason = f"computes in {peer.precision}, no engine does: give --precision {peer.precision}"
        if by_name and reason:
            raise InputError(f"peer {peer.name!r} {reason}")
        if reason is None and quick and not by_name and not peer.in_quick:
            reason = "takes long: name it with --peers, or leave out --quick"
        if reason:
            skipped[peer.name] = reason
        else:
            chosen.append(peer)
    return list(dict.fromkeys(chosen)), skipped


def build_peer(peer: Peer, setting: Setting) -> Contestant:
    """Load a peer's adapter and build it in the peer's precision."""
    adapter = importlib.import_module(peer.module if "." in peer.module else f"{__name__}.{peer.module}")
    return adapter.build(replace(setting, precision=peer.precision))


def fastest(
    variants: Mapping[str, Callable[[], Procedure]], z0: Tensor, seconds: float = math.inf
) -> tuple[Procedure, str]:
    """The variant with the fastest two steps; one that fails costs itself alone.

    Args:
        variants: builders by name, in the order of their trial.
        z0: start states of the steps.
        seconds: after which no further variant is tried, once one works.

    Returns:
        (the run, a few words: which one it is, and why others failed).

    Raises:
        InputError: none works; with the reasons.
    """
    began, runs, problems = time.perf_counter(), dict[str, tuple[float, Procedure]](), dict[str, str]()
    for name, build in variants.items():
        if runs and time.perf_counter() - began > seconds:
            break
        try:
            run = build()
            runs[name] = (two_steps_seconds(run, z0), run)
        except Exception as problem:  # another project's compiler: any error is a reason to take another variant
            problems[name] = one_line(problem)
    failed = [f"{name} failed: {text}" for name, text in problems.items()]
    if not runs:
        raise InputError("; ".join(failed))
    best = min(runs, key=lambda name: runs[name][0])
    return runs[best][1], "; ".join([best, *failed])


def two_steps_seconds(run: Procedure, z0: Tensor) -> float:
    """Seconds of two steps, after three that are not timed: how adapters choose between variants."""
    float(run(z0, 3)[0, 0])  # reading a value waits for the device
    began = time.perf_counter()
    float(run(z0, 2)[0, 0])
    return time.perf_counter() - began


def forget_compiled(peers: Iterable[Peer]) -> None:
    """Before another network: past torch's limit of recompilations the next ones would be left to eager torch."""
    if any(peer.module == "compile" for peer in peers):
        torch.compiler.reset()
