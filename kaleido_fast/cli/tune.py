"""``kaleido-fast tune``."""

from __future__ import annotations

from pathlib import Path

import click

from kaleido_fast import names
from kaleido_fast.cli.parameters import Name, Output, overwrite_option
from kaleido_fast.errors import InputError

TUNABLE = tuple(name for name in names.PRECISIONS if name not in ("fp64", "tf32"))


@click.command(name="tune", short_help="Time the kernels' tiles on this GPU, keep the best.")
@click.option("--net", "networks", multiple=True, help="Reference network; repeat, or separate by commas [all].")
@click.option("--model", help="Bundled model or path of a checkpoint, instead of or besides --net.")
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=Name("precision", TUNABLE),
    help="Repeat for several [default: all three].",
)
@click.option(
    "--chains",
    "n_chains",
    type=click.IntRange(min=1),
    default=100_000,
    show_default=True,
    help="Chains of the runs to tune for.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=3),
    default=20,
    show_default=True,
    help="Timings of each tile; the median counts.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cuda, cuda:1, ...")
@click.option(
    "--out",
    type=Output(),
    help="Table to write, or to add to if it is of this GPU and Triton [this GPU's in your data folder].",
)
@overwrite_option
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def command(
    networks: tuple[str, ...],
    model: str | None,
    precisions: tuple[str, ...],
    n_chains: int,
    rounds: int,
    device: str,
    out: Path | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Time the tiles of the fused kernels on this GPU and keep the best.

    Every tile first has to reproduce the reference's states. The next run on this GPU reads the table; nothing is tuned
    unless you ask for it. Ctrl-C keeps what was found for the networks that were done.
    """
    from kaleido_fast.benchmarking.cases import find_networks
    from kaleido_fast.benchmarking.tuning import TunedTile, is_table, tune_model, write_table
    from kaleido_fast.system.bars import progress_bar
    from kaleido_fast.system.devices import device_facts, resolve_device
    from kaleido_fast.system.folders import user_data
    from kaleido_fast.system.outputs import check_outputs
    from kaleido_fast.system.tuned import table_name
    from kaleido_fast.system.versions import library_versions

    target = resolve_device(device)
    if target.type != "cuda":
        raise InputError("tune times kernels on a GPU, and there is none here: run it on the machine with the GPU")
    facts = device_facts(target)
    if not facts.has_triton:
        raise InputError("Triton is not installed: it comes with torch's CUDA builds, or pip install triton")
    path = out or user_data() / "tuned" / table_name(facts.name)
    if out is None:
        if not path.is_absolute():
            raise InputError("there is no home folder to keep the table in: pass --out")
        path.parent.mkdir(parents=True, exist_ok=True)
    chosen = find_networks(tuple(name for text in networks for name in text.split(",") if name), model)
    triton = library_versions("triton")["triton"]
    sources = {f"model {network.name}": network.path for network in chosen}
    ours = [path] if is_table(path, facts.name, triton) else []
    check_outputs({"table": path}, sources, overwrite=overwrite, ours=ours)
    jobs = [(network, precision) for network in chosen for precision in precisions or TUNABLE]
    found: list[TunedTile] = []
    with progress_bar() as bar:
        bar.disable = bar.disable or quiet
        task = bar.add_task("tuning", total=len(jobs), rate="")
        for done, (network, precision) in enumerate(jobs):
            built = network.model().requires_grad_(False).to(target)

            def report(share: float, text: str, done: int = done) -> None:
                bar.update(task, completed=done + share, rate=text)

            entry = tune_model(network.name, built, precision, target, facts, n_chains, rounds=rounds, report=report)
            found.append(entry)
            write_table(path, facts.name, triton, found)
            if not quiet:
                bar.console.print(entry.explain(), highlight=False, markup=False)
    if not quiet:
        click.echo(f"{path}: {len(found)} entries of {facts.name} measured")
