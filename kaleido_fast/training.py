"""The trainer: an autoencoder that also maps what lies near an example back to it.

By default inputs are corrupted by noise and the loss asks for the clean example (a denoising autoencoder, Vincent et
al. 2008): it makes the network contract around its examples, which a plain autoencoder does not, so that examples
attract chains. The published recipe (Shrivastava, arXiv 2402.11793) is ``recipe="published"``.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from kaleido_fast.checkpoint import ModelCard
from kaleido_fast.datasets import Dataset, load_dataset
from kaleido_fast.diagnostics import Diagnostics, diagnose, evenly
from kaleido_fast.errors import InputError, unknown_name
from kaleido_fast.files import check_writable
from kaleido_fast.model import KaleidoMLP, ModelSpec
from kaleido_fast.presets import PRESETS, PUBLISHED_RECIPE, Preset, TrainingRecipe, find_preset
from kaleido_fast.training_state import load_state, save_state

INITS = ("kaiming", "default")
SCHEDULES = ("cosine", "constant")
FINAL_SHARE = 0.01  # of the peak learning rate, at the end of the cosine
EVALUATIONS = 100  # per run
EVALUATION_ROWS = 2048
ACCEPTED_ERROR = 0.02
MAX_SEED = 2**64 - 1
# Words that keep the random streams of one seed apart.
ORDER, NOISE, EVALUATION, START, ATTEMPT = range(5)


@dataclass(frozen=True)
class HistoryEntry:
    """One evaluation: ``loss`` is the mean over the training batches since the last one, ``held_out`` the measure by
    which the best weights are kept (mean squared error on fixed corrupted examples)."""

    attempt: int
    step: int
    loss: float
    held_out: float
    learning_rate: float


@dataclass(frozen=True)
class TrainingProgress:
    """What a callback gets after every step; ``last`` is the latest evaluation, if there was one."""

    attempt: int
    step: int
    steps: int
    learning_rate: float
    seconds_left: float
    last: HistoryEntry | None


@dataclass(frozen=True)
class TrainResult:
    """A trained model in eval mode on the CPU, its card, the loss history and the warnings that were given."""

    model: KaleidoMLP
    card: ModelCard
    history: tuple[HistoryEntry, ...]
    warnings: tuple[str, ...] = ()


class TrainingInterruptedError(KeyboardInterrupt):
    """Ctrl-C during training; with a state path, the same call goes on from ``step``."""

    def __init__(self, step: int, steps: int, state: Path | None) -> None:
        kept = f"run the same command again to go on from {state}" if state else "nothing was kept: no state path given"
        super().__init__(f"interrupted after {step:,} of {steps:,} training steps; {kept}")
        self.step = step
        self.steps = steps
        self.state = state


class UnstableModelWarning(UserWarning):
    """The trained network does not attract chains to its training examples."""


def train(
    dataset: Dataset | str | Path | None = None,
    *,
    preset: str | None = None,
    spec: ModelSpec | None = None,
    recipe: TrainingRecipe | str | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    state: str | Path | None = None,
    save_every: float = 60.0,
    callback: Callable[[TrainingProgress], None] | None = None,
) -> TrainResult:
    """Train a kaleidoscope.

    The weights kept are those with the least error on fixed corrupted examples: held-out ones where the recipe holds
    some out, else training examples. The result depends on the arguments, the kind of device and the versions of the
    libraries alone; global random states are neither read nor changed.

    Args:
        dataset: a `Dataset`, or what `load_dataset` takes; by default the preset's.
        preset: name of a reference network; gives data set, network, recipe and recommended sampling settings, each
            of which an argument overrides.
        spec: the network; without it and without a preset, 6 layers, 256 wide (512 above 256 dimensions).
        recipe: a `TrainingRecipe`, "published" (the paper's plain autoencoder) or the name of a preset.
        seed: 0 to 2^64 - 1.
        device: "auto" (a CUDA device where there is one), or torch's name of a device.
        state: a path for the state of the unfinished run. Where it exists the run goes on from there, with the same
            bits as one that was never interrupted.
        save_every: seconds between writes of the state; it is also written on Ctrl-C and at the end.
        callback: called after every step; if it raises `KeyboardInterrupt`, that counts as Ctrl-C.

    Raises:
        InputError: an argument or data that cannot be used, a state of another run, or a loss that is not finite.
        TrainingInterruptedError: Ctrl-C, with the state written.
    """
    found = None if preset is None else find_preset(preset)
    data, spec, recipe = _resolve(dataset, found, spec, recipe)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise InputError(f"seed {seed!r}: give a whole number from 0 to {MAX_SEED}")
    state_path = None if state is None else Path(state)
    if state_path is not None:
        check_writable(state_path)
    run = _Run(data, spec, recipe, seed, find_device(device))
    if state_path is not None and state_path.exists():
        run.restore(state_path)
    loop = _Loop(run, state_path, save_every, callback)
    diagnostics = _train_until_accepted(run, loop)
    name = preset or data.name
    card = ModelCard(
        name=name,
        recipe={**asdict(recipe), "seed": seed, "attempt": run.attempt, "best_step": run.best_step},
        dataset={"name": data.name, "sha256": data.sha256, "n_examples": len(data)},
        scaling=data.scaling,
        final_loss=run.best_loss,
        diagnostics=diagnostics.to_dict(),
        sampling=dict(found.sampling) if found else recommended_sampling(recipe, diagnostics),
        created_with=_versions(),
    )
    problem = diagnostics.problem()
    if problem is not None:
        warnings.warn(f"model {name}: {problem}", UnstableModelWarning, stacklevel=2)
    return TrainResult(run.model.cpu().eval(), card, tuple(run.history), () if problem is None else (problem,))


def _resolve(
    dataset: Dataset | str | Path | None,
    preset: Preset | None,
    spec: ModelSpec | None,
    recipe: TrainingRecipe | str | None,
) -> tuple[Dataset, ModelSpec, TrainingRecipe]:
    if dataset is None and preset is None:
        raise InputError(f"nothing to train on: give a data set, or a preset ({', '.join(PRESETS)})")
    if spec is None and preset is not None:
        shape = preset.network
        spec = ModelSpec(shape.widths, bound=shape.bound, sample_shape=shape.sample_shape)
    if not isinstance(dataset, Dataset):
        limit = preset.limit if preset is not None else None
        source = dataset if dataset is not None else cast("Preset", preset).dataset
        dataset = load_dataset(source, bound=spec.bound if spec else "tanh", limit=limit)
    spec = spec or default_spec(dataset)
    if spec.dim != dataset.dim:
        raise InputError(
            f"data set {dataset.name} has {dataset.dim} values an example, the network takes {spec.dim}: "
            "give a spec or preset of the same size"
        )
    low, high = float(dataset.data.min()), float(dataset.data.max())
    if low < spec.low or high > spec.high:
        raise InputError(
            f"data set {dataset.name} has values from {low:g} to {high:g}, the network's range is "
            f"[{spec.low:g}, {spec.high:g}]: load it with bound={spec.bound!r}"
        )
    if isinstance(recipe, str):
        recipe = PUBLISHED_RECIPE if recipe == "published" else find_recipe(recipe)
    if recipe is None:
        recipe = preset.recipe if preset is not None else default_recipe(dataset)
    check_recipe(recipe)
    return dataset, spec, recipe


def find_recipe(name: str) -> TrainingRecipe:
    """The recipe of a preset, or "published"; an unknown name raises `InputError`."""
    if name == "published":
        return PUBLISHED_RECIPE
    if name not in PRESETS:
        raise unknown_name("recipe", name, ("published", *PRESETS))
    return PRESETS[name].recipe


def default_spec(dataset: Dataset) -> ModelSpec:
    """6 layers, past which denoised networks gain nothing but speed of convergence; 256 wide, 512 above D = 256."""
    width = 256 if dataset.dim <= 256 else 512
    low = float(dataset.data.min())
    bound = "sigmoid" if low >= 0 and dataset.scaling.offset == 0 and dataset.scaling.scale != 1 else "tanh"
    return ModelSpec((dataset.dim, *[width] * 5, dataset.dim), bound=bound, sample_shape=dataset.sample_shape)


def default_recipe(dataset: Dataset) -> TrainingRecipe:
    """Noise 0.4; above D = 256 noise and pair-mix, since noise of independent values leaves the subspace of large
    images alone and only mixing contracts along it."""
    return TrainingRecipe() if dataset.dim <= 256 else TrainingRecipe(noise=0.5, pair_mix=0.4)


def check_recipe(recipe: TrainingRecipe) -> None:
    """Refuse a recipe that cannot be followed, naming the field."""
    for name, least in (("steps", 1), ("batch_size", 1), ("warmup", 0), ("held_out", 0), ("attempts", 1)):
        value = getattr(recipe, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"recipe: {name} = {value!r}: give a whole number, at least {least}")
    for name, low, high in (("learning_rate", 0.0, 1.0), ("noise", 0.0, 10.0), ("pair_mix", 0.0, 1.0)):
        value = getattr(recipe, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise InputError(f"recipe: {name} = {value!r}: give a number from {low:g} to {high:g}")
    if recipe.learning_rate == 0:
        raise InputError("recipe: learning_rate = 0: give a number above 0, such as 0.001")
    for kind, name, known in (("init", recipe.init, INITS), ("schedule", recipe.schedule, SCHEDULES)):
        if name not in known:
            raise unknown_name(kind, name, known)


def find_device(name: str | torch.device) -> torch.device:
    """The device to train on; one that is not there raises `InputError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as problem:
        text = str(problem).split("\n")[0]
        raise InputError(
            f"device {str(name)!r} cannot be used: {text}; known are auto, cpu, cuda, cuda:0, ..."
        ) from None
    return device


def recommended_sampling(recipe: TrainingRecipe, diagnostics: Diagnostics) -> dict[str, float]:
    """Sampling settings for a network without a preset.

    Where most examples are stable, chains run to their fixed point. Where they are not, 20 steps with jitter a little
    above the training noise and two clean steps gave the best coverage and class balance on 8 x 8 digits.
    """
    if recipe.noise == 0:
        return {}
    if diagnostics.problem() is None:
        return {"burn_in": 99, "thin": 1, "jitter": 0.0, "tol": 1e-4}
    return {"burn_in": 19, "thin": 1, "jitter": round(1.25 * recipe.noise, 3), "settle": 2}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        versions["kaleido-fast"] = importlib.metadata.version("kaleido-fast")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        versions["kaleido-fast"] = "source"
    return versions


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


def initialise(model: KaleidoMLP, init: str, seed: int) -> None:
    """Draw all weights from ``seed``, the same ones on every device."""
    generator = torch.Generator().manual_seed(stream_seed(seed, START))
    hidden: Literal["relu", "tanh"] = "tanh" if model.spec.activation == "tanh" else "relu"
    for i, layer in enumerate(model.linears):
        weight = torch.empty(layer.weight.shape)
        bias_limit = 0.0
        if init == "kaiming":
            last = i == len(model.linears) - 1
            nn.init.kaiming_normal_(weight, nonlinearity="linear" if last else hidden, generator=generator)
        else:  # torch's own for a linear layer: uniform within 1 / sqrt(inputs), weights and biases alike
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
            bias_limit = 1 / math.sqrt(weight.shape[1])
        with torch.no_grad():
            layer.weight.copy_(weight)
            if layer.bias is not None:
                layer.bias.copy_((torch.rand(layer.bias.shape, generator=generator) * 2 - 1) * bias_limit)


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


def corrupt(clean: Tensor, data: Tensor, spec: ModelSpec, recipe: TrainingRecipe, generator: torch.Generator) -> Tensor:
    """Training inputs for clean examples (n, D): moved towards others of ``data``, noised, clamped to the range.

    The clamp is the sampler's own: the network learns from inputs such as jitter will give it.
    """
    inputs = clean
    if recipe.pair_mix > 0:
        others = torch.randint(len(data), (len(clean),), generator=generator, device=clean.device)
        share = torch.rand((len(clean), 1), generator=generator, device=clean.device) * recipe.pair_mix
        inputs = inputs + share * (data[others] - inputs)
    if recipe.noise > 0:
        scale = recipe.noise * (spec.high - spec.low) / 2
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        inputs = (inputs + scale * noise).clamp(spec.low, spec.high)
    return inputs


class _Run:
    """One training run between two steps: everything that a resumed run needs, and how to make the next step."""

    def __init__(
        self, dataset: Dataset, spec: ModelSpec, recipe: TrainingRecipe, seed: int, device: torch.device
    ) -> None:
        train_part, held_part = dataset.split(recipe.held_out)
        self.spec, self.recipe, self.seed, self.device = spec, recipe, seed, device
        self.data = train_part.data.to(device)
        self.watched = self.data if held_part is None else held_part.data.to(device)
        self.request = {"network": spec.to_json(), "recipe": asdict(recipe), "seed": seed, "data": dataset.sha256}
        self.every = max(1, recipe.steps // EVALUATIONS)
        self.history: list[HistoryEntry] = []
        with torch.device("meta"):  # no weights are drawn from the global generator
            model = KaleidoMLP(spec)
        self.model = model.to_empty(device=device).train()
        self.begin(attempt=0)

    def begin(self, attempt: int) -> None:
        """Start an attempt; the first one uses the seed itself."""
        self.attempt, self.step = attempt, 0
        self.attempt_seed = self.seed if attempt == 0 else stream_seed(self.seed, ATTEMPT, attempt)
        initialise(self.model, self.recipe.init, self.attempt_seed)
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.recipe.learning_rate, fused=fused)
        self.batches = Batches(len(self.data), self.recipe.batch_size, self.attempt_seed)
        self.running = torch.zeros((), dtype=torch.float64, device="cpu" if self.device.type == "mps" else self.device)
        self.best_loss, self.best_step = math.inf, 0
        self.best = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.fixed_inputs, self.fixed_targets = self._evaluation_set()

    def _generator(self, *words: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(stream_seed(self.attempt_seed, *words))

    def _evaluation_set(self) -> tuple[Tensor, Tensor]:
        targets = evenly(self.watched, EVALUATION_ROWS)
        corrupted = self.recipe.noise > 0 or self.recipe.pair_mix > 0
        targets = targets.repeat(max(1, EVALUATION_ROWS // len(targets)) if corrupted else 1, 1)
        return corrupt(targets, self.data, self.spec, self.recipe, self._generator(EVALUATION)), targets

    def advance(self) -> None:
        """One optimiser step; after every ``self.every`` of them, and the last, an evaluation."""
        clean = self.data[self.batches.rows(self.step).to(self.device)]
        inputs = corrupt(clean, self.data, self.spec, self.recipe, self._generator(NOISE, self.step))
        rate = learning_rate(self.recipe, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.mse_loss(self.model(inputs), clean)
        loss.backward()
        self.optimizer.step()
        self.running += loss.detach().to(self.running.device)
        self.step += 1
        if self.step % self.every == 0 or self.step == self.recipe.steps:
            self.evaluate(rate)

    def evaluate(self, rate: float) -> None:
        """Measure, record, and keep the weights if they are the best so far."""
        with torch.no_grad():
            held_out = float(nn.functional.mse_loss(self.model(self.fixed_inputs), self.fixed_targets))
        since = self.step - (self.history[-1].step if self.history and self.history[-1].attempt == self.attempt else 0)
        entry = HistoryEntry(self.attempt, self.step, float(self.running) / since, held_out, rate)
        if not (math.isfinite(entry.loss) and math.isfinite(held_out)):
            raise InputError(
                f"training diverged: the loss is {entry.loss} after {self.step:,} steps; "
                f"lower learning_rate (it is {self.recipe.learning_rate:g})"
            )
        self.history.append(entry)
        self.running.zero_()
        if held_out < self.best_loss:
            self.best_loss, self.best_step = held_out, self.step
            self.best = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def save(self, path: Path) -> None:
        """Write everything to a state file."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
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
            "history": [asdict(entry) for entry in self.history],
        }
        save_state(path, self.request, position, tensors)

    def restore(self, path: Path) -> None:
        """Take over the state in a file that `save` wrote for the same request."""
        position, tensors = load_state(path, self.request)
        self.begin(position["attempt"])
        self.step, self.best_step = position["step"], position["best_step"]
        self.best_loss = math.inf if position["best_loss"] is None else position["best_loss"]
        self.history = [HistoryEntry(**entry) for entry in position["history"]]
        self.running.copy_(tensors["running"])
        self.model.load_state_dict({name: tensors[f"model.{name}"] for name in self.best})
        self.best = {name: tensors[f"best.{name}"].to(self.device) for name in self.best}
        for name, parameter in self.model.named_parameters():
            prefix = f"adam.{name}."
            moments = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if moments:
                self.optimizer.state[parameter] = {key: value.to(self.device) for key, value in moments.items()}


@dataclass(frozen=True)
class _Loop:
    """Steps until the run's last one, with callback, state file and Ctrl-C."""

    run: _Run
    state: Path | None
    save_every: float
    callback: Callable[[TrainingProgress], None] | None

    def finish(self) -> None:
        """Make all steps that are left of the current attempt."""
        run, steps = self.run, self.run.recipe.steps
        began, first, saved = time.monotonic(), run.step, time.monotonic()
        with _ctrl_c_flag() as requested:
            while run.step < steps:
                run.advance()
                try:
                    self._notify((time.monotonic() - began) / (run.step - first) * (steps - run.step))
                    if requested.is_set():
                        raise KeyboardInterrupt
                except KeyboardInterrupt:
                    if self.state is not None:
                        run.save(self.state)
                    raise TrainingInterruptedError(run.step, steps, self.state) from None
                if self.state is not None and (time.monotonic() - saved >= self.save_every or run.step == steps):
                    run.save(self.state)
                    saved = time.monotonic()

    def _notify(self, seconds_left: float) -> None:
        if self.callback is None:
            return
        run = self.run
        rate = learning_rate(run.recipe, run.step - 1)
        last = run.history[-1] if run.history else None
        self.callback(TrainingProgress(run.attempt, run.step, run.recipe.steps, rate, seconds_left, last))


@contextmanager
def _ctrl_c_flag() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag: inside an optimiser step it would tear the state. A second one raises.

    Only in the main thread, and only where nobody else handles the signal.
    """
    requested = threading.Event()
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield requested
        return

    def handle(signum: int, frame: Any) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield requested
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _train_until_accepted(run: _Run, loop: _Loop) -> Diagnostics:
    """Train; where the recipe allows several attempts, until every example is a stable fixed point."""
    while True:
        loop.finish()
        run.model.load_state_dict(run.best)
        diagnostics = diagnose(run.model, run.data)
        accepted = diagnostics.max_error < ACCEPTED_ERROR and diagnostics.spectral_radius_max < 1
        if accepted or run.attempt + 1 >= run.recipe.attempts:
            return diagnostics
        run.begin(run.attempt + 1)
