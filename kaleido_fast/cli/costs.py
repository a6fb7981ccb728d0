"""What a large run costs: device hours, bytes, files, operations on storage, and work lost to preemption.

    python benchmarks/costs.py --network digits --chains 1e9 --rate 1.7e8 --workers 8 --dtype uint8
    python benchmarks/costs.py --network points2d --chains 1e12 --rate model     # rate from a model of an H200
    python benchmarks/costs.py --check     # the arithmetic against real runs of 100,000 and 1,000,000 chains here

docs/scaling.md explains every figure. Only --check measures anything: results are as good as the numbers given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from kaleido_fast import names
from kaleido_fast.benchmarking.costs.arithmetic import LargeRun, storage, times
from kaleido_fast.benchmarking.costs.checking import check, run_until_killed
from kaleido_fast.benchmarking.costs.planned import DEVICE_PRECISIONS, make_layout, modelled_rate
from kaleido_fast.benchmarking.costs.text import as_lines, remarks
from kaleido_fast.benchmarking.program import run_program
from kaleido_fast.cli.parameters import Name, NumberOr
from kaleido_fast.errors import InputError
from kaleido_fast.planning.merging import recommended_sampler
from kaleido_fast.presets import NETWORKS, find_preset


@click.command(help=__doc__)
@click.option("--network", type=Name("network", tuple(NETWORKS)), default="digits", show_default=True, help="Sizes.")
@click.option(
    "--chains", type=click.FloatRange(min=1), default=1e9, show_default=True, help="Number of chains, such as 1e9."
)
@click.option("--steps", type=click.IntRange(min=1), help="Steps of a chain [default: as recommended for the network].")
@click.option("--draws", type=click.IntRange(min=1), default=1, show_default=True, help="Draws kept per chain.")
@click.option(
    "--dtype", type=Name("dtype", names.STORED_DTYPES), default="float32", show_default=True, help="As stored."
)
@click.option("--chunk-chains", type=click.IntRange(min=1), help="Chains of a block [default: as the plan chooses].")
@click.option(
    "--on",
    "device",
    type=click.Choice(["gpu", "cpu"]),
    default="gpu",
    show_default=True,
    help="Kind of device to plan for.",
)
@click.option(
    "--rate",
    type=NumberOr(float, model="model"),
    default="model",
    help="Chain-steps per second of one worker, or 'model': of an H200, computed from its roofline, not measured.",
)
@click.option(
    "--precision",
    type=click.Choice(list(DEVICE_PRECISIONS)),
    default="fp32",
    show_default=True,
    help="Of --rate model.",
)
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Devices at work at once.")
@click.option(
    "--group", type=click.IntRange(min=1), help="Workers that restart together [default: all, as under torchrun]."
)
@click.option(
    "--bandwidth",
    type=click.FloatRange(min=0, min_open=True),
    default=500.0,
    show_default=True,
    help="MB/s a worker can write.",
)
@click.option(
    "--operation-ms",
    type=click.FloatRange(min=0),
    default=20.0,
    show_default=True,
    help="Milliseconds until a small file is durable on the storage.",
)
@click.option(
    "--stored-share",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Bytes on disk per byte of the arrays; --check measures it.",
)
@click.option(
    "--preemptions", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Per worker and hour."
)
@click.option(
    "--restart",
    type=click.FloatRange(min=0),
    default=120.0,
    show_default=True,
    help="Seconds from a preemption until the group computes again.",
)
@click.option(
    "--simulate",
    "simulated",
    type=click.IntRange(min=0),
    default=0,
    help="Also simulate this many runs, with preemptions by chance.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, times in hours or as named.")
@click.option(
    "--check", "checks", is_flag=True, help="Compare the arithmetic with real runs on this machine, in minutes."
)
@click.option("--kill-after", type=float, hidden=True)
@click.option("--kill-out", type=click.Path(path_type=Path), hidden=True)
def command(**given: Any) -> None:
    if given["checks"]:
        check(click.echo)
        return
    preset = find_preset(given["network"], "attractors")
    if not math.isfinite(given["chains"]):
        raise InputError(f"chains is {given['chains']}: it must be a finite number")
    n_chains = round(given["chains"])
    n_steps = given["steps"] or _recommended_steps(preset.sampling)
    if given["kill_after"] is not None:
        run_until_killed(given["network"], n_chains, n_steps, given["kill_after"], given["kill_out"])
        return
    run = make_run(n_chains, n_steps, given)
    if given["as_json"]:
        finite = {name: value if math.isfinite(value) else None for name, value in times(run).items()}
        click.echo(json.dumps({**storage(run), **finite, "notes": remarks(run)}, sort_keys=True))
    else:
        click.echo("\n".join(as_lines(run, simulated=given["simulated"])))


def _recommended_steps(sampling: Mapping[str, Any]) -> int:
    """Steps of the first draw."""
    if recommended_sampler(sampling) == "flow":
        return int(sampling.get("steps", names.DEFAULT_STEPS))
    return int(sampling["burn_in"] + sampling.get("thin", names.DEFAULT_THIN))


def make_run(n_chains: int, n_steps: int, given: dict[str, Any]) -> LargeRun:
    """The run that the options of the command describe.

    Raises:
        InputError: values that do not fit together.
    """
    rate, workers, group = given["rate"], given["workers"], given["group"] or given["workers"]
    if workers % group:
        raise InputError(
            f"{workers} workers in groups of {group}: the groups must be equal; pass a divisor of {workers}"
        )
    if rate != "model" and not (math.isfinite(rate) and rate > 0):
        raise InputError(f"rate is {rate}: it must be a finite number above 0, in chain-steps per second")
    layout = make_layout(
        given["network"], n_chains, given["draws"], given["dtype"], given["chunk_chains"], given["device"]
    )
    return LargeRun(
        layout,
        n_steps,
        modelled_rate(given["network"], given["precision"]) if rate == "model" else rate,
        workers,
        group,
        given["bandwidth"] * 1e6,
        given["operation_ms"] / 1e3,
        given["stored_share"],
        given["preemptions"] / 3600,
        given["restart"],
    )


def main() -> None:
    """Run the command line and end this process; a wrong prediction of --check is an error too."""
    run_program(command, "costs.py", "give the command again")


if __name__ == "__main__":
    main()
