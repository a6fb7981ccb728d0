"""``kaleido-fast join``."""

from __future__ import annotations

from pathlib import Path

import click

from kaleido_fast.cli.parameters import Output


@click.command(name="join", short_help="Join stores of array jobs into one.")
@click.argument("out", type=Output())
@click.argument("parts", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--overwrite", is_flag=True, help="Replace OUT where it exists.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def command(out: Path, parts: tuple[Path, ...], overwrite: bool, quiet: bool) -> None:
    """Join the stores PARTS of neighbouring chains into the store OUT.

    Parts are made by jobs that differ only in --first-chain and --chains. OUT has the same bytes as the store of one
    run over all chains, if the first part's chunks are as long as that run's. After an interruption the same
    command goes on.
    """
    from kaleido_fast.storing.joining import join_stores
    from kaleido_fast.system.bars import progress_bar

    with progress_bar() as bar:
        task = bar.add_task("joining", total=None, rate="")
        output = join_stores(
            out, parts, overwrite=overwrite, callback=lambda done, total: bar.update(task, completed=done, total=total)
        )
    if not quiet:
        layout = output.layout
        click.echo(f"{out} holds {layout.n_chains:,} chains of {len(parts):,} stores, in {layout.n_blocks:,} chunks")
