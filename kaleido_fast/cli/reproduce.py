"""``kaleido-fast reproduce``."""

from __future__ import annotations

from pathlib import Path

import click

from kaleido_fast.cli.output import tell as told
from kaleido_fast.cli.parameters import overwrite_option
from kaleido_fast.reproducing.folder import check_report_folder, made_folders
from kaleido_fast.reproducing.reproduction import reproduce
from kaleido_fast.reproducing.settings import ALL, KALEIDOSCOPES, Settings, chosen


@click.command(name="reproduce", short_help="Make the paper's kaleidoscopes with a report.")
@click.argument("name", metavar=f"[{'|'.join((*KALEIDOSCOPES, ALL))}]")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder to write [default: reproduced/NAME; a folder each for all]."
)
@click.option("--data", type=click.Path(path_type=Path), help="IDX file of MNIST images [default: fetched by name].")
@click.option("--seed", type=int, default=0, show_default=True, help="Of training and sampling, 0 to 2^64-1.")
@click.option("--steps", type=click.IntRange(min=1), help="Training steps, for a quick look [default: the recipe's].")
@click.option(
    "--chains", "n_chains", type=click.IntRange(min=10), help="Chains measured [default: the kaleidoscope's]."
)
@click.option("--cache", type=click.Path(path_type=Path), help="Folder of trained models [default: the user's cache].")
@click.option("--device", default="auto", show_default=True, help="auto: a GPU where there is one.")
@overwrite_option
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def command(name: str, out: Path | None, overwrite: bool, quiet: bool, **options: object) -> None:
    """Make the paper's kaleidoscopes: train or reuse the model, sample, write pictures and a report."""
    entries = chosen(name)
    tell = (lambda _: None) if quiet else told
    base = out or Path("reproduced")
    folders = {entry.name: base / entry.name for entry in entries} if out is None or name == ALL else {name: base}
    with made_folders([base, *folders.values()]):
        for folder in folders.values():
            check_report_folder(folder, overwrite=overwrite)
        for entry in entries:
            tell(f"{entry.name}: {entry.expected} on 2 CPU cores, less with a trained model in the cache")
            settings = Settings(progress=not quiet, tell=tell, **options)  # type: ignore[arg-type]
            report = reproduce(entry.name, folders[entry.name], settings, overwrite=overwrite)
            if not quiet:
                click.echo(f"{entry.name}: {report.folder / 'report.md'} and {len(report.written) - 1} files beside it")
