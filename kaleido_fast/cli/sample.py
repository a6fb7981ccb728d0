"""``kaleido-fast sample``."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kaleido_fast import names
from kaleido_fast.cli.output import say_facts, say_json, tell
from kaleido_fast.cli.parameters import Name, NumberOr, Output, run_option

if TYPE_CHECKING:
    from torch import Tensor

    from kaleido_fast.checkpoint import Checkpoint
    from kaleido_fast.planning.request import SampleRequest
    from kaleido_fast.running.mixing import Mixing
    from kaleido_fast.running.result import SampleResult
    from kaleido_fast.storing.finished import FinishedDraws
    from kaleido_fast.storing.sample_to import StreamResult

PICTURE_CHAINS = 1000


@click.command(name="sample", short_help="Start chains from noise, iterate, write draws and a picture.")
@run_option("n_chains", default=1000)
@click.option("--model", default=names.DEFAULT_MODEL, show_default=True, help="Bundled model or path of a checkpoint.")
@click.option(
    "--out",
    type=Output(),
    default=Path("samples.npy"),
    show_default=True,
    help=f"Where the draws go; the ending picks the format: {', '.join(names.OUTPUT_ENDINGS)}.",
)
@click.option(
    "--dtype",
    type=Name("dtype", names.STORED_DTYPES),
    help="Type of stored draws; uint8 takes the data range in 255 steps [default: as computed].",
)
@click.option("--chunk-chains", type=int, help="Chains of a chunk of a store [default: chosen by the plan].")
@click.option(
    "--overwrite", is_flag=True, help="Begin anew where an output exists, and replace what else bears its files' names."
)
@click.option("--repair", is_flag=True, help="Read every chunk of a store and compute damaged ones again.")
@click.option(
    "--picture/--no-picture", default=None, help="Write a PNG sheet beside --out [default: if samples are pictures]."
)
@click.option(
    "--picture-chains",
    type=click.IntRange(min=1),
    default=PICTURE_CHAINS,
    show_default=True,
    help="At most this many chains on the sheet.",
)
@run_option("sampler")
@run_option("burn_in")
@run_option("n_draws")
@run_option("thin")
@run_option("jitter")
@run_option("settle")
@run_option("steps")
@run_option("noise_from")
@run_option("noise_to")
@run_option("noise")
@run_option("init")
@run_option("tol", type=NumberOr(float, none=None, recommended="recommended"), default="recommended")
@run_option("patience")
@run_option("check_every")
@run_option("max_period")
@run_option("retire_cycles")
@run_option("seed", type=NumberOr(int, random=None))
@run_option("first_chain")
@run_option("engine")
@run_option("kernel")
@run_option("precision")
@run_option("polish")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--block-chains", type=int, help="Chains at work at once, for less memory [default: as many as fit].")
@click.option(
    "--alone",
    is_flag=True,
    help="Under torchrun: sample in this process alone; give each process its own --out.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the end figures as one JSON object.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def command(
    model: str,
    out: Path,
    picture: bool | None,
    picture_chains: int,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Start chains from noise, iterate the network, write the draws and a picture.

    Chains are independent: chain k has the same values in a run of 1,000 and of 100,000 chains. A .zarr store or .npy
    file is written block by block: the same command again goes on where an interrupted one has ended. Under torchrun,
    workers share the blocks of a store; all other outputs take one process.
    """
    from kaleido_fast.checkpoint import load_checkpoint
    from kaleido_fast.showing.pictures import check_pictures, image_grid, is_image_shape, save_picture

    checkpoint = load_checkpoint(model)
    spec, card = checkpoint.model.spec, checkpoint.card
    if picture is None:
        picture = is_image_shape(spec.sample_shape)
    elif picture:
        check_pictures(spec)
    sheet_path = out.with_suffix(".png")
    write = _write_in_blocks if out.suffix in names.BLOCK_ENDINGS else _write_at_once
    with _plain_warnings():
        made = write(checkpoint, out, sheet_path if picture else None, progress=not (quiet or as_json), **options)
    if made is None:
        return  # the first of several workers reports
    result, written, final = made
    if picture and not sheet_path.exists():
        save_picture(image_grid(final(picture_chains), spec, card.scaling), sheet_path)
        written.append(sheet_path)
    elif picture and result.stats is not None and not quiet:
        click.echo(f"{sheet_path} was there before and is left as it is: kaleido-fast show draws another", err=True)
    if result.stats is None:
        _report_finished(result, written, as_json=as_json, quiet=quiet)
    else:
        cheaper = None if as_json or quiet else _cheaper_row(result, checkpoint, alone=options["alone"])
        report(result, written, as_json=as_json, quiet=quiet, cheaper=cheaper)


Made = tuple[Any, list[Path], Callable[[int], "Tensor"]]  # result, files, last states of the first n chains


def _write_in_blocks(checkpoint: Checkpoint, out: Path, picture: Path | None, **options: Any) -> Made | None:
    from kaleido_fast.storing.draws import open_draws
    from kaleido_fast.storing.sample_to import sample_to

    result = sample_to(out, checkpoint, scaling=checkpoint.card.scaling, picture=picture, **options)
    if result is None:
        return None
    return result, [Path(name) for name in result.files], lambda n: open_draws(out)[:n][:, -1].float()


def _write_at_once(
    checkpoint: Checkpoint, out: Path, picture: Path | None, *, alone: bool, overwrite: bool, **options: Any
) -> Made | None:
    from kaleido_fast.errors import InputError
    from kaleido_fast.sampling import fast_sample
    from kaleido_fast.storing import writers
    from kaleido_fast.storing.record import make_record
    from kaleido_fast.system.files import follow
    from kaleido_fast.system.outputs import check_outputs, claimed
    from kaleido_fast.system.workers import local_device, refuse_workers

    if not alone:
        refuse_workers(str(out), "give a .zarr store, or one process or --alone")
    options["device"] = local_device(options["device"])
    spec, scaling = checkpoint.model.spec, checkpoint.card.scaling
    writers.check_output(out, max(0, options["n_chains"]) * max(0, options["n_draws"]) * spec.dim * 4)
    for name, unset in (("repair", False), ("dtype", None), ("chunk_chains", None)):
        if options.pop(name) != unset:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} is for outputs written in blocks ({', '.join(names.BLOCK_ENDINGS)}), not {out}")
    outputs, inputs = {"output": out, "picture": picture}, {"model": checkpoint.path}
    check_outputs(outputs, inputs, overwrite=True)
    if out.exists() and not overwrite:
        return _finished(checkpoint, out, options)
    click.get_current_context().with_resource(claimed(outputs, inputs, overwrite=overwrite))
    result = fast_sample(checkpoint, **options)
    written = writers.write_draws(out, result, make_record(result, spec, scaling))
    if picture is not None:
        follow(picture).unlink(missing_ok=True)  # of the draws that were replaced
    return result, written, lambda n: result.final[:n].cpu()


def _finished(checkpoint: Checkpoint, out: Path, options: dict[str, Any]) -> Made:
    """The file that is there, if it is of this same run."""
    from kaleido_fast.sampling import prepare_run
    from kaleido_fast.storing.draws import open_draws
    from kaleido_fast.storing.finished import find_finished

    run = prepare_run(checkpoint, **{name: value for name, value in options.items() if name != "progress"})
    found = find_finished(out, run, checkpoint.card.scaling)
    return found, [out], lambda n: open_draws(out)[:n][:, -1].float()


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as lines of ours, at once."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: tell(f"kaleido-fast: {message}")
        yield


def _report_finished(result: StreamResult | FinishedDraws, written: list[Path], *, as_json: bool, quiet: bool) -> None:
    n_chains = result.request.n_chains
    if as_json:
        facts = {**result.record(), "n_chains": n_chains, "finished": True, "files": [str(path) for path in written]}
        say_json(facts)
    elif not quiet:
        click.echo(f"{result.path} is finished: all {n_chains:,} chains are there, nothing was computed")


def report(
    result: SampleResult | StreamResult,
    written: list[Path],
    *,
    as_json: bool,
    quiet: bool,
    cheaper: tuple[str, str] | None = None,
) -> None:
    """Print the end figures: a table for people, one JSON object for machines, nothing when quiet.

    The table says as well what the run would have taken in 16 bits, if ``cheaper`` does.
    """
    if as_json:
        say_json(summary(result, written))
    elif not quiet:
        _print_table(result, written, cheaper)


def summary(result: SampleResult | StreamResult, written: list[Path]) -> dict[str, Any]:
    """The end figures as plain values."""
    stats = result.stats
    assert stats is not None
    return {**stats.as_dict(), **result.record(), "files": [str(path) for path in written]}


def _cheaper_row(result: SampleResult | StreamResult, checkpoint: Checkpoint, *, alone: bool) -> tuple[str, str] | None:
    """What the run would have taken in 16 bits; None where that is not known, as of a run that workers shared."""
    from kaleido_fast.system.workers import started_together

    assert result.stats is not None
    if not (alone or started_together() == 1):
        return None
    if result.plan.engine == "triton" and result.stats.device.startswith("cuda"):
        return _row("in fp16", _in_fp16(result, checkpoint))
    return _row("in bf16", _in_bf16(result, checkpoint)) if result.plan.engine == "cpu" else None


def _row(name: str, text: str | None) -> tuple[str, str] | None:
    return None if text is None else (name, text)


def _in_fp16(result: SampleResult | StreamResult, checkpoint: Checkpoint) -> str | None:
    import torch

    from kaleido_fast.planning.in_fp16 import in_fp16
    from kaleido_fast.running.subject import resolve_subject
    from kaleido_fast.system import devices

    stats = result.stats
    assert stats is not None
    return in_fp16(
        result.request,
        result.plan,
        checkpoint.model.spec,
        devices.device_facts(torch.device(stats.device)),
        resolve_subject(checkpoint).weights_range,
        n_chains=getattr(stats, "new_chains", stats.n_chains),
        seconds=stats.seconds - stats.compile_seconds,
    )


def _in_bf16(result: SampleResult | StreamResult, checkpoint: Checkpoint) -> str | None:
    from kaleido_fast.engines import available
    from kaleido_fast.planning.in_bf16 import in_bf16

    stats = result.stats
    assert stats is not None
    if available.instruction_set() != "AMX":
        return None
    return in_bf16(result.request, checkpoint.model.spec, seconds=stats.seconds - stats.compile_seconds)


def _kept_rows(result: SampleResult | StreamResult) -> list[tuple[str, str]]:
    """What was there before, and what was damaged."""
    new = getattr(result.stats, "new_chains", result.request.n_chains)
    kept = result.request.n_chains - new
    rows = [("resumed", f"{kept:,} chains were there, {new:,} were computed")] if kept else []
    return rows + [("repaired", line) for line in getattr(result, "damaged", ())]


def _histogram(counts: dict[str, int], n_chains: int) -> str:
    """Shares of all chains by steps to settle, in one line."""
    return ", ".join(f"{count / n_chains:.1%} in {steps}" for steps, count in counts.items() if count) + " steps"


def _draws_rows(request: SampleRequest, mixing: Mixing | None) -> list[tuple[str, str]]:
    """How far apart the draws of a chain are, and how independent; nothing for one draw."""
    if request.n_draws == 1:
        return []
    if request.sampler == "flow":
        return [("draws", f"{request.n_draws:,} a chain, each from noise of its own: independent of each other")]
    noisy = request.schedule.jittered_steps(1)
    apart = f"{request.n_draws:,} a chain, {request.thin:,} step{'s' * (request.thin > 1)} apart, {noisy:,} with noise"
    return [("draws", apart), ("mixing", mixing_line(mixing, jittered=noisy > 0))]


def mixing_line(mixing: Mixing | None, *, jittered: bool = True) -> str:
    """R-hat and effective draws in words, with what to do where draws of a chain depend on each other."""
    if mixing is None:
        return "not computed: it takes 4 draws a chain, and values that differ"
    parts = ["R-hat of one chain is not defined" if mixing.r_hat is None else f"R-hat {mixing.r_hat:.3g}"]
    if mixing.ess_bulk is not None and mixing.ess_tail is not None:
        n = mixing.n_chains * mixing.n_draws
        parts.append(f"{mixing.ess_bulk:,.0f} of {n:,} draws effective ({mixing.ess_tail:,.0f} in the tails)")
    if mixing.ess_bulk is None:  # of independent digits, 4 or 5 a chain, R-hat is 1.07 to 1.08 by chance
        parts.append("of so few draws a chain it says little: 10 or more tell whether they depend on each other")
    elif mixing.r_hat is not None and mixing.r_hat > names.MIXED_R_HAT:
        remedy = "raise --thin, or take" if jittered else "without noise they must; take"
        parts.append(f"draws of a chain depend on each other: {remedy} one of more chains")
    return "; ".join(parts)


def _print_table(result: SampleResult | StreamResult, written: list[Path], cheaper: tuple[str, str] | None) -> None:
    from kaleido_fast.planning.jitter import jitter_words

    stats, request = result.stats, result.request
    assert stats is not None
    residuals = ", ".join(f"{name} {value:.2g}" for name, value in stats.residual_quantiles.items() if name != "0%")
    settled = ", ".join(f"{name} {value:.0f}" for name, value in stats.steps_quantiles.items() if name != "0%")
    shares = ", ".join(
        f"{share:.1%} {name.replace('_', ' ')}" for name, share in stats.outcome_shares.items() if share > 0
    )
    compiling = f", {stats.compile_seconds:.2f} s of it compiling" if stats.compile_seconds else ""
    words = jitter_words(request.schedule)
    noise = f", {words}" if words else ""
    rows = (
        *_kept_rows(result),
        ("chains", f"{stats.n_chains:,} x {stats.n_steps} steps{noise}, seed {request.seed}"),
        *_draws_rows(request, stats.mixing),
        ("engine", f"{stats.engine} on {stats.device}, {stats.precision}: {result.plan.reason}"),
        ("time", f"{stats.seconds:.2f} s + {stats.setup_seconds:.2f} s setup{compiling}"),
        ("speed", f"{stats.chain_steps_per_second:,.0f} chain-steps/s"),
        *([cheaper] if cheaper else []),
        ("residual", f"quantiles {residuals}"),
        *([("steps", f"quantiles {settled}; {stats.work_saved:.0%} of the work saved")] if request.freezes else []),
        *([("settled", _histogram(stats.steps_histogram, stats.n_chains))] if stats.steps_histogram else []),
        *([("outcome", shares)] if request.freezes or stats.outcome_shares["non_finite"] else []),
        ("files", ", ".join(map(str, written))),
    )
    say_facts(rows)
