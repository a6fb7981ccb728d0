"""What a large run costs: device hours, bytes, files, operations on storage, and work lost to preemption.

    python benchmarks/costs.py --network digits --chains 1e9 --rate 1.7e8 --workers 8 --dtype uint8
    python benchmarks/costs.py --network points2d --chains 1e12 --rate model     # rate from a model of an H200
    python benchmarks/costs.py --check     # the arithmetic against real runs of 100,000 and 1,000,000 chains here

docs/scaling.md explains every figure. Nothing is measured but by --check: results are as good as the numbers given.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from kaleido_fast import names
from kaleido_fast.benchmarking.cases import network_spec, random_network
from kaleido_fast.benchmarking.program import run_program
from kaleido_fast.cli.options import Name, NumberOr
from kaleido_fast.errors import InputError
from kaleido_fast.planning.facts import H200, DeviceFacts
from kaleido_fast.planning.plan import make_plan
from kaleido_fast.planning.request import SampleRequest
from kaleido_fast.presets import PRESETS
from kaleido_fast.storing.encoding import Encoding
from kaleido_fast.storing.layout import Layout
from kaleido_fast.storing.stores import ARRAYS
from kaleido_fast.storing.streaming import WAITING_BLOCKS

FILES_PER_BLOCK = len(ARRAYS) + 1  # a chunk of each array and the block's mark
METADATA_FILES = len(ARRAYS) + 2  # zarr.json of the group, of each array and of the marks
CALLS_PER_FILE = 5  # of a file system: create, flush, rename, open its folder, flush that
READS_PER_COUNT = 1 + 3 * 2  # of a block: its mark; checksum and chunk of residual, steps and outcome
NAMES_PER_LISTING = 1000  # keys that one request of an object store lists
MANY_FILES = 10_000_000
MODELLED_CHAIN_STEPS = 100_000 * 300  # that the roofline of a kernel is for
KILLED_BLOCK = 4096  # chains of a block in runs that are killed
FORMS = {"fp32": "fp16x3", "fp16": "fp16", "bf16": "bf16"}  # what the kernels call precisions


@dataclass(frozen=True)
class Job:
    """A run and the machines it is given.

    Args:
        layout: shapes of the store.
        n_steps: steps of a chain.
        rate: chain-steps a second of one worker.
        workers: devices at work at once.
        group: workers that restart together: all of a torchrun, 1 in an array job.
        bandwidth: bytes a second that one worker can write.
        operation_seconds: to make one small file durable on the storage.
        stored_share: bytes on disk by bytes of the arrays.
        preemptions: per worker and second.
        restart_seconds: from a preemption until the group computes again.
    """

    layout: Layout
    n_steps: int
    rate: float
    workers: int = 1
    group: int = 1
    bandwidth: float = 5e8
    operation_seconds: float = 0.02
    stored_share: float = 1.0
    preemptions: float = 0.0
    restart_seconds: float = 120.0

    @property
    def chain_steps(self) -> int:
        """Work of the whole run."""
        return self.layout.n_chains * self.n_steps

    @property
    def block_seconds(self) -> float:
        """Time to compute one block."""
        return self.layout.chunk_chains * self.n_steps / self.rate

    @property
    def write_seconds(self) -> float:
        """Time to write one block, which is beside computing the next."""
        stored = self.stored_share * self.layout.n_bytes / self.layout.n_blocks
        return FILES_PER_BLOCK * self.operation_seconds + stored / self.bandwidth

    @property
    def paced_seconds(self) -> float:
        """Time from one block of a worker to its next: the longer of computing and writing."""
        return max(self.block_seconds, self.write_seconds)

    @property
    def lag_seconds(self) -> float:
        """Time from a block's being computed to its being durable: where writing is slower, others wait before it."""
        waiting = WAITING_BLOCKS if self.write_seconds > self.block_seconds else 0
        return (waiting + 1) * self.write_seconds

    @property
    def failures(self) -> float:
        """Preemptions a second that stop a group: of any of its workers."""
        return self.preemptions * self.group


def storage(job: Job) -> dict[str, int]:
    """Bytes, files and operations of a store, exact but for ``stored_bytes``.

    ``gets_to_resume`` are of a run whose blocks were there already, all but the last: its workers share them.
    """
    layout = job.layout
    files = layout.n_blocks * FILES_PER_BLOCK + METADATA_FILES
    return {
        "blocks": layout.n_blocks,
        "bytes": layout.n_bytes,
        "stored_bytes": round(layout.n_bytes * job.stored_share),
        "bytes_per_draws_chunk": _chunk_bytes(layout),
        "files": files,
        "file_system_calls": layout.n_blocks * FILES_PER_BLOCK * CALLS_PER_FILE,
        "puts": files + 1,  # the group's zarr.json is written twice
        "lists_per_start": -(-layout.n_blocks // NAMES_PER_LISTING),
        "gets_to_resume": layout.n_blocks * READS_PER_COUNT,
    }


def _chunk_bytes(layout: Layout) -> int:
    return layout.length(0) * layout.n_draws * layout.dim * np.dtype(layout.encoding.dtype).itemsize


def expected_seconds(n_blocks: float, block: float, lag: float, restart: float, failures: float) -> float:
    """Expected time until a worker's blocks are durable where it is stopped at random, its first start included.

    A block that is computed counts ``lag`` later, when it is written; a stop loses what does not count yet. Stops are
    a Poisson process, so that from one durable block to the next it takes, with L for ``failures``,
    exp(L (restart + lag)) (exp(L block) - 1) / L on average: the formula of checkpointing, a block for a checkpoint.

    Args:
        n_blocks: one after the other.
        block, lag, restart: seconds.
        failures: stops a second.
    """
    idle = restart + lag
    if failures * (block + idle) < 1e-12:
        return n_blocks * block + idle
    try:
        each = math.exp(failures * idle) * math.expm1(failures * block) / failures
        return n_blocks * each + math.expm1(failures * idle) / failures
    except OverflowError:
        return math.inf


def lost_per_stop(block: float, lag: float, failures: float) -> float:
    """Expected seconds of computing that a worker loses when it is stopped at a random moment while it computes."""
    if failures * (block + lag) < 1e-6:  # the difference below would be of rounding alone
        return block / 2 + lag
    try:
        return 1 / failures - block * math.exp(-failures * lag) / math.expm1(failures * block)
    except OverflowError:  # no block is ever whole: all work is lost
        return 1 / failures


def times(job: Job) -> dict[str, float]:
    """Expected times, and what preemption adds; infinite where stops come so fast that no block gets done.

    Of several groups it is one by itself: the slowest of many takes longer, see `simulate`.
    """
    rounds, lag = -(-job.layout.n_blocks // job.workers), job.lag_seconds
    whole = expected_seconds(rounds, job.paced_seconds, lag, job.restart_seconds, 0)
    wall = expected_seconds(rounds, job.paced_seconds, lag, job.restart_seconds, job.failures)
    return {
        "device_hours": job.chain_steps / job.rate / 3600,
        "block_seconds": job.block_seconds,
        "write_seconds": job.write_seconds,
        "wall_hours": whole / 3600,
        "wall_hours_preempted": wall / 3600,
        "held_device_hours": job.workers * wall / 3600,
        "count_hours": storage(job)["gets_to_resume"] * job.operation_seconds / job.workers / 3600,
        "preemptions": job.preemptions * job.workers * wall if job.preemptions else 0.0,
        "lost_seconds_per_stop": lost_per_stop(job.paced_seconds, lag, job.failures),
        "added_share": wall / whole - 1,
    }


def simulate(job: Job, seed: int) -> tuple[float, int]:
    """One run by chance: seconds until its last block is durable, and how often a group was stopped.

    Blocks are dealt out to the groups beforehand, as to the jobs of an array; in a group whoever is free takes one.
    """
    dice, slowest, stops = random.Random(seed), 0.0, 0
    n_groups = job.workers // job.group
    for number in range(n_groups):
        left = (job.layout.n_blocks + n_groups - 1 - number) // n_groups
        seconds = 0.0
        while left:
            lived = dice.expovariate(job.failures) if job.failures else math.inf
            ready = job.restart_seconds + job.lag_seconds
            needed = ready + -(-left // job.group) * job.paced_seconds
            if lived >= needed:
                seconds, left = seconds + needed, 0
            else:
                rounds = int(max(0.0, lived - ready) / job.paced_seconds)
                seconds, left, stops = seconds + lived, left - rounds * job.group, stops + 1
        slowest = max(slowest, seconds)
    return slowest, stops


def modelled_rate(network: str, precision: str) -> float:
    """Chain-steps a second of an H200-class GPU by the roofline of the compiled kernels: a model, not a measurement.

    Raises:
        InputError: the kernels cannot be compiled here.
    """
    command = [sys.executable, "-m", "kaleido_kernels.inspect", "--json", "--variant", "none", "--net", network]
    command += ["--precision", FORMS[precision]]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    try:
        report = json.loads(done.stdout)[0]
    except (ValueError, LookupError):
        text = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(f"the kernels cannot be compiled here ({text}): pass a measured --rate") from None
    return MODELLED_CHAIN_STEPS / (report["estimate"]["milliseconds"] / 1e3)


def make_layout(network: str, n_chains: int, n_draws: int, dtype: str, chunk_chains: int | None, device: str) -> Layout:
    """The store that a run would write; ``chunk_chains`` None takes what the plan would."""
    spec = network_spec(network)
    request = SampleRequest(n_chains=n_chains, n_draws=n_draws, tol=None)
    facts = H200 if device == "gpu" else DeviceFacts("cpu", has_numba=True)
    plan = make_plan(request, spec, facts, spec.dim, streamed=True)
    chunk = plan.block_chains if chunk_chains is None else -(-chunk_chains // plan.tile_rows) * plan.tile_rows
    encoding = Encoding.choose(dtype, (spec.low, spec.high), "fp32")
    return Layout(n_chains, n_draws, spec.dim, min(chunk, n_chains), encoding)


def as_lines(job: Job, *, simulated: int) -> list[str]:
    """The figures for people."""
    held, hours, layout = storage(job), times(job), job.layout
    lines = [
        f"run        {layout.n_chains:,} chains x {job.n_steps} steps, {layout.n_draws} x {layout.dim} "
        f"{layout.encoding.dtype} values each",
        f"work       {job.chain_steps:.3g} chain-steps, {_amount(hours['device_hours'])} device hours at "
        f"{job.rate:.3g} chain-steps/s",
        f"wall time  {_amount(hours['wall_hours'])} hours with {job.workers:,} workers",
        f"blocks     {held['blocks']:,} of {layout.chunk_chains:,} chains: computed in "
        f"{_amount(hours['block_seconds'])} s, written beside the next in {_amount(hours['write_seconds'])} s",
        f"bytes      {_bytes(held['bytes'])} of arrays, {_bytes(held['stored_bytes'])} stored; a chunk of draws has "
        f"{_bytes(held['bytes_per_draws_chunk'])}",
        f"files      {held['files']:,}; {held['file_system_calls']:,} calls of a file system",
        f"objects    {held['puts']:,} PUT, {held['lists_per_start']:,} LIST a start; a run resumed at its end counts "
        f"with {held['gets_to_resume']:,} GET in {_amount(hours['count_hours'])} hours",
    ]
    if job.preemptions:
        lines += [
            f"preempted  {_amount(hours['preemptions'])} times: of {job.group:,} at once, each loses "
            f"{_amount(job.restart_seconds)} s to restart and {_amount(hours['lost_seconds_per_stop'])} s of work",
            f"in all     {_amount(hours['wall_hours_preempted'])} hours, {_amount(hours['held_device_hours'])} device "
            f"hours: {_amount(100 * hours['added_share'])} % more",
        ]
    if simulated:
        walls = sorted(simulate(job, seed)[0] / 3600 for seed in range(simulated))
        lines.append(
            f"simulated  {_amount(walls[len(walls) // 2])} hours (median of {simulated} runs by chance), "
            f"{_amount(walls[0])} to {_amount(walls[-1])}"
        )
    return lines + [f"note       {text}" for text in remarks(job)]


def remarks(job: Job) -> list[str]:
    """What somebody with these numbers should change."""
    found, hours = [], times(job)
    if job.write_seconds > job.block_seconds:
        found.append("writing is slower than computing and sets the pace: longer --chunk-chains, or a smaller --dtype")
    files = storage(job)["files"]
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
    """Three digits, no exponent where one can do without."""
    if value >= 999.5 and math.isfinite(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{_amount(value)} PB"


def check_store(network: str, n_chains: int, n_steps: int, tell: Callable[[str], None]) -> tuple[Job, float]:
    """A real run: its bytes, files and operations have to be the predicted ones. Gives its job and its seconds.

    Raises:
        InputError: they are not.
    """
    from kaleido_fast import sample_to
    from kaleido_fast.storing.stores import ZarrOutput
    from kaleido_fast.storing.streaming import count_blocks
    from kaleido_fast.storing.tally import Tally

    layout = make_layout(network, n_chains, 1, "uint8", None, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        path, watch = Path(folder) / "a.zarr", Watch(Path(folder) / "a.zarr")
        with watch:
            result = sample_to(path, random_network(network), n_chains=n_chains, dtype="uint8", **_options(n_steps))
        assert result is not None
        assert result.stats is not None
        written = watch.counts
        files = [file for file in path.rglob("*") if file.is_file()]
        output = ZarrOutput.open(path)
        with watch:
            count_blocks(output, list(range(layout.n_blocks)), Tally())
        stored = sum(file.stat().st_size for file in files)
    calls = sum(written[name] for name in ("create", "flush", "rename", "folder"))
    real = {
        "blocks": output.layout.n_blocks,
        "bytes": sum(array.nbytes for name, array in output.arrays.items() if name in ARRAYS),
        "files": len(files),
        "file_system_calls": calls,
        "gets_to_resume": watch.counts["read"],
    }
    rate = result.stats.chain_steps_per_second
    job = Job(layout, n_steps, rate, stored_share=stored / layout.n_bytes)
    predicted = storage(job)
    tell(f"{network}, {n_chains:,} chains x {n_steps} steps: {rate:.3g} chain-steps/s, {result.stats.seconds:.2f} s")
    wrong = [name for name, value in real.items() if value != predicted[name]]
    for name, value in real.items():
        tell(f"  {name:18}{value:>14,}  predicted {predicted[name]:,}{'  WRONG' if name in wrong else ''}")
    tell(f"  {'stored_bytes':18}{stored:>14,}  {job.stored_share:.3f} of the arrays")
    if wrong:
        raise InputError(f"{network}, {n_chains:,} chains: predicted other {', '.join(wrong)} than a real run has")
    return job, result.stats.seconds


class Watch:
    """Counts what this process does with the files below a folder while it is entered."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.counts, self.entered = str(folder), Counter[str](), False
        self.sync = os.fsync
        sys.addaudithook(self._hear)  # stays for the life of the process, and counts nothing after the end

    def __enter__(self) -> None:
        self.counts, self.entered = Counter(), True
        os.fsync = self._flush  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        os.fsync, self.entered = self.sync, False

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.entered or event not in ("open", "os.rename") or "/c." not in self._place(args[0]):
            return
        if event == "os.rename":
            self.counts["rename"] += 1
        else:
            self.counts["create" if args[1] in ("x", "xb") else "read"] += 1

    def _flush(self, handle: Any) -> None:
        number = handle if isinstance(handle, int) else handle.fileno()
        place = Path(f"/proc/self/fd/{number}").readlink()
        if "/c." in self._place(str(place)):
            self.counts["flush"] += 1
        elif place.parent == Path(self.folder):
            self.counts["folder"] += 2  # opened to be flushed
        self.sync(handle)

    def _place(self, path: Any) -> str:
        text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
        return text[len(self.folder) :] if text.startswith(self.folder) else ""


def check_time(before: tuple[Job, float], after: tuple[Job, float], tell: Callable[[str], None]) -> None:
    """Say how well the rate of one run predicts the time of another."""
    rate, (job, seconds) = before[0].rate, after
    predicted = job.chain_steps / rate
    tell(f"  seconds           {seconds:>14.2f}  predicted {predicted:.2f} from the speed of the shorter run")


def check_loss(network: str, n_chains: int, n_steps: int, kills: int, tell: Callable[[str], None]) -> None:
    """Runs killed at random moments (SIGKILL) and resumed: chain-steps that are lost, against the prediction.

    Moments are exponential in chain-steps, five blocks apart on average.

    Raises:
        InputError: the losses are not what was predicted.
    """
    from kaleido_fast.storing.stores import ZarrOutput

    layout = make_layout(network, n_chains, 1, "uint8", KILLED_BLOCK, "cpu")
    dice, lost, apart = random.Random(0), list[float](), 5.0
    with tempfile.TemporaryDirectory() as folder:
        path, started = Path(folder) / "a.zarr", 0
        while len(lost) < kills:
            until = dice.expovariate(1 / apart)
            command = [sys.executable, __file__, "--network", network, "--chains", str(n_chains)]
            command += ["--steps", str(n_steps), "--kill-after", str(until), "--kill-out", str(path)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:  # it came to its end first
                path, started = path.with_name(f"{len(lost)}.zarr"), 0
                continue
            if done.returncode != -signal.SIGKILL:
                raise InputError(f"a run that was to be killed ended otherwise: {done.stderr.strip()[-300:]}")
            durable = int(ZarrOutput.open(path).done().sum())
            lost.append(float(done.stdout.split()[-1]) - (durable - started))
            started = durable
    mean, error = float(np.mean(lost)), float(np.std(lost)) / math.sqrt(len(lost))
    predicted = lost_per_stop(1, 0, 1 / apart)
    tell(
        f"{network}, {layout.n_blocks} blocks killed {kills} times: {mean:.2f} +- {error:.2f} blocks lost each "
        f"({min(lost):.2f} to {max(lost):.2f}), predicted {predicted:.2f} and what was not yet written"
    )
    if not predicted - 4 * error <= mean <= predicted + 4 * error + 1:
        raise InputError("predicted other losses than real runs have")


def run_until_killed(network: str, n_chains: int, n_steps: int, blocks: float, path: Path) -> None:
    """Sample until so many blocks' worth of chain-steps is done; say how many, and be gone."""
    from kaleido_fast import sample_to
    from kaleido_fast.progress import SampleProgress

    begun: list[int] = []

    def tell(state: SampleProgress) -> None:
        block = KILLED_BLOCK * n_steps
        begun.append(state.chain_steps_done // block * block)
        done = (state.chain_steps_done - begun[0]) / block
        if done >= blocks and state.chains_done < state.n_chains:
            print(done, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    options = {**_options(n_steps), "dtype": "uint8", "chunk_chains": KILLED_BLOCK}
    sample_to(path, random_network(network), n_chains=n_chains, callback=tell, **options)


def _options(n_steps: int) -> dict[str, Any]:
    return {"burn_in": n_steps - 1, "tol": None, "device": "cpu"}


def check(tell: Callable[[str], None]) -> None:
    """All checks: minutes on two cores.

    Raises:
        InputError: a prediction is wrong.
    """
    for network, n_steps in (("points2d", 100), ("digits", 5)):
        shorter = check_store(network, 100_000, n_steps, tell)
        check_time(shorter, check_store(network, 1_000_000, n_steps, tell), tell)
    check_loss("digits", 100_000, 20, 20, tell)


@click.command(help=__doc__)
@click.option("--network", type=Name("network", tuple(PRESETS)), default="digits", show_default=True, help="Sizes.")
@click.option(
    "--chains", type=click.FloatRange(min=1), default=1e9, show_default=True, help="Number of chains; 1e9 will do."
)
@click.option("--steps", type=click.IntRange(min=1), help="Steps of a chain [default: as recommended for the network].")
@click.option("--draws", type=click.IntRange(min=1), default=1, show_default=True, help="Draws kept per chain.")
@click.option(
    "--dtype", type=Name("dtype", names.STORED_DTYPES), default="float32", show_default=True, help="As stored."
)
@click.option("--chunk-chains", type=click.IntRange(min=1), help="Chains of a block [default: as the plan chooses].")
@click.option(
    "--on",
    "device",
    type=click.Choice(["gpu", "cpu"]),
    default="gpu",
    show_default=True,
    help="Plan for such a device.",
)
@click.option(
    "--rate",
    type=NumberOr(float, model="model"),
    default="model",
    help="Chain-steps per second of one worker, or 'model': of an H200 by the roofline, which no run has shown.",
)
@click.option("--precision", type=click.Choice(list(FORMS)), default="fp32", show_default=True, help="Of --rate model.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Devices at work at once.")
@click.option(
    "--group", type=click.IntRange(min=1), help="Workers that restart together [default: all, as under torchrun]."
)
@click.option(
    "--bandwidth",
    type=click.FloatRange(min=0, min_open=True),
    default=500.0,
    show_default=True,
    help="MB/s a worker can write.",
)
@click.option(
    "--operation-ms",
    type=click.FloatRange(min=0),
    default=20.0,
    show_default=True,
    help="Milliseconds until a small file is durable on the storage.",
)
@click.option(
    "--stored-share",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Bytes on disk by bytes of the arrays; --check measures it.",
)
@click.option(
    "--preemptions", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Per worker and hour."
)
@click.option(
    "--restart",
    type=click.FloatRange(min=0),
    default=120.0,
    show_default=True,
    help="Seconds from a preemption until the group computes again.",
)
@click.option(
    "--simulate", "simulated", type=click.IntRange(min=0), default=0, help="Also play so many runs by chance."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, times in hours or as named.")
@click.option(
    "--check", "checks", is_flag=True, help="Compare the arithmetic with real runs on this machine, in minutes."
)
@click.option("--kill-after", type=float, hidden=True)
@click.option("--kill-out", type=click.Path(path_type=Path), hidden=True)
def command(**given: Any) -> None:
    if given["checks"]:
        check(click.echo)
        return
    preset = PRESETS[given["network"]]
    if not math.isfinite(given["chains"]):
        raise InputError(f"chains is {given['chains']}: it must be a finite number")
    n_chains = round(given["chains"])
    n_steps = given["steps"] or int(preset.sampling["burn_in"] + preset.sampling.get("thin", 1))
    if given["kill_after"] is not None:
        run_until_killed(given["network"], n_chains, n_steps, given["kill_after"], given["kill_out"])
        return
    job = make_job(n_chains, n_steps, given)
    if given["as_json"]:
        finite = {name: value if math.isfinite(value) else None for name, value in times(job).items()}
        click.echo(json.dumps({**storage(job), **finite, "notes": remarks(job)}, sort_keys=True))
    else:
        click.echo("\n".join(as_lines(job, simulated=given["simulated"])))


def make_job(n_chains: int, n_steps: int, given: dict[str, Any]) -> Job:
    """The job that the options of the command describe.

    Raises:
        InputError: values that do not fit together.
    """
    rate, workers, group = given["rate"], given["workers"], given["group"] or given["workers"]
    if workers % group:
        raise InputError(
            f"{workers} workers in groups of {group}: the groups must be equal; pass a divisor of {workers}"
        )
    if rate != "model" and not (math.isfinite(rate) and rate > 0):
        raise InputError(f"rate is {rate}: it must be a finite number above 0, in chain-steps per second")
    layout = make_layout(
        given["network"], n_chains, given["draws"], given["dtype"], given["chunk_chains"], given["device"]
    )
    return Job(
        layout,
        n_steps,
        modelled_rate(given["network"], given["precision"]) if rate == "model" else rate,
        workers,
        group,
        given["bandwidth"] * 1e6,
        given["operation_ms"] / 1e3,
        given["stored_share"],
        given["preemptions"] / 3600,
        given["restart"],
    )


def main() -> None:
    """Run the command line and end this process; a wrong prediction of --check is an error too."""
    run_program(command, "costs.py", "give the command again")


if __name__ == "__main__":
    main()
