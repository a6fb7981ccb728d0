"""``kaleido-fast attractors``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from kaleido_fast import names
from kaleido_fast.cli.output import say_table
from kaleido_fast.cli.parameters import Output, overwrite_option, run_option
from kaleido_fast.system.valid_json import json_text

if TYPE_CHECKING:
    from torch import Tensor

    from kaleido_fast.checkpoint import Checkpoint
    from kaleido_fast.evaluating.attractors import Catalogue


@click.command(name="attractors", short_help="List where chains end: basins, periods, stability.")
@click.option(
    "--model",
    default=f"{names.BUILT_IN_PREFIX}{names.ATTRACTORS_MODEL}",
    show_default=True,
    help="Bundled model or path of a checkpoint.",
)
@click.option("--chains", "n_chains", type=int, default=10_000, show_default=True, help="Chains to start.")
@run_option("burn_in", text="Steps before the last one, at most", otherwise="")
@run_option("tol", text="A chain has arrived when its last step changed it by less, in data units", otherwise="")
@click.option(
    "--distance",
    type=float,
    default=0.05,
    show_default=True,
    help="End states nearer than this are one: root mean square, in units of half the data range.",
)
@run_option("seed", text="0 to 2^64-1")
@click.option("--data", "source", help="Training data, for the nearest example [default: the model's own, if at hand].")
@click.option("--out", type=Output(), default=Path("attractors.json"), show_default=True, help="JSON to write.")
@overwrite_option
@click.option("--engine", default="auto", show_default=True, help=f"One of {', '.join(names.ENGINES)}.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def command(
    model: str,
    n_chains: int,
    burn_in: int,
    tol: float,
    distance: float,
    seed: int,
    source: str | None,
    out: Path,
    overwrite: bool,
    engine: str,
    device: str,
    quiet: bool,
) -> None:
    """List where chains end without jitter: fixed points and cycles, their basins and their stability.

    Attractors are those with a spectral radius below 1; a state where chains rest although it is 1 or more is said to
    repel. Writes the catalogue as JSON, and for models of pictures a sheet beside it, the most visited state first.
    """
    from kaleido_fast.checkpoint import load_checkpoint
    from kaleido_fast.evaluating.attractors import ATTRACTOR, attractors, check_distance
    from kaleido_fast.sampling import fast_sample
    from kaleido_fast.showing.pictures import is_image_shape, save_picture
    from kaleido_fast.system.files import atomic_path
    from kaleido_fast.system.outputs import claimed

    check_distance(distance)
    checkpoint = load_checkpoint(model)
    sheet = out.with_suffix(".png") if is_image_shape(checkpoint.model.spec.sample_shape) else None
    inputs = {"model": checkpoint.path, "data": source}
    click.get_current_context().with_resource(claimed({"catalogue": out, "sheet": sheet}, inputs, overwrite=overwrite))
    data = _training_data(checkpoint, source)
    result = fast_sample(
        checkpoint,
        n_chains=n_chains,
        sampler="kaleidoscope",
        burn_in=burn_in,
        jitter=0.0,
        tol=tol,
        seed=seed,
        retire_cycles=True,
        engine=engine,
        device=device,
        progress=not quiet,
    )
    catalogue = attractors(result, checkpoint.model, distance=distance, data=data)
    rows = catalogue.rows()
    facts = {
        **result.record(),
        "distance": distance,
        "n_settled": catalogue.n_settled,
        "attractors": [row for row in rows if row["kind"] == ATTRACTOR],
        "other_end_states": [row for row in rows if row["kind"] != ATTRACTOR],
    }
    written = [out]
    with atomic_path(out) as temporary:
        temporary.write_text(json_text(facts) + "\n")
    if sheet is not None:
        written.append(sheet)
        save_picture(catalogue.sheet(checkpoint.model, checkpoint.card.scaling), sheet)
    if not quiet:
        _print(catalogue, written)


def _training_data(checkpoint: Checkpoint, source: str | None) -> Tensor | None:
    """The data asked for, or the model's own if they need no download."""
    from kaleido_fast.errors import InputError
    from kaleido_fast.reading.datasets import DOWNLOADED, NAMES, built_in, load_dataset

    spec = checkpoint.model.spec
    if source is None:
        source = checkpoint.card.dataset.get("name")
        if source not in NAMES or source in DOWNLOADED:
            return None
        data, card = load_dataset(built_in(source), bound=spec.bound), checkpoint.card.dataset
        n, digest = card.get("n_examples", len(data)), card.get("sha256", data.sha256)
        if digest not in (data.sha256, load_dataset(built_in(source), bound=spec.bound, limit=n).sha256):
            return None  # other data of the same name
        return data.data
    data = load_dataset(source, bound=spec.bound)
    if data.dim != spec.dim:
        raise InputError(f"data {source} has {data.dim} values an example, the model {spec.dim}")
    return data.data


def _print(catalogue: Catalogue, written: list[Path]) -> None:
    from rich.table import Table

    from kaleido_fast.evaluating.attractors import ATTRACTOR, REPELS, UNMEASURED

    table = Table(box=None, pad_edge=False)
    for title in ("share", "chains", "period", "spectral radius", "kind", "nearest example (MSE)"):
        table.add_column(title, justify="right")
    for row in catalogue.rows()[:10]:
        nearest = f"{row['nearest_example']} ({row['nearest_mse']:.4f})" if "nearest_example" in row else "-"
        radius = f"{row['spectral_radius']:.3f}"
        table.add_row(f"{row['share']:.2%}", f"{row['chains']:,}", str(row["period"]), radius, row["kind"], nearest)
    click.echo(
        f"{catalogue.counted(ATTRACTOR)[0]:,} attractors; {catalogue.n_settled:,} of {catalogue.n_chains:,} chains "
        "arrived"
    )
    for kind, what in (
        (REPELS, "repel (spectral radius 1 or more): their chains rest within --tol, and would leave in the long run"),
        (UNMEASURED, "were not measured: only the most visited ones have a spectral radius"),
    ):
        states, chains = catalogue.counted(kind)
        if states:
            click.echo(f"{states:,} end states ({chains:,} chains) {what}")
    say_table(table)
    click.echo(f"written: {', '.join(map(str, written))}")
