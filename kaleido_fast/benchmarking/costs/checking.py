"""The arithmetic against real runs on this machine."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kaleido_fast.benchmarking.cases import random_network
from kaleido_fast.benchmarking.costs.arithmetic import LargeRun, lost_per_stop, storage
from kaleido_fast.benchmarking.costs.planned import make_layout
from kaleido_fast.errors import InputError
from kaleido_fast.storing.layout import ARRAYS

KILLED_BLOCK = 4096  # chains of a block in runs that are killed


def check(tell: Callable[[str], None]) -> None:
    """All checks: minutes on two cores.

    Raises:
        InputError: a prediction is wrong.
    """
    for network, n_steps in (("points2d", 100), ("digits", 5)):
        shorter = check_store(network, 100_000, n_steps, tell)
        check_time(shorter, check_store(network, 1_000_000, n_steps, tell), tell)
    check_loss("digits", 100_000, 20, 20, tell)


def check_store(network: str, n_chains: int, n_steps: int, tell: Callable[[str], None]) -> tuple[LargeRun, float]:
    """A real run: its bytes, files and operations must be the predicted ones. Returns it and its seconds.

    Raises:
        InputError: they are not.
    """
    from kaleido_fast import sample_to
    from kaleido_fast.storing.tally import Tally
    from kaleido_fast.storing.zarr_output import ZarrOutput

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
            Tally().add_blocks(output, range(layout.n_blocks))
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
    run = LargeRun(layout, n_steps, rate, stored_share=stored / layout.n_bytes)
    predicted = storage(run)
    tell(f"{network}, {n_chains:,} chains x {n_steps} steps: {rate:.3g} chain-steps/s, {result.stats.seconds:.2f} s")
    wrong = [name for name, value in real.items() if value != predicted[name]]
    for name, value in real.items():
        tell(f"  {name:18}{value:>14,}  predicted {predicted[name]:,}{'  WRONG' if name in wrong else ''}")
    tell(f"  {'stored_bytes':18}{stored:>14,}  {run.stored_share:.3f} of the arrays")
    if wrong:
        raise InputError(f"{network}, {n_chains:,} chains: a real run has other {', '.join(wrong)} than predicted")
    return run, result.stats.seconds


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


def check_time(before: tuple[LargeRun, float], after: tuple[LargeRun, float], tell: Callable[[str], None]) -> None:
    """Say how well the rate of one run predicts the time of another."""
    rate, (run, seconds) = before[0].rate, after
    predicted = run.chain_steps / rate
    tell(f"  seconds           {seconds:>14.2f}  predicted {predicted:.2f} from the speed of the shorter run")


def check_loss(network: str, n_chains: int, n_steps: int, kills: int, tell: Callable[[str], None]) -> None:
    """Runs killed at random moments (SIGKILL) and resumed: chain-steps that are lost, against the prediction.

    Moments are exponential in chain-steps, five blocks apart on average.

    Raises:
        InputError: the losses are not what was predicted.
    """
    from kaleido_fast.storing.zarr_output import ZarrOutput

    layout = make_layout(network, n_chains, 1, "uint8", KILLED_BLOCK, "cpu")
    dice, lost, apart = random.Random(0), list[float](), 5.0
    with tempfile.TemporaryDirectory() as folder:
        path, started = Path(folder) / "a.zarr", 0
        while len(lost) < kills:
            until = dice.expovariate(1 / apart)
            command = [
                sys.executable,
                "-m",
                "kaleido_fast.cli.costs",
                "--network",
                network,
                "--chains",
                str(n_chains),
            ]
            command += ["--steps", str(n_steps), "--kill-after", str(until), "--kill-out", str(path)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:  # it came to its end first
                path, started = path.with_name(f"{len(lost)}.zarr"), 0
                continue
            if done.returncode != -signal.SIGKILL:
                raise InputError(f"a run that was to be killed ended by itself: {done.stderr.strip()[-300:]}")
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
        raise InputError("the predicted losses differ from those of real runs")


def run_until_killed(network: str, n_chains: int, n_steps: int, blocks: float, path: Path) -> None:
    """Sample until as many chain-steps as in so many blocks are done; print how many, and end at once."""
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
