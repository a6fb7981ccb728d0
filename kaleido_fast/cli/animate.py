"""``kaleido-fast animate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from kaleido_fast import names
from kaleido_fast.cli.output import tell
from kaleido_fast.cli.parameters import Output, Shape, overwrite_option, run_option

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from kaleido_fast.checkpoint import Checkpoint
    from kaleido_fast.showing.states import Shown
    from kaleido_fast.system.outputs import Inputs

ENDINGS = (".gif", ".mp4", ".html", ".png")
HOLD = 2.0  # seconds that the last step of a run stays
DEFAULT_OUT = (Path("chains.gif"), Path("chains.mp4"))
OF_A_RUN = (
    *("model", "between", "sampler", "n_steps", "seed", "init", "jitter", "settle", "noise", "noise_from", "noise_to"),
    "device",
)


@click.command(name="animate", short_help="Show chains moving from noise to samples.")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--model", default=names.DEFAULT_MODEL, show_default=True, help="Bundled model or path of a checkpoint.")
@click.option(
    "--out",
    "outs",
    type=Output(),
    multiple=True,
    help="May be given several times; the ending picks the format: .gif, .mp4 (needs ffmpeg), .html (a page with a "
    "slider), .png (rows of chains, a column a step) [default: chains.gif, and chains.mp4 where ffmpeg is there].",
)
@click.option("--chains", "n_chains", type=click.IntRange(min=1), default=64, show_default=True, help="Chains shown.")
@run_option("first_chain", text="First chain; of FILE, its place there")
@click.option(
    "--between",
    type=int,
    nargs=2,
    metavar="SEED1 SEED2",
    help="Instead of a run, show finished samples: those of one seed, which turn into those of another while their "
    "starts move on arcs from noise to noise. For models that are sampled as a flow [default: a run].",
)
@click.option(
    "--steps", "n_steps", type=click.IntRange(min=1), help="Steps [default: as many as the model recommends]."
)
@click.option(
    "--frames",
    type=click.IntRange(min=2),
    help="Frames at most, late steps are left out; of --between, those of one way [default: 80; of --between 25].",
)
@click.option("--fps", type=click.FloatRange(0.1, 60), default=8.0, show_default=True, help="Frames a second.")
@click.option("--shape", type=Shape(), default=(), help="HEIGHT,WIDTH or HEIGHT,WIDTH,3 [default: the model's].")
@run_option("seed", text="0 to 2^64-1")
@run_option("sampler", text="As in sample")
@run_option("init", text="Start noise")
@run_option("jitter", text="As in sample")
@run_option("settle", text="As in sample")
@run_option("noise", text="As in sample")
@run_option("noise_from", text="As in sample")
@run_option("noise_to", text="As in sample")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@overwrite_option
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def command(
    file: Path | None,
    model: str,
    outs: tuple[Path, ...],
    n_chains: int,
    first_chain: int,
    n_steps: int | None,
    between: tuple[int, int] | None,
    frames: int | None,
    fps: float,
    shape: tuple[int, ...],
    overwrite: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Show chains moving from noise to samples: an animation, or a page with a slider over the steps.

    Runs a model, or takes the draws in FILE, which needs several a chain (of a kaleidoscope: sample --draws 20
    --burn-in 0 --thin 1 --settle 0). Or shows samples that turn into others: animate --between 1 2 --model MODEL, with
    a model that is sampled as a flow; that animation goes there and back.
    """
    from kaleido_fast.checkpoint import load_checkpoint
    from kaleido_fast.errors import InputError
    from kaleido_fast.showing.animation import NO_FFMPEG, can_write_mp4, check_can_show
    from kaleido_fast.showing.states import read_shown

    if between is not None:
        _refuse_given(("seed",), "stands beside --between, which names two seeds")
    if file is not None:
        _refuse_given(OF_A_RUN, f"is for a run of a model, and {file} holds finished draws")
    wanted = outs or DEFAULT_OUT
    lacking = [] if can_write_mp4() else [out for out in wanted if out.suffix == ".mp4"]
    if lacking == list(wanted):
        raise InputError(f"{lacking[0]}: {NO_FFMPEG}; or ask for a .gif or .html")
    written = [out for out in wanted if out not in lacking]
    checkpoint = load_checkpoint(model) if file is None else None
    inputs = {"file of draws": file} if checkpoint is None else {"model": checkpoint.path}
    click.get_current_context().with_resource(_claim(wanted, written, inputs, overwrite=overwrite))
    if file is not None:
        shown = read_shown(file, first=first_chain, n_chains=n_chains, shape=shape)
        if len(shown.steps) < 2:
            raise InputError(f"{file} holds one draw a chain, which does not move: sample with --draws, or use show")
    else:
        options |= {"n_chains": n_chains, "first_chain": first_chain, "shape": shape, "progress": not quiet}
        shown = _sample(checkpoint or model, between, n_steps, frames, options)
    check_can_show(shown)
    stills = [out for out in wanted if out.suffix == ".png"]
    if stills and not shown.are_pictures:
        raise InputError(
            f"{stills[0]}: a .png shows pictures side by side, and samples of shape {shown.spec.sample_shape} are "
            "points: ask for a .gif, .mp4 or .html; kaleido-fast show plots draws"
        )
    for out in written:
        _write(shown, out, fps, file.name if file is not None else f"model {shown.name}", returns=between is not None)
    if not quiet:
        click.echo(f"{', '.join(map(str, written))}: {len(shown.states):,} chains, {len(shown.steps)} frames")
    if lacking and outs:
        raise InputError(f"{lacking[0]} was not written, the others were: {NO_FFMPEG}")
    if lacking and not quiet:
        tell(f"no {lacking[0]}: {NO_FFMPEG}")


def _sample(
    model: Checkpoint | str,
    between: tuple[int, int] | None,
    n_steps: int | None,
    frames: int | None,
    options: dict[str, Any],
) -> Shown:
    """States of a run, or draws on the way between two seeds."""
    from kaleido_fast.showing.between import DEFAULT_FRAMES, sample_between
    from kaleido_fast.showing.states import MOST_FRAMES, sample_shown

    if between is None:
        return sample_shown(model, n_steps=n_steps, most_frames=frames or MOST_FRAMES, **options)
    del options["seed"]
    return sample_between(model, seeds=between, n_frames=frames or DEFAULT_FRAMES, **options, steps=n_steps)


def _refuse_given(names: tuple[str, ...], reason: str) -> None:
    """Refuse options that were given where they would have no effect."""
    from kaleido_fast.errors import InputError

    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") == ParameterSource.COMMANDLINE
        if parameter.name in names and given:
            raise InputError(f"{parameter.opts[0]} {reason}: leave one out")


def _claim(
    wanted: tuple[Path, ...], written: list[Path], inputs: Inputs, *, overwrite: bool
) -> AbstractContextManager[None]:
    """Hold the locks of what will be written."""
    from kaleido_fast.errors import unknown_name
    from kaleido_fast.system.outputs import claimed

    for out in wanted:
        if out.suffix not in ENDINGS:
            raise unknown_name("format", out.suffix or out.name, ENDINGS)
    return claimed({f"output {i}": out for i, out in enumerate(written, 1)}, inputs, overwrite=overwrite)


def _write(shown: Shown, out: Path, fps: float, subject: str, *, returns: bool) -> None:
    """Write one output; an animation that ``returns`` goes back to its first frame."""
    from kaleido_fast.showing.animation import make_frames, strip, there_and_back, write_gif, write_mp4
    from kaleido_fast.showing.page import write_page
    from kaleido_fast.showing.pictures import save_picture

    if out.suffix == ".html":
        write_page(shown, out, f"Chains of {subject}")
    elif out.suffix == ".png":
        save_picture(strip(shown), out)
    else:
        frames = there_and_back(make_frames(shown)) if returns else make_frames(shown)
        if out.suffix == ".gif":
            write_gif(frames, out, frames_per_second=fps, hold=0.0 if returns else HOLD)
        else:
            write_mp4(frames, out, frames_per_second=fps)
