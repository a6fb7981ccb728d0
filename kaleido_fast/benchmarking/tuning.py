"""Times the candidate tiles of a network on a GPU and keeps the best in that GPU's table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kaleido_fast.benchmarking.acceptance import Deviation
from kaleido_fast.benchmarking.contest import (
    Contestant,
    check_contestant,
    one_line,
    reference_states,
    start_states,
)
from kaleido_fast.benchmarking.faults import DeviceLostError, device_answers
from kaleido_fast.benchmarking.timing import compare, spread, stopwatch
from kaleido_fast.errors import InputError
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.planning.facts import DeviceFacts
from kaleido_fast.planning.plan import plan_kernel
from kaleido_fast.planning.request import SampleRequest
from kaleido_fast.system.files import atomic_path
from kaleido_kernels.choice import choose
from kaleido_kernels.proving.trials import trial_tiles
from kaleido_kernels.shapes import NetShape
from kaleido_kernels.tile import AnyTile, GpuFacts
from kaleido_kernels.tuned import read_tuned, tile_to_json, tuned_key

Measure = Callable[[AnyTile], list[float]]
"""Seconds of the same work with a tile, several times; raises what the tile raises."""
MAX_STEPS = 300
CHECKED_CHAINS = 300
TARGET_SECONDS = 0.02


@dataclass(frozen=True)
class Trial:
    """One tile that was tried: its raw seconds a step of all chains, or why it could not be timed."""

    tile: AnyTile
    seconds: list[float]
    problem: str = ""


@dataclass(frozen=True)
class TunedTile:
    """What was found for one network and precision.

    Args:
        name: of the network.
        key: in the table.
        default: what the plan takes without a table.
        best: what it shall take.
        trials: all that was tried.
    """

    name: str
    key: str
    default: AnyTile
    best: AnyTile
    trials: list[Trial]

    def median(self, tile: AnyTile) -> float | None:
        """Median seconds of a tile; None if it was not timed."""
        seconds = next((trial.seconds for trial in self.trials if trial.tile == tile), [])
        return spread(seconds).median if seconds else None

    @property
    def gain(self) -> float | None:
        """How many times faster the best is than the default; None if the default could not be timed."""
        before, after = self.median(self.default), self.median(self.best)
        return None if before is None or after is None else before / after

    def explain(self) -> str:
        """The finding in one line."""
        failed = sum(bool(trial.problem) for trial in self.trials)
        tail = f" ({len(self.trials)} tiles tried{f', {failed} failed' if failed else ''})"
        if self.best == self.default:
            return f"{self.name}: {self.default.name} stays: no other was clearly faster{tail}"
        gain = f"{self.gain:.2f} times as fast as" if self.gain is not None else "which runs, in place of"
        return f"{self.name}: {self.best.name}, {gain} {self.default.name}{tail}"

    def record(self) -> dict[str, Any]:
        """Plain values, raw seconds included."""
        return {
            "network": self.name,
            "key": self.key,
            "default": tile_to_json(self.default),
            "best": tile_to_json(self.best),
            "gain": self.gain,
            "trials": [
                {"tile": tile_to_json(trial.tile), "seconds_per_step": trial.seconds, "problem": trial.problem}
                for trial in self.trials
            ],
        }


def tune_shape(
    name: str,
    shape: NetShape,
    precision: str,
    facts: GpuFacts,
    measure: Measure,
    report: Callable[[float, str], None] = lambda share, text: None,
    tiles: Sequence[AnyTile] | None = None,
    answers: Callable[[], bool] = lambda: True,
) -> TunedTile:
    """Time the tiles of a network; the default stays unless another is faster by more than the spread of the timings.

    Args:
        name: of the network, for people.
        shape, precision, facts: network, device precision and GPU.
        measure: times one tile.
        report: called with the share that is done and the tile that is next.
        tiles: what to try, the plan's choice included; None for `trial_tiles`.
        answers: whether the device still works; asked after a tile that failed.

    Raises:
        InputError: no tile could be timed.
        DeviceLostError: a tile took the device from this process, in which all others would now fail too.
    """
    default = choose(shape, precision, facts).tile
    order = dict.fromkeys([default, *(trial_tiles(shape, precision, facts) if tiles is None else tiles)])
    trials = []
    for done, tile in enumerate(order):
        report(done / len(order), f"{name}: {tile.name}")
        try:
            trials.append(Trial(tile, measure(tile)))
        except DeviceLostError:
            raise
        except Exception as problem:  # a tile that does not compile or gives wrong states is left out
            trials.append(Trial(tile, [], one_line(problem)))
            if not answers():
                raise DeviceLostError(f"{name}, {tile.name}", problem) from problem
    timed = {trial.tile: trial.seconds for trial in trials if trial.seconds}
    if not timed:
        raise InputError(f"{name}: none of {len(trials)} tiles could be timed; the first said: {trials[0].problem}")
    best = min(timed, key=lambda tile: spread(timed[tile]).median)
    if default in timed and compare(timed[best], timed[default]).low <= 1.0:
        best = default
    report(1.0, name)
    return TunedTile(name, tuned_key(shape, precision), default, best, trials)


class FusedRun:
    """The Triton engine with one tile, packed once: what is timed and checked.

    Args:
        model, precision, device: what runs where.
        facts: of the device.
        n_chains: chains of a timed run.
        tile: what to force; None for the plan's choice.
        kernel: as in a request.
    """

    def __init__(
        self,
        model: KaleidoMLP,
        precision: str,
        device: torch.device,
        facts: DeviceFacts,
        n_chains: int,
        tile: AnyTile | None = None,
        kernel: str = "auto",
    ) -> None:
        from kaleido_fast.engines.triton import TritonEngine, plain_layers
        from kaleido_kernels.packing import weights_range

        request = SampleRequest(
            n_chains=n_chains,
            burn_in=MAX_STEPS - 1,
            tol=None,
            engine="triton",
            precision=precision,
            kernel=kernel if tile is None else tile.kernel,
        )
        layers = plain_layers(model)
        try:
            plan = plan_kernel(model.spec, precision, facts, weights_range(layers), kernel=kernel, tile=tile)
        except ValueError as problem:
            raise InputError(f"engine 'triton': {problem}") from problem
        self.engine = TritonEngine(model, request, plan, device)
        self.chain_ids = torch.arange(n_chains, device=device)
        self.draws = torch.empty(n_chains, 1, model.spec.dim, device=device)

    def __call__(self, z0: Tensor, n_steps: int) -> Tensor:
        """States after ``n_steps`` steps from the chains' start noise, which ``z0`` must be (see `start_states`).

        It compiles no other variant of the kernel than `steps` does.
        """
        n = len(z0)
        return self.engine.advance(self.chain_ids[:n], None, 0, n_steps, self.draws[:n], lambda _: None).state

    def steps(self, n_steps: int) -> float:
        """All chains from start noise over ``n_steps`` steps, draws kept: nothing left out but the packing."""
        self.engine.advance(self.chain_ids, None, 0, n_steps, self.draws, lambda _: None)
        return 0.0


def check_fused(run: FusedRun, model: KaleidoMLP, precision: str) -> Deviation:
    """How far the first three steps are from the reference; more than the precision's rounding raises."""
    z0 = start_states(model, min(CHECKED_CHAINS, len(run.chain_ids)), run.chain_ids.device)
    expected = reference_states(model, z0, precision)
    return check_contestant(Contestant(run, precision=precision), z0, expected, model.spec.n_layers)


def steps_within(run: Callable[[int], float], seconds: float, device: torch.device) -> int:
    """Number of steps, up to 300, that take about ``seconds``."""
    watch = stopwatch(device)
    run(1)
    one = max(watch(lambda: run(1)), 1e-7)
    if one >= seconds:
        return 1
    several = max(2, min(MAX_STEPS, int(seconds / one)))
    run(several)
    each = max(watch(lambda: run(several)) / several, 1e-8)
    return max(1, min(MAX_STEPS, int(seconds / each)))


def launch_microseconds(run: FusedRun, repeats: int = 20) -> float:
    """Python's time for a launch on a warm model, at best of some; the device's work is not part of it."""
    device, seconds = run.chain_ids.device, []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        run.steps(1)
        seconds.append(time.perf_counter() - began)
    return 1e6 * min(seconds)


def engine_measure(
    model: KaleidoMLP, precision: str, device: torch.device, facts: DeviceFacts, n_chains: int, rounds: int = 20
) -> Measure:
    """Times a tile on the device: checked against the reference, warm, ``rounds`` times; seconds a step."""

    def measure(tile: AnyTile) -> list[float]:
        run = FusedRun(model, precision, device, facts, n_chains, tile)
        check_fused(run, model, precision)
        n_steps = steps_within(run.steps, TARGET_SECONDS, device)
        watch = stopwatch(device)
        return [watch(lambda: run.steps(n_steps)) / n_steps for _ in range(rounds)]

    return measure


def tune_model(
    name: str,
    model: KaleidoMLP,
    precision: str,
    device: torch.device,
    facts: DeviceFacts,
    n_chains: int,
    *,
    rounds: int = 20,
    measure: Measure | None = None,
    report: Callable[[float, str], None] = lambda share, text: None,
    tiles: Sequence[AnyTile] | None = None,
) -> TunedTile:
    """`tune_shape` for a model on a device.

    Raises:
        InputError: weights outside the range of the precision, a GPU that no tile fits, or none that could be timed.
        DeviceLostError: a tile took the device from this process.
    """
    from kaleido_fast.engines.triton import plain_layers
    from kaleido_kernels.packing import device_precision

    try:
        on_gpu = device_precision(plain_layers(model), precision)
        timer = measure or engine_measure(model, precision, device, facts, n_chains, rounds)
        title = f"{name} {precision}"
        answers = partial(device_answers, device)
        return tune_shape(title, model.spec, on_gpu, facts.gpu, timer, report, tiles, answers)
    except InputError:
        raise
    except ValueError as problem:
        raise InputError(f"{name}: {problem}") from problem


def is_table(path: Path, gpu: str, triton: str) -> bool:
    """Whether a file is a table of tiles of this GPU and Triton, to which others can be added."""
    try:
        read_tuned(path, gpu, triton)
    except (ValueError, OSError):
        return False
    return path.is_file()


def write_table(path: Path, gpu: str, triton: str, found: Sequence[TunedTile]) -> int:
    """Write a GPU's table, keeping entries of an earlier one for the same GPU and Triton.

    Returns:
        Number of entries.
    """
    tiles = read_tuned(path, gpu, triton) if is_table(path, gpu, triton) else {}
    tiles |= {entry.key: tile_to_json(entry.best) for entry in found}
    table = {"format": "kaleido-fast tuned tiles", "device": gpu, "triton": triton, "tiles": tiles}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return len(tiles)
