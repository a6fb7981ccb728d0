"""``kaleido-fast bench``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kaleido_fast import names
from kaleido_fast.cli.output import say_json, say_table
from kaleido_fast.cli.parameters import Name, Output, overwrite_option
from kaleido_fast.errors import InputError
from kaleido_fast.presets import NETWORKS

if TYPE_CHECKING:
    from kaleido_fast.benchmarking.runner import BenchReport, BenchRequest

TERMINAL = Path("-")


@click.command(name="bench", short_help="Time the engines and their peers.")
@click.option("--quick", is_flag=True, help="Short timings: about two minutes on two cores for all six networks.")
@click.option(
    "--net",
    "networks",
    multiple=True,
    metavar="NAME",
    help=f"Reference network; repeatable [default: all six: {', '.join(NETWORKS)}].",
)
@click.option("--model", help="Checkpoint or bundled model to time [default: none].")
@click.option("--chains", "n_chains", type=int, help="Chains of each timing [default: by network].")
@click.option("--steps", "n_steps", type=int, help="Steps of each timing [default: by network].")
@click.option(
    "--engine", type=Name("engine", (*names.ENGINES, "all")), default="auto", show_default=True, help="Engine to time."
)
@click.option(
    "--peers", multiple=True, metavar="NAME", help="Peer to compare with; repeatable; all or none [default: all]."
)
@click.option(
    "--precision",
    type=Name("precision", names.PRECISIONS),
    default="fp32",
    show_default=True,
    help="Precision of the engines: of the operands of products.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--rounds", type=click.IntRange(min=1), help="Timings of each contestant [default: 5, 3 with --quick].")
@click.option(
    "--first-calls/--no-first-calls",
    default=True,
    show_default=True,
    help="Measure first calls and memory in new processes.",
)
@click.option("--json", "json_path", type=Output(), help="Write every raw timing as JSON; - prints it instead.")
@click.option(
    "--readme", type=click.Path(path_type=Path), help="Write the table between the marker comments of this file."
)
@click.option("--picture", type=Output(), help="Draw the results as bars (.png, .svg, .pdf).")
@overwrite_option
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def command(
    json_path: Path | None, readme: Path | None, picture: Path | None, overwrite: bool, quiet: bool, **options: Any
) -> None:
    """Time engines and their peers on the reference networks, in turns, and compare them.

    Every contestant first has to reproduce the reference's states for three steps. Peers whose libraries are missing
    are named and left out: pip install 'kaleido-fast[peers]' brings them. Peers are eager, chunked, compile, published,
    jax, onnxruntime and openvino; on a GPU also cudagraph, eager-fp16, eager-bf16, chunked-fp16, cudagraph-fp16 and
    compile-fp16. A first look takes some seconds: kaleido-fast bench --quick --net digits --peers eager
    """
    from kaleido_fast.benchmarking import bars, report
    from kaleido_fast.benchmarking.runner import run_bench
    from kaleido_fast.system.outputs import claimed

    if readme is not None:
        report.check_readme(readme)
    if picture is not None:
        bars.check_picture(picture)
    request = make_request(**options)
    sources = {f"model {network.name}": network.path for network in request.networks}
    claim = claimed(
        {"list of timings": None if json_path == TERMINAL else json_path, "picture": picture},
        {**sources, "README": readme},
        overwrite=overwrite,
        remedy="give another name",
    )
    click.get_current_context().with_resource(claim)
    with _bench_bar(quiet or json_path == TERMINAL) as progress:
        results = run_bench(request, progress)
    if json_path is not None and json_path != TERMINAL:
        report.write_json(results, json_path)
    if readme is not None and not results.lost:
        report.write_readme(results, readme)
    if picture is not None and not results.lost:
        bars.save_bars(results, picture)
    if json_path == TERMINAL:
        say_json(report.as_record(results))
    elif not quiet:
        _print(results)
    if results.lost:
        kept = "".join(f", {path} left as it is" for path in (readme, picture) if path is not None)
        raise InputError(f"{results.lost}: {', '.join(results.unmeasured)} not measured{kept}; run it again")


def make_request(
    *, networks: tuple[str, ...], model: str | None, peers: tuple[str, ...], device: str, precision: str, **options: Any
) -> BenchRequest:
    """The request that the options of the command describe; what can be refused is refused here."""
    from kaleido_fast.benchmarking.cases import find_networks
    from kaleido_fast.benchmarking.peers import choose_peers
    from kaleido_fast.benchmarking.runner import BenchRequest
    from kaleido_fast.system.devices import resolve_device

    for name in ("n_chains", "n_steps"):
        if options[name] is not None and options[name] < 1:
            raise InputError(f"{name} is {options[name]}: it must be at least 1")
    target = resolve_device(device)
    asked = tuple(name for text in peers for name in text.split(",") if name)
    chosen, skipped = choose_peers(asked, target, quick=options["quick"])
    found = find_networks(tuple(name for text in networks for name in text.split(",") if name), model)
    return BenchRequest(found, peers=chosen, skipped=skipped, precision=precision, device=target, **options)


@contextlib.contextmanager
def _bench_bar(quiet: bool) -> Iterator[Callable[[float, str], None]]:
    from kaleido_fast.system.bars import progress_bar

    if quiet:
        yield lambda share, text: None
        return
    with progress_bar() as bar:
        task = bar.add_task("benchmark", total=1.0, rate="")
        yield lambda share, text: bar.update(task, completed=share, rate=text)


def _print(results: BenchReport) -> None:
    from kaleido_fast.benchmarking.report import remarks, tables

    for table in tables(results):
        say_table(table)
    for line in remarks(results):
        click.echo(line)
