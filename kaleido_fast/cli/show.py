"""``kaleido-fast show``."""

from __future__ import annotations

from pathlib import Path

import click

from kaleido_fast.cli.parameters import Output, Shape, overwrite_option

ENDINGS = (".png", ".html")


@click.command(name="show", short_help="Draw a file of draws as a sheet, a plot or a page.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=Output(),
    help="Picture (.png), or page to click through the draws (.html) [default: FILE with -shown.png for its ending].",
)
@click.option(
    "--chains", "n_chains", type=click.IntRange(min=1), default=1000, show_default=True, help="At most so many."
)
@click.option(
    "--first", type=click.IntRange(min=0), default=0, show_default=True, help="First chain, counted within FILE."
)
@click.option("--all-draws", is_flag=True, help="A row for each chain with all its draws; else the last draws alone.")
@click.option("--columns", type=click.IntRange(min=1), help="Of the sheet [default: a little wider than high].")
@click.option("--shape", type=Shape(), default=(), help="HEIGHT,WIDTH or HEIGHT,WIDTH,3 [default: FILE's record].")
@overwrite_option
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def command(
    file: Path,
    out: Path | None,
    n_chains: int,
    first: int,
    all_draws: bool,
    columns: int | None,
    shape: tuple[int, ...],
    overwrite: bool,
    quiet: bool,
) -> None:
    """Draw the chains of a file of draws: a sheet of pictures, or a plot where samples have one or two values."""
    from kaleido_fast.errors import unknown_name
    from kaleido_fast.showing.animation import check_can_show, strip
    from kaleido_fast.showing.page import write_page
    from kaleido_fast.showing.pictures import image_grid, save_picture
    from kaleido_fast.showing.states import read_shown
    from kaleido_fast.storing.writers import record_path
    from kaleido_fast.system.outputs import claimed

    out = file.parent / f"{file.stem}-shown.png" if out is None else out
    if out.suffix not in ENDINGS:
        raise unknown_name("format", out.suffix or out.name, ENDINGS)
    record = record_path(file) if file.suffix == ".npy" else None
    claim = claimed({"picture": out}, {"file of draws": file, "record": record}, overwrite=overwrite)
    click.get_current_context().with_resource(claim)
    as_page = out.suffix == ".html"
    shown = read_shown(file, first=first, n_chains=n_chains, shape=shape, last_only=not (all_draws or as_page))
    check_can_show(shown)
    if as_page:
        write_page(shown, out, f"Draws in {file.name}")
    elif not shown.are_pictures:
        from kaleido_fast.showing.plots import samples_plot, save_figure

        save_figure(samples_plot(shown.states.flatten(0, 1).numpy(), f"{len(shown.states):,} chains"), out)
    elif all_draws:
        save_picture(strip(shown), out)
    else:
        save_picture(image_grid(shown.states[:, -1], shown.spec, shown.scaling, columns=columns), out)
    if not quiet:
        click.echo(f"{out}: {len(shown.states):,} chains, the first is number {shown.first_chain:,}")
