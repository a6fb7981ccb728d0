"""One training run: batches, corruption, optimiser steps and the measure that picks the best weights.

Order and noise of a step derive from (seed, step), so that a run that goes on from a file takes the same steps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kaleido_fast.errors import InputError
from kaleido_fast.model import KaleidoMLP, ModelSpec
from kaleido_fast.presets import TrainingRecipe, recipe_facts
from kaleido_fast.progress import HistoryEntry
from kaleido_fast.reading.datasets import Dataset
from kaleido_fast.system.threads import deciding_threads
from kaleido_fast.training.average import WeightAverage
from kaleido_fast.training.calibration import Calibration, LastLayer, calibrate
from kaleido_fast.training.corruption import Shifts, make_inputs
from kaleido_fast.training.objective import (
    NOISE_LEVELS,
    BeforeBound,
    FixedExamples,
    FlowErrors,
    held_out_measure,
    mean_loss,
)
from kaleido_fast.training.pace import steps_in_time
from kaleido_fast.training.parallel import TrainingWorkers
from kaleido_fast.training.precision import autocast, faster_precision
from kaleido_fast.training.start import initialise
from kaleido_fast.training.state import load_state, save_state

MAX_SEED = 2**64 - 1
MEASURE = "u 0.7, 0.9"  # by which a flow's best weights are known, as state files say it
FINAL_SHARE = 0.01  # of the peak learning rate, at the end of the cosine
EVALUATIONS = 100  # per run
# Words that keep the random streams of one seed apart.
ORDER, NOISE, EVALUATION, START, ATTEMPT, SHIFT, CALIBRATION = range(7)


def stream_seed(seed: int, *words: int) -> int:
    """A 64-bit seed for the random stream ``words`` of ``seed``, by rounds of splitmix64 (Steele et al. 2014)."""
    mask, value = MAX_SEED, seed & MAX_SEED
    for word in words:
        value = (value + (word + 1) * 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        value ^= value >> 31
    return value


def learning_rate(recipe: TrainingRecipe, step: int) -> float:
    """Learning rate of step 0, 1, ...: a linear warm-up times a cosine to 1 % of the peak, or times 1."""
    rate = recipe.learning_rate * min(1.0, (step + 1) / max(1, recipe.warmup))
    if recipe.schedule == "constant":
        return rate
    return rate * (FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))


def make_request(dataset: Dataset, spec: ModelSpec, recipe: TrainingRecipe, seed: int) -> dict[str, Any]:
    """What decides a run's result, as plain JSON values."""
    return {"network": spec.to_json(), "recipe": recipe_facts(asdict(recipe)), "seed": seed, "data": dataset.sha256}


class Batches:
    """Rows of step 0, 1, ...: an endless row of shuffles, each a function of (seed, its number) alone."""

    def __init__(self, n_examples: int, batch_size: int, seed: int) -> None:
        self.n, self.size, self.seed = n_examples, batch_size, seed
        self.epochs = -(-batch_size // n_examples)  # shuffles made at once: many when examples are few
        self.kept: tuple[int, Tensor] | None = None

    def _shuffles(self, number: int) -> Tensor:
        if self.kept is None or self.kept[0] != number:
            generator = torch.Generator().manual_seed(stream_seed(self.seed, ORDER, number))
            keys = torch.rand(self.epochs, self.n, generator=generator, dtype=torch.float64)
            self.kept = number, keys.argsort(dim=1).flatten()
        return self.kept[1]

    def rows(self, step: int) -> Tensor:
        """Indices of the examples of a step: int64 (batch_size,)."""
        length = self.epochs * self.n
        first, start = divmod(step * self.size, length)
        rows = self._shuffles(first)[start : start + self.size]
        if len(rows) < self.size:
            rows = torch.cat([rows, self._shuffles(first + 1)[: self.size - len(rows)]])
        return rows


class TrainingRun:
    """One training run between two steps: everything that a resumed run needs, and how to make the next step."""

    def __init__(
        self,
        dataset: Dataset,
        spec: ModelSpec,
        recipe: TrainingRecipe,
        seed: int,
        device: torch.device,
        workers: TrainingWorkers | None = None,
    ) -> None:
        self.workers = workers or TrainingWorkers()
        train_part, held_part = dataset.split(recipe.held_out)
        self.spec, self.recipe, self.seed, self.device = spec, recipe, seed, device
        self.data = train_part.data.to(device)
        self.watched = self.data if held_part is None else held_part.data.to(device)
        self.request = make_request(dataset, spec, recipe, seed)
        self.threads = deciding_threads(device)
        self._fix_steps(recipe.steps)
        self.timed = recipe.seconds > 0  # the number of steps is still to be measured
        self.history: list[HistoryEntry] = []
        with torch.device("meta"):  # no weights are drawn from the global generator
            model = KaleidoMLP(spec)
        self.model = model.to_empty(device=device).train()
        self.network: nn.Module = BeforeBound(self.model)  # what computes a step; wrapped where workers share it
        self.wrapped = self.workers.size == 1
        self.shifts = Shifts(spec.sample_shape, recipe.shift, device) if recipe.shift > 0 else None
        self.precision = None if recipe.precision == "auto" else recipe.precision
        self.begin(attempt=0)

    def begin(self, attempt: int) -> None:
        """Start an attempt; the first one uses the seed itself."""
        self.attempt, self.step = attempt, 0
        self.attempt_seed = self.seed if attempt == 0 else stream_seed(self.seed, ATTEMPT, attempt)
        weights = torch.Generator().manual_seed(stream_seed(self.attempt_seed, START))
        initialise(self.model, self.recipe.init, weights, self.data)
        fused = self.device.type in ("cpu", "cuda")
        settings: dict[str, Any] = {"lr": self.recipe.learning_rate, "fused": fused}
        if self.recipe.weight_decay > 0:
            settings |= {"weight_decay": self.recipe.weight_decay, "decoupled_weight_decay": True}
        self.optimizer = torch.optim.Adam(self.model.parameters(), **settings)
        self.average = WeightAverage(self.model, self.recipe.average) if self.recipe.average > 0 else None
        self.batches = Batches(len(self.data), self.recipe.batch_size, self.attempt_seed)
        self.running = torch.zeros((), dtype=torch.float64, device="cpu" if self.device.type == "mps" else self.device)
        self.best_loss, self.best_step = math.inf, 0
        self.best = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.fixed = FixedExamples.of(self.watched, self.data, self.spec, self.recipe, self._generator(EVALUATION))

    def _fix_steps(self, steps: int) -> None:
        self.recipe = replace(self.recipe, steps=steps)
        self.every = max(1, steps // EVALUATIONS)

    def prepare(self) -> None:
        """Find out what the recipe leaves to the machine: the type of products, and how many steps fit into its time.

        Both are found once, before the first step, and kept by a run that goes on.
        """
        if self.precision is None:
            self.precision = self.workers.broadcast("precision", self._faster_precision)
        if not self.timed:
            return
        self.timed = False
        steps = steps_in_time(
            self.recipe.seconds, self.advance, lambda: held_out_measure(self.fixed, self._measured), EVALUATIONS
        )
        self.history = []
        self.begin(self.attempt)
        self._fix_steps(steps)

    def _generator(self, *words: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(stream_seed(self.attempt_seed, *words))

    def advance(self, stop: bool = False) -> bool:
        """One optimiser step; after every ``self.every`` of them, and the last, an evaluation.

        Returns whether to stop, which is so if ``stop`` was given to any worker. If another worker is lost, it raises
        `RuntimeError`, and the run is still as it was.
        """
        self.prepare()
        clean = self.data[self.batches.rows(self.step).to(self.device)]
        if self.shifts is not None:
            clean = self.shifts(clean, self._generator(SHIFT, self.step))
        inputs = make_inputs(clean, self.data, self.spec, self.recipe, self._generator(NOISE, self.step))
        rate = learning_rate(self.recipe, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss, stop = self._backward(inputs, clean, stop)
        self.optimizer.step()
        self.running += loss.detach().to(self.running.device)
        self.step += 1
        if self.average is not None:
            self.average.add(self.model, self.step)
        if self.step % self.every == 0 or self.step == self.recipe.steps:
            self.evaluate(rate)
        return stop

    def _faster_precision(self) -> str:
        return faster_precision(self.network, self.recipe.batch_size, self.spec.dim, self.device)

    def _backward(self, inputs: Tensor, clean: Tensor, stop: bool) -> tuple[Tensor, bool]:
        """Gradients and loss of a whole batch, of which this process may compute a share."""
        if not self.wrapped:  # only now are weights there to be spread
            self.network, self.wrapped = self.workers.wrap(self.network, inputs[:1]), True
        rows = self.workers.rows(len(clean))
        with autocast(self.precision or "fp32", self.device):
            before = self.network(inputs[rows])
        part = clean[rows]
        share = mean_loss(before, part, self.spec, self.recipe.loss) * (len(part) / len(clean))
        (share * self.workers.size).backward()  # gradients are averaged over the workers
        return self.workers.agree(share, stop)

    def evaluate(self, rate: float) -> None:
        """Measure, record, and keep the weights if they are the best so far."""
        held_out = held_out_measure(self.fixed, self._measured)
        since = self.step - (self.history[-1].step if self.history and self.history[-1].attempt == self.attempt else 0)
        entry = HistoryEntry(self.attempt, self.step, float(self.running) / since, held_out, rate)
        if not (math.isfinite(entry.loss) and math.isfinite(held_out)):
            raise InputError(
                f"training diverged: after {self.step:,} steps the loss is {entry.loss:g} and the held-out error "
                f"{held_out:g}; lower learning_rate (it is {self.recipe.learning_rate:g})"
            )
        self.history.append(entry)
        self.running.zero_()
        if held_out < self.best_loss:
            self.best_loss, self.best_step = held_out, self.step
            self.best = {name: tensor.clone() for name, tensor in self._kept().items()}

    def _kept(self) -> dict[str, Tensor]:
        """The weights that are measured and kept."""
        return self.model.state_dict() if self.average is None else self.average.tensors

    def _measured(self, inputs: Tensor) -> Tensor:
        """The network with the weights that are kept."""
        outputs: Tensor = functional_call(self.model, self._kept(), (inputs,))
        return outputs

    def take_best(self) -> None:
        """Take the best weights; their measure is ``best_loss``."""
        self.model.load_state_dict(self.best)

    def calibrate(self, sampling: Mapping[str, Any]) -> Calibration | None:
        """Give samples the share of the data's variance that the recipe says; None where it says none."""
        if self.recipe.sample_variance == 0:
            return None
        return calibrate(self.model, self.data, sampling, self.recipe.sample_variance, self._generator(CALIBRATION))

    def stretch(self, gain: float) -> None:
        """Stretch the last layer by what another worker has found."""
        LastLayer(self.model, self.data, self._generator(CALIBRATION)).stretch(gain)

    def finish(self) -> None:
        """Round the weights as the recipe says, and measure those that are stored."""
        if self.recipe.weights == "fp16":
            for tensor in self.model.state_dict().values():
                tensor.copy_(tensor.half())
        if self.recipe.weights == "fp16" or self.recipe.sample_variance > 0:
            self.best_loss = held_out_measure(self.fixed, self.model)

    def flow_errors(self) -> FlowErrors:
        """Errors of the network as it is, by the share of noise."""
        scale = ((self.spec.high - self.spec.low) / 2) ** 2

        def errors(examples: Tensor) -> list[float]:
            fixed = FixedExamples.of(examples, self.data, self.spec, self.recipe, self._generator(EVALUATION))
            return [error / scale for error in fixed.errors(self.model)]

        held_out = None if self.watched is self.data else errors(self.watched)
        return FlowErrors(list(NOISE_LEVELS), errors(self.data), held_out)

    def _measure_best_anew(self, path: Path) -> None:
        """Make the best weights of an earlier version comparable with those to come."""
        warnings.warn(
            f"{path} was begun by a version that measured the best weights in another way: they are measured anew, "
            "and the result is not that of an uninterrupted run",
            stacklevel=6,
        )
        self.best_loss = held_out_measure(self.fixed, lambda inputs: functional_call(self.model, self.best, (inputs,)))

    def save(self, path: Path) -> None:
        """Write everything to a state file."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        if self.average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.tensors.items()}
        tensors["running"] = self.running
        for name, parameter in self.model.named_parameters():
            for moment, tensor in self.optimizer.state[parameter].items():
                tensors[f"adam.{name}.{moment}"] = tensor
        best_loss = self.best_loss if math.isfinite(self.best_loss) else None
        position = {
            "attempt": self.attempt,
            "step": self.step,
            "best_loss": best_loss,
            "best_step": self.best_step,
            "measure": MEASURE,
            "workers": self.workers.size,
            "threads": self.threads,
            "precision": self.precision,
            "steps": self.recipe.steps,
            "history": [asdict(entry) for entry in self.history],
        }
        save_state(path, self.request, position, tensors)

    def restore(self, path: Path) -> None:
        """Take over the state in a file that `save` wrote for the same request."""
        position, tensors = load_state(path, self.request)
        before = position.get("workers", 1)
        if before != self.workers.size:
            warnings.warn(
                f"{path} was written by {before} workers, now there are {self.workers.size}: the result agrees with "
                "that of an uninterrupted run to rounding, not to the bit",
                stacklevel=5,
            )
        begun_with = position.get("threads", self.threads)
        if None not in (begun_with, self.threads) and begun_with != self.threads:
            warnings.warn(
                f"{path} was begun with {begun_with} threads and goes on with them, not with {self.threads}: the last "
                "bits depend on their number",
                stacklevel=5,
            )
            self.threads = begun_with
        self.precision = position.get("precision", self.precision)  # also on a processor that would choose another
        if self.timed and "steps" in position:
            self._fix_steps(position["steps"])
            self.timed = False
        self.begin(position["attempt"])
        self.step, self.best_step = position["step"], position["best_step"]
        self.best_loss = math.inf if position["best_loss"] is None else position["best_loss"]
        self.history = [HistoryEntry(**entry) for entry in position["history"]]
        self.running.copy_(tensors["running"])
        self.model.load_state_dict({name: tensors[f"model.{name}"] for name in self.best})
        self.best = {name: tensors[f"best.{name}"].to(self.device) for name in self.best}
        if self.recipe.kind == "flow" and position.get("measure") != MEASURE and self.best_step > 0:
            self._measure_best_anew(path)
        if self.average is not None:
            self.average.tensors = {name: tensors[f"average.{name}"].to(self.device) for name in self.best}
        for name, parameter in self.model.named_parameters():
            prefix = f"adam.{name}."
            moments = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if moments:
                self.optimizer.state[parameter] = {key: value.to(self.device) for key, value in moments.items()}
