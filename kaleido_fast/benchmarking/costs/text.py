"""The figures in words, and advice."""

from __future__ import annotations

import math

from kaleido_fast.benchmarking.costs.arithmetic import LargeRun, simulate, storage, times

MANY_FILES = 10_000_000


def as_lines(run: LargeRun, *, simulated: int) -> list[str]:
    """The figures in words."""
    held, hours, layout = storage(run), times(run), run.layout
    lines = [
        f"run        {layout.n_chains:,} chains x {run.n_steps} steps, {layout.n_draws} x {layout.dim} "
        f"{layout.encoding.dtype} values each",
        f"work       {run.chain_steps:.3g} chain-steps, {_amount(hours['device_hours'])} device hours at "
        f"{run.rate:.3g} chain-steps/s",
        f"wall time  {_amount(hours['wall_hours'])} hours with {run.workers:,} workers",
        f"blocks     {held['blocks']:,} of {layout.chunk_chains:,} chains: computed in "
        f"{_amount(hours['block_seconds'])} s, written beside the next in {_amount(hours['write_seconds'])} s",
        f"bytes      {_bytes(held['bytes'])} of arrays, {_bytes(held['stored_bytes'])} stored; a chunk of draws has "
        f"{_bytes(held['bytes_per_draws_chunk'])}",
        f"files      {held['files']:,}; {held['file_system_calls']:,} calls of a file system",
        f"objects    {held['puts']:,} PUT, {held['lists_per_start']:,} LIST a start; a run resumed at its end counts "
        f"with {held['gets_to_resume']:,} GET in {_amount(hours['count_hours'])} hours",
    ]
    if run.preemptions:
        lines += [
            f"preempted  {_amount(hours['preemptions'])} times: of {run.group:,} at once, each loses "
            f"{_amount(run.restart_seconds)} s to restart and {_amount(hours['lost_seconds_per_stop'])} s of work",
            f"in all     {_amount(hours['wall_hours_preempted'])} hours, {_amount(hours['held_device_hours'])} device "
            f"hours: {_amount(100 * hours['added_share'])} % more",
        ]
    if simulated:
        walls = sorted(simulate(run, seed)[0] / 3600 for seed in range(simulated))
        lines.append(
            f"simulated  {_amount(walls[len(walls) // 2])} hours (median of {simulated} random runs), "
            f"{_amount(walls[0])} to {_amount(walls[-1])}"
        )
    return lines + [f"note       {text}" for text in remarks(run)]


def remarks(run: LargeRun) -> list[str]:
    """Advice: what to change at these numbers."""
    found, hours = [], times(run)
    if run.write_seconds > run.block_seconds:
        found.append("writing is slower than computing and sets the pace: longer --chunk-chains, or a smaller --dtype")
    files = storage(run)["files"]
    if files > MANY_FILES:
        found.append(f"{files:,} files are hard on most storage: longer --chunk-chains")
    if hours["count_hours"] > hours["wall_hours"] / 4:
        found.append("counting old blocks at the end of a resumed run takes long: longer --chunk-chains")
    if hours["added_share"] > 0.25:
        found.append(
            "preemptions cost more than a quarter: a smaller --group, or shorter --chunk-chains where work is lost"
        )
    return found


def _amount(value: float) -> str:
    """Three digits, without an exponent where possible."""
    if value >= 999.5 and math.isfinite(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{_amount(value)} PB"
