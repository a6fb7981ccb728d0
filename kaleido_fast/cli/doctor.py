"""``kaleido-fast doctor``."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import click

from kaleido_fast import names
from kaleido_fast.cli.output import say_json

if TYPE_CHECKING:
    from kaleido_fast.model import ModelSpec
    from kaleido_fast.planning.facts import DeviceFacts
    from kaleido_kernels.precision import WeightsRange


@click.command(name="doctor", short_help="Show versions, devices, and which engine would run.")
@click.option("--model", default=names.DEFAULT_MODEL, show_default=True, help="Bundled model or path of a checkpoint.")
@click.option(
    "--chains",
    "n_chains",
    type=click.IntRange(min=1),
    default=100_000,
    show_default=True,
    help="Size of the run to plan.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(model: str, n_chains: int, device: str, as_json: bool) -> None:
    """Show versions, devices, and which engine would run and why: what a bug report should contain."""
    facts = examine(model, n_chains, device)
    if as_json:
        say_json(facts)
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        click.echo(f"{name:{width}}  {text}")


def _kernels(spec: ModelSpec, weights: WeightsRange, gpu: DeviceFacts) -> dict[str, str]:
    """The kernel and tile that would run on a GPU, by precision."""
    from kaleido_fast.planning.plan import plan_kernel

    kernels = {}
    for precision in [name for name in names.PRECISIONS if name != "fp64"]:
        try:
            text = plan_kernel(spec, precision, gpu, weights).explain()
        except ValueError as problem:
            text = f"no: {problem}"
        kernels[f"{precision} on {gpu.name}"] = text
    return kernels


def examine(model: str, n_chains: int, device: str) -> dict[str, Any]:
    """Facts about this installation and the plan for one run, as plain values."""
    import torch

    from kaleido_fast.engines.available import plan_here
    from kaleido_fast.errors import InputError
    from kaleido_fast.planning.facts import H200
    from kaleido_fast.planning.request import SampleRequest
    from kaleido_fast.running.subject import resolve_subject
    from kaleido_fast.system.devices import cpu_name, device_facts, resolve_device
    from kaleido_fast.system.versions import library_versions

    target = resolve_device(device)
    facts = device_facts(target)
    subject = resolve_subject(model)
    spec, weights = subject.spec, subject.weights_range
    assert spec is not None  # of a checkpoint
    plans: dict[str, str] = {}
    for engine in names.ENGINES:
        try:
            request = SampleRequest(n_chains=n_chains, engine=engine)
            plans[engine] = plan_here(request, spec, facts, spec.dim, weights=weights).explain()
        except InputError as problem:
            plans[engine] = f"no: {problem}"
    return {
        "versions": library_versions("triton", "numba", "click", "safetensors", "rich", "pillow"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": f"{cpu_name()}, {torch.get_num_threads()} threads in use",
        "device": f"{target}: {facts.name}, {facts.memory / 2**30:.1f} GiB free",
        "tuned tiles": f"{len(facts.tuned)} of this GPU" if facts.tuned else "none: kaleido-fast tune, on a GPU",
        "model": f"{model}: {'-'.join(map(str, spec.widths))}",
        **{f"--engine {engine}": text for engine, text in plans.items()},
        **_kernels(spec, weights, facts if facts.kind == "cuda" else H200),
    }
