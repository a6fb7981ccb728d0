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
from kaleido_fast.errors import InputError, unknown_name
from kaleido_fast.presets import NETWORKS

if TYPE_CHECKING:
    from kaleido_fast.benchmarking.results import BenchReport
    from kaleido_fast.benchmarking.runner import BenchRequest

TERMINAL = Path("-")


@click.command(name="bench", short_help="Time the engines and their peers.")
@click.option("--quick", is_flag=True, help="Short timings: some four minutes on two idle cores for all networks.")
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
    "precisions",
    multiple=True,
    metavar="NAME",
    help="Precision of the engines, of the operands of products: "
    f"{', '.join(names.PRECISIONS)}; repeatable [default: fp32, and bf16 on a CPU that multiplies it natively].",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--rounds", type=click.IntRange(min=1), help="Timings of each contestant [default: 5, 3 with --quick].")
@click.option(
    "--first-calls/--no-first-calls",
    default=True,
    show_default=True,
    help="Measure first calls and memory in new processes; --quick for the first network only.",
)
@click.option("--json", "json_path", type=Output(), help="Write every raw timing as JSON; - prints it instead.")
@click.option(
    "--readme",
    "readme_path",
    type=click.Path(path_type=Path),
    help="Write the table between the marker comments of this file, in place of that of the same instruction set.",
)
@click.option("--picture", type=Output(), help="Draw the results as bars (.png, .svg, .pdf).")
@click.option("--busy", is_flag=True, help="Measure although other processes use the cores; the table will say so.")
@overwrite_option
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def command(
    json_path: Path | None, readme_path: Path | None, picture: Path | None, overwrite: bool, quiet: bool, **options: Any
) -> None:
    """Time engines and their peers on the reference networks, in turns, and compare them.

    Every contestant first has to reproduce the reference's states for three steps. On a CPU each has a process of its
    own, which is stopped between its turns, and nothing is measured while other programs use the cores. A timing is of
    60 steps or of as many as the engine does in three seconds, whichever is less; with --quick of 20 steps or one
    second. Engines are compared with peers whose operands have as many bits. Peers whose libraries are missing are
    named and left out: pip install 'kaleido-fast[peers]' brings them. Peers are eager, chunked, compile, published,
    jax, onnxruntime and openvino; in 16 bits eager-bf16, chunked-bf16 and openvino-bf16; on a GPU also cudagraph,
    eager-fp16, chunked-fp16, cudagraph-fp16 and compile-fp16. A first look takes some seconds: kaleido-fast bench
    --quick --net digits --peers eager
    """
    from kaleido_fast.benchmarking import bars, readme, report
    from kaleido_fast.benchmarking.runner import run_bench
    from kaleido_fast.system.outputs import claimed

    if readme_path is not None:
        readme.check_readme(readme_path)
    if picture is not None:
        bars.check_picture(picture)
    request = make_request(**options)
    sources = {f"model {network.name}": network.path for network in request.networks}
    claim = claimed(
        {"list of timings": None if json_path == TERMINAL else json_path, "picture": picture},
        {**sources, "README": readme_path},
        overwrite=overwrite,
        remedy="give another name",
    )
    click.get_current_context().with_resource(claim)
    with _bench_bar(quiet or json_path == TERMINAL) as progress:
        results = run_bench(request, progress)
    if json_path is not None and json_path != TERMINAL:
        report.write_json(results, json_path)
    problems, unwritten = _problems(results, became_busy=readme_path is not None and not options["busy"])
    if readme_path is not None and not problems:
        readme.write_readme(results, readme_path)
    if picture is not None and not unwritten:
        bars.save_bars(results, picture)
    if json_path == TERMINAL:
        say_json(report.as_record(results))
    elif not quiet:
        _print(results)
    if problems:
        left = [path for path in (readme_path, picture if unwritten else None) if path is not None]
        kept = "".join(f", {path} left as it is" for path in left)
        raise InputError(f"{'; '.join(problems)}{kept}; run it again")


def _problems(results: BenchReport, *, became_busy: bool) -> tuple[list[str], bool]:
    """What is wrong with a finished run, and whether it goes so far that no picture is drawn.

    Args:
        results: what was measured.
        became_busy: whether a machine that others used meanwhile is a problem.
    """
    from kaleido_fast.benchmarking.report import busy_text

    failed = [f"{results.lost}: {', '.join(results.unmeasured)} not measured"] if results.lost else []
    failed += results.failures
    busy = busy_text(results) if became_busy else ""
    return failed + ([f"{busy} (--busy writes it all the same)"] if busy else []), bool(failed)


def make_request(
    *,
    networks: tuple[str, ...],
    model: str | None,
    peers: tuple[str, ...],
    device: str,
    precisions: tuple[str, ...],
    **options: Any,
) -> BenchRequest:
    """The request that the options of the command describe; what can be refused is refused here."""
    from kaleido_fast.benchmarking.cases import find_networks
    from kaleido_fast.benchmarking.peers import choose_peers
    from kaleido_fast.benchmarking.runner import BenchRequest
    from kaleido_fast.engines import available
    from kaleido_fast.system.devices import resolve_device

    for name in ("n_chains", "n_steps"):
        if options[name] is not None and options[name] < 1:
            raise InputError(f"{name} is {options[name]}: it must be at least 1")
    target = resolve_device(device)
    wanted = _listed(precisions)
    for name in wanted:
        if name not in names.PRECISIONS:
            raise unknown_name("precision", name, names.PRECISIONS)
    if not wanted:
        has_bf16 = target.type == "cpu" and available.has_fast_bf16()
        wanted = ["fp32", "bf16"] if has_bf16 and options["engine"] in ("auto", "cpu", "all") else ["fp32"]
    chosen, skipped = choose_peers(tuple(_listed(peers)), target, quick=options["quick"], precisions=wanted)
    found = find_networks(tuple(_listed(networks)), model)
    return BenchRequest(found, peers=chosen, skipped=skipped, precisions=wanted, device=target, **options)


def _listed(texts: tuple[str, ...]) -> list[str]:
    """Names of an option that may be repeated and hold several names, each once."""
    return list(dict.fromkeys(name for text in texts for name in text.split(",") if name))


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
