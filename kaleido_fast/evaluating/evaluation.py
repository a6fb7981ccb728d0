"""How good a model is: its samples against real examples, and how it acts at its training examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kaleido_fast.checkpoint import Checkpoint, Scaling
from kaleido_fast.errors import InputError
from kaleido_fast.evaluating.attractors import check_sigma, recovered
from kaleido_fast.evaluating.classifier import Trees
from kaleido_fast.evaluating.diagnostics import RADIUS_EXAMPLES, evenly, spectral_radii
from kaleido_fast.evaluating.quality import (
    InkRange,
    authentic_share,
    class_entropy,
    class_shares,
    copying_z,
    manifold_scores,
    nearest_example_mse,
    nearest_examples,
)
from kaleido_fast.evaluating.thinning import N_CHAINS as MIXED_CHAINS
from kaleido_fast.evaluating.thinning import N_DRAWS as MIXED_DRAWS
from kaleido_fast.model import KaleidoMLP, ModelSpec
from kaleido_fast.names import BACKGROUND
from kaleido_fast.planning.request import MAX_COUNT, SampleRequest
from kaleido_fast.reading.datasets import DOWNLOADED, NAMES, Dataset, built_in, load_dataset
from kaleido_fast.running.mixing import Mixing, measure_mixing, watched_chains
from kaleido_fast.running.result import SampleResult, outcome_shares, quantiles, residual_quantiles
from kaleido_fast.sampling import fast_sample
from kaleido_fast.scalars import whole_number
from kaleido_fast.showing.pictures import image_grid, is_image_shape
from kaleido_fast.storing.draws import Draws
from kaleido_fast.system.neutral import neutral
from kaleido_kernels.exact import exact_products

N_CHAINS = 1000
N_COMPARED = 500  # coverage depends on both numbers: fixed ones make data sets and models comparable
SIGMAS = (0.1, 0.3, 1.0)
LONG_BURN_IN = 299
MOST_UNSEEN = 10_000  # held-out examples whose distances to the training examples are found
WATCHED = 500  # training examples that recovery is measured on
SHEET_COLUMNS, SHEET_ROWS = 20, 6
_RUN_NAMES = ("n_chains", "burn_in", "n_draws", "thin", "seed", "init", "noise", "jitter", "settle", "tol", "precision")
_SPACING = ("thin", "jitter", "settle")
SAMPLES, SETTLED, REAL = "samples", "without jitter", "real data"


@dataclass(frozen=True)
class Reference:
    """Real examples that samples are compared with.

    Args:
        train: what the model was trained on; None if it is not at hand.
        held_out: examples that it has not seen; None if there are none.
        notes: what a reader of the figures should know.
    """

    train: Dataset | None
    held_out: Dataset | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SetScores:
    """Measures of one set of points (`kaleido_fast.evaluating.quality` and docs/quality.md have the definitions); None
    where the examples for one are missing.

    Args:
        n: points.
        precision, recall, density, coverage: against held-out examples.
        nearest: mean squared difference to the nearest training example, by quantile, in squared units of half the
            data range.
        copying_z: in standard deviations; below -3 copies.
        authentic: share that are no copies.
        blank, blob: shares with less or more ink than any training example.
        entropy: of the classes, of its maximum.
        class_shares: by label.
        confidence: mean share of the trees' votes for the class that is chosen.
    """

    n: int
    precision: float | None = None
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None
    nearest: dict[str, float] | None = None
    copying_z: float | None = None
    authentic: float | None = None
    blank: float | None = None
    blob: float | None = None
    entropy: float | None = None
    class_shares: dict[str, float] | None = None
    confidence: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Everything that `evaluate` finds.

    Args:
        sets: scores of the samples with the settings asked for, of chains without jitter to their end (where that is
            another run), and of real data: training examples in the place of samples as a ceiling, and the distances
            of held-out examples to training examples.
        runs: of each run the settings, the outcomes and the quantiles of residuals and steps.
        mixing: how independent draws of one chain are: of a run of its own with the settings of the samples, or of the
            draws given; None without jitter, which lets chains come to rest, or for less than 4 draws a chain.
        spacing: thin, jitter and settle of that run, as far as they are known.
        stable_share: share of training examples that are stable attractors.
        recovery: share of them recovered from noise, by its standard deviation in units of half the data range.
        spectral_radius_median: of the Jacobian at training examples.
        n_compared, compared_with, k: how many real examples of which kind, and neighbours, of the k-NN scores.
        notes: what a reader of the figures should know.
        samples: (n, D) of the first set; not part of `to_dict`.
    """

    sets: dict[str, SetScores]
    runs: dict[str, dict[str, Any]]
    mixing: Mixing | None
    spacing: dict[str, Any]
    stable_share: float | None
    recovery: dict[str, float]
    spectral_radius_median: float | None
    n_compared: int
    compared_with: str
    k: int
    notes: tuple[str, ...]
    samples: Tensor = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "sets": {name: asdict(scores) for name, scores in self.sets.items()},
            "runs": self.runs,
            "mixing": None if self.mixing is None else {**self.spacing, **self.mixing.to_dict()},
            "training_examples": {
                "stable_share": self.stable_share,
                "recovery": self.recovery,
                "spectral_radius_median": self.spectral_radius_median,
            },
            "n_compared": self.n_compared,
            "compared_with": self.compared_with,
            "k": self.k,
            "notes": list(self.notes),
        }


@neutral()
def find_reference(
    checkpoint: Checkpoint,
    source: Any = None,
    *,
    held_out: Any = None,
    labels: Any = None,
    value_range: tuple[float, float] | None = None,
    background: str = BACKGROUND,
    channels: str | None = None,
) -> Reference:
    """The examples that a model was trained on and those that it has not seen.

    From the card of the model: the examples that were left out by a limit or kept back while training are held out.

    Args:
        checkpoint: the model.
        source: its training data, whole: a `Dataset`, or what `load_dataset` takes; by default what its card names, if
            that needs no download.
        held_out: other examples to compare with, likewise.
        labels, value_range: as `load_dataset` takes them, for ``source``; the range also for ``held_out``, and for that
            alone where ``source`` is left out.
        background, channels: as `load_dataset` takes them, for both.

    Raises:
        InputError: no data at hand, data of another shape than the model's, or not those it was trained on.
    """
    card, spec, of_held_out = checkpoint.card, checkpoint.model.spec, value_range
    if source is None:
        value_range = None if held_out is not None else value_range
        named = card.dataset.get("name")
        source = built_in(named) if named in NAMES and named not in DOWNLOADED else None
        if source is None and held_out is None:
            known = f" ({named})" if named else ""
            raise InputError(f"the data{known} that {checkpoint.path} was trained on are not at hand: pass their path")
    read = partial(load_dataset, bound=spec.bound, background=background, channels=channels)
    train, kept, notes = None, None, []
    if source is None:
        notes.append("no training data at hand: distances to it and its basins are left out")
    else:
        data = source if isinstance(source, Dataset) else read(source, labels=labels, value_range=value_range)
        _check_shape(data, spec)
        again = None if data is source else partial(read, source, value_range=value_range)
        train, kept = _divide(data, again, checkpoint)
        if not card.dataset.get("sha256"):
            notes.append("the model does not say what it was trained on: all of the data count as training data")
    if held_out is not None:
        kept = held_out if isinstance(held_out, Dataset) else read(held_out, value_range=of_held_out)
        _check_shape(kept, spec)
    if kept is None:
        notes.append("no held-out examples: samples are compared with the training examples themselves")
    return Reference(train, kept, tuple(notes))


def _check_shape(data: Dataset, spec: ModelSpec) -> None:
    if data.dim != spec.dim or (is_image_shape(spec.sample_shape) and data.sample_shape != spec.sample_shape):
        raise InputError(
            f"data {data.name} has examples of shape {data.sample_shape}, the model samples of {spec.sample_shape}: "
            "give data of the model's shape"
        )


def _divide(
    data: Dataset, again: Callable[..., Dataset] | None, checkpoint: Checkpoint
) -> tuple[Dataset, Dataset | None]:
    """Training examples, and those not seen: left out by a limit, or kept back while training.

    ``again`` reads the data with a ``limit``, where they were read.
    """
    card = checkpoint.card
    used, rest = data, None
    n, digest = card.dataset.get("n_examples", len(data)), card.dataset.get("sha256") or data.sha256
    if data.sha256 != digest and n < len(data) and again is not None:
        used = again(limit=n)
        seen = torch.zeros(len(data), dtype=torch.bool)
        seen[torch.arange(n) * len(data) // n] = True
        rest = data.take((~seen).nonzero()[:, 0])
        used = replace(used, labels=None if data.labels is None else data.labels[seen])
    if used.sha256 != digest:
        raise InputError(
            f"data {data.name} are not what {checkpoint.path} was trained on ({card.dataset.get('name')}, {n:,} "
            "examples): give those, read as they were then (value_range, background, channels), or pass these as "
            "held-out examples"
        )
    train, kept = used.split(int(card.recipe.get("held_out", 0)))
    return train, _joined(kept, rest)


def _joined(first: Dataset | None, second: Dataset | None) -> Dataset | None:
    if first is None or second is None:
        return first or second
    labels = None
    if first.labels is not None and second.labels is not None:
        labels = torch.cat((first.labels, second.labels))
    return replace(first, data=torch.cat((first.data, second.data)), labels=labels, sha256="")


@neutral()
@exact_products(torch.device("cpu"))
def evaluate(
    checkpoint: Checkpoint,
    reference: Reference,
    *,
    n_chains: int = N_CHAINS,
    n_compared: int = N_COMPARED,
    k: int = 5,
    seed: int = 0,
    sigmas: Sequence[float] = SIGMAS,
    classes: bool | None = None,
    sampling: Mapping[str, Any] | None = None,
    draws: Draws | None = None,
    engine: str = "auto",
    device: str = "auto",
    tell: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Sample a model and measure it, or measure draws of it that are there.

    Args:
        checkpoint: the model.
        reference: from `find_reference`.
        n_chains: samples.
        n_compared: held-out examples that the k-NN scores compare with, at most; evenly spaced ones of more.
        k: neighbours of precision, recall, density and coverage.
        seed: of the samples, of the noise at training examples, and of the classifier.
        sigmas: noise from which training examples are to be recovered, in units of half the data range.
        classes: whether classes are told; None does so where there are labels and scikit-learn.
        sampling: options of `fast_sample` that replace the recommended ones.
        draws: of `open_draws`: the last draw of each of their first ``n_chains`` chains takes the place of samples.
        engine, device: as for `fast_sample`.
        tell: called with one line on what happens now.

    Raises:
        InputError: fewer examples or samples than k, no labels where classes are asked for, samples with NaN, or
            draws of another model.
    """
    n_chains = whole_number("n_chains", n_chains, 1, MAX_COUNT)
    n_compared = whole_number("n_compared", n_compared, 1, MAX_COUNT)
    k, seed = whole_number("k", k, 0, MAX_COUNT), whole_number("seed", seed, 0, 2**64 - 1)
    sigmas = tuple(check_sigma(sigma) for sigma in sigmas)
    if draws is not None:
        check_draws(draws, checkpoint)
        n_chains = min(n_chains, len(draws))
    tell("preparing the real examples")
    scorer = Scorer.of(reference, checkpoint.model.spec, n_compared, k, seed, classes)
    if not 1 <= k < min(len(scorer.compared), n_chains):
        raise InputError(
            f"k = {k} neighbours among {len(scorer.compared)} examples and {n_chains} samples: "
            "k (--k) must be at least 1 and below both"
        )
    where = {"engine": engine, "device": device}
    if draws is None:
        options = {**(sampling or {}), **where}
        points, facts, mixing, spacing = _sampled(checkpoint, n_chains, seed, options, tell)
    else:
        points, facts, mixing, spacing = _drawn(draws, n_chains)
    sets = {}
    for name, states in points.items():
        _check_finite(states)
        tell(f"measuring {name}")
        sets[name] = scorer.score(states)
    if scorer.train is not None and scorer.unseen is not None:
        tell("measuring real data")
        sets[REAL] = scorer.real(n_chains)
    stable, recovery, radius = None, {}, None
    if scorer.train is not None:
        tell("recovering training examples from noise")
        shares = _recovered_shares(checkpoint.model, scorer.train, (0.0, *sigmas), seed, where)
        stable, recovery = shares[0.0], {f"{sigma:g}": share for sigma, share in shares.items() if sigma > 0}
        radius = float(spectral_radii(checkpoint.model, evenly(scorer.train, RADIUS_EXAMPLES)).median())
    return Evaluation(
        sets,
        facts,
        mixing,
        spacing,
        stable,
        recovery,
        radius,
        n_compared=len(scorer.compared),
        compared_with="training examples" if scorer.unseen is None else "held-out examples",
        k=k,
        notes=(*reference.notes, *scorer.notes),
        samples=points[SAMPLES],
    )


Measured = tuple[dict[str, Tensor], dict[str, dict[str, Any]], Mixing | None, dict[str, Any]]
"""States (n_chains, D) by name, figures of their runs, how independent draws of a chain are, and how far apart."""


def _sampled(
    checkpoint: Checkpoint, n_chains: int, seed: int, options: dict[str, Any], tell: Callable[[str], None]
) -> Measured:
    tell(f"sampling {n_chains:,} chains")
    runs = _sample(checkpoint, n_chains, seed, options)
    mixing, spacing = _mixing(checkpoint, runs[SAMPLES].request, options, tell)
    points = {name: result.final.cpu().float() for name, result in runs.items()}
    return points, {name: _run_facts(result) for name, result in runs.items()}, mixing, spacing


def _drawn(draws: Draws, n_chains: int) -> Measured:
    facts = {SAMPLES: _draws_facts(draws, n_chains)}
    mixing = measure_mixing(draws[: watched_chains(draws.shape[1])].float())
    spacing = {name: facts[SAMPLES][name] for name in _SPACING if name in facts[SAMPLES]}
    return {SAMPLES: draws[:n_chains][:, -1].float()}, facts, mixing, spacing


def _recovered_shares(
    model: KaleidoMLP, train: Tensor, sigmas: Sequence[float], seed: int, where: Mapping[str, str]
) -> dict[float, float]:
    """Share of training examples that chains come back to, from noise of each strength."""
    watched = evenly(train, WATCHED)
    back = {sigma: recovered(model, watched, sigma, seed=seed, **where) for sigma in sigmas}
    return {sigma: float(which.double().mean()) for sigma, which in back.items()}


def also_sampled(
    evaluation: Evaluation,
    checkpoint: Checkpoint,
    reference: Reference,
    name: str,
    *,
    n_chains: int = N_CHAINS,
    n_compared: int = N_COMPARED,
    seed: int = 0,
    **options: Any,
) -> Evaluation:
    """An evaluation with one more set, placed after the first: chains of the same model, sampled with ``options`` of
    `fast_sample` and measured against the same examples.

    Raises:
        InputError: as `evaluate`.
    """
    scorer = Scorer.of(reference, checkpoint.model.spec, n_compared, evaluation.k, seed, None)
    result = fast_sample(checkpoint.path, n_chains=n_chains, seed=seed, **options)
    states = result.final.cpu().float()
    _check_finite(states)
    sets, runs = {SAMPLES: evaluation.sets[SAMPLES]}, {SAMPLES: evaluation.runs[SAMPLES]}
    sets[name], runs[name] = scorer.score(states), _run_facts(result)
    return replace(evaluation, sets={**sets, **_but(evaluation.sets)}, runs={**runs, **_but(evaluation.runs)})


def _but(sets: dict[str, Any]) -> dict[str, Any]:
    """All but the samples."""
    return {name: value for name, value in sets.items() if name != SAMPLES}


def _sample(checkpoint: Checkpoint, n_chains: int, seed: int, options: dict[str, Any]) -> dict[str, SampleResult]:
    """The run asked for and, if that has jitter or is short, one without jitter to the end."""
    runs = {SAMPLES: fast_sample(checkpoint.path, n_chains=n_chains, seed=seed, **options)}
    request = runs[SAMPLES].request
    if request.jitter > 0 or (request.burn_in < LONG_BURN_IN and bool((runs[SAMPLES].outcome != 0).any())):
        where = {name: options[name] for name in ("engine", "device")}
        runs[SETTLED] = fast_sample(
            checkpoint.path, n_chains=n_chains, seed=seed, burn_in=LONG_BURN_IN, jitter=0.0, tol=1e-4, **where
        )
    return runs


def _mixing(
    checkpoint: Checkpoint, request: SampleRequest, options: dict[str, Any], tell: Callable[[str], None]
) -> tuple[Mixing | None, dict[str, Any]]:
    """How independent draws of a chain are with the settings of a run, and how they were spaced; nothing of chains
    without jitter."""
    if request.jitter == 0:
        return None, {}
    tell(f"sampling {MIXED_DRAWS} draws of {MIXED_CHAINS} chains")
    run = fast_sample(checkpoint.path, n_chains=MIXED_CHAINS, n_draws=MIXED_DRAWS, seed=request.seed, **options)
    return run.stats.mixing, {name: getattr(run.request, name) for name in _SPACING}


def check_draws(draws: Draws, checkpoint: Checkpoint) -> None:
    """Refuse draws that are not of a model: `InputError`. Draws without a record are taken at their word."""
    dim, hashed = checkpoint.model.spec.dim, draws.record.get("model_hash")
    if draws.shape[2] != dim:
        raise InputError(f"{draws.path} holds draws of {draws.shape[2]} values, {checkpoint.path} makes {dim}")
    if hashed and hashed != checkpoint.model_hash:
        raise InputError(
            f"{draws.path} was drawn from another model (hash {hashed[:12]}) than {checkpoint.path} "
            f"({checkpoint.model_hash[:12]}): give the one that it was drawn from"
        )


def _draws_facts(draws: Draws, n_chains: int) -> dict[str, Any]:
    """What is known of the run that made the draws; outcomes and residuals of stores alone."""
    request = draws.record.get("request", {})
    facts = {name: request[name] for name in _RUN_NAMES if name in request}
    facts |= {"n_chains": n_chains, "file": str(draws.path)}
    if draws.output is None:
        return facts
    residual, steps, outcome = (
        torch.from_numpy(draws.per_chain(name, slice(n_chains))) for name in ("residual", "steps", "outcome")
    )
    return facts | {
        "engine": draws.record["engine"],
        "outcome_shares": outcome_shares(outcome),
        "residual_quantiles": residual_quantiles(residual),
        "steps_quantiles": quantiles(steps.to(torch.float32)),
    }


def _check_finite(samples: Tensor) -> None:
    bad = int((~torch.isfinite(samples)).any(dim=1).sum())
    if bad:
        raise InputError(
            f"{bad:,} of {len(samples):,} samples hold NaN or infinite values, which cannot be measured: "
            "look for huge weights in the model, or train it again"
        )


def _run_facts(result: SampleResult) -> dict[str, Any]:
    return {
        **{name: getattr(result.request, name) for name in _RUN_NAMES},
        "engine": result.stats.engine,
        "outcome_shares": result.stats.outcome_shares,
        "residual_quantiles": result.stats.residual_quantiles,
        "steps_quantiles": result.stats.steps_quantiles,
    }


@dataclass(frozen=True)
class Scorer:
    """Real examples, prepared once for scoring any number of sets of points; `of` makes one."""

    train: Tensor | None
    unseen: Tensor | None
    compared: Tensor
    k: int
    half: float
    unseen_mse: Tensor | None
    ink: InkRange | None
    trees: Trees | None
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls, reference: Reference, spec: ModelSpec, n_compared: int, k: int, seed: int, classes: bool | None
    ) -> Scorer:
        """Prepare the examples; arguments and errors are those of `evaluate`."""
        train = None if reference.train is None else reference.train.data
        unseen = None if reference.held_out is None else evenly(reference.held_out.data, MOST_UNSEEN)
        both = unseen if unseen is not None else train
        assert both is not None
        compared = evenly(both, n_compared)
        trees, notes = _grow(reference.held_out or reference.train, classes, seed)
        inked = is_image_shape(spec.sample_shape) and train is not None
        return cls(
            train,
            unseen,
            compared,
            k,
            (spec.high - spec.low) / 2,
            None if train is None or unseen is None else nearest_example_mse(unseen, train),
            InkRange.of(train) if inked and train is not None else None,
            trees,
            notes,
        )

    def score(self, points: Tensor) -> SetScores:
        """Measures of samples (n, D)."""
        scores = SetScores(len(points), **asdict(manifold_scores(self.compared, points, k=self.k)))
        scores = replace(scores, **self._looks(points))
        if self.train is None:
            return scores
        mse = nearest_example_mse(points, self.train)
        return replace(
            scores,
            nearest=quantiles(mse / self.half**2),
            copying_z=None if self.unseen_mse is None else copying_z(mse, self.unseen_mse),
            authentic=authentic_share(points, self.train) if len(self.train) > 1 else None,
        )

    def real(self, n: int) -> SetScores:
        """``n`` training examples, at most, in the place of samples; distances are those of held-out examples."""
        assert self.train is not None and self.unseen is not None and self.unseen_mse is not None
        points = evenly(self.train, n)
        scores = SetScores(len(points))
        if self.k < len(points):
            scores = SetScores(len(points), **asdict(manifold_scores(self.compared, points, k=self.k)))
        return replace(
            scores,
            nearest=quantiles(self.unseen_mse / self.half**2),
            authentic=authentic_share(self.unseen, self.train) if len(self.train) > 1 else None,
            **self._looks(points),
        )

    def _looks(self, points: Tensor) -> dict[str, Any]:
        """Ink and classes."""
        looks: dict[str, Any] = {}
        if self.ink is not None:
            looks["blank"], looks["blob"] = self.ink.outside(points)
        if self.trees is not None:
            places, sure = self.trees.predict(points)
            shares = class_shares(places, len(self.trees.classes))
            looks["entropy"] = class_entropy(shares)
            looks["class_shares"] = dict(zip(map(str, self.trees.classes), shares.tolist(), strict=True))
            looks["confidence"] = float(sure.mean())
        return looks


def _grow(data: Dataset | None, classes: bool | None, seed: int) -> tuple[Trees | None, tuple[str, ...]]:
    """A classifier, or None with a note on why there is none; what was asked for and cannot be is refused."""
    if classes is False or data is None:
        return None, ()
    if data.labels is None:
        text = f"data {data.name} have no labels: no classes can be told"
        if classes:
            raise InputError(f"{text}; give a file of labels")
        return None, (text,)
    try:
        return Trees(data.data, data.labels, seed=seed), ()
    except InputError as problem:
        if classes:
            raise
        return None, (f"no classes: {problem}",)


def check_sheet(spec: ModelSpec) -> None:
    """Refuse a sheet of samples that are not pictures: `InputError`."""
    if not is_image_shape(spec.sample_shape):
        raise InputError(
            f"samples of shape {spec.sample_shape} are not pictures, so there is no sheet of them: leave it out; "
            "kaleido-fast show plots samples of 1 or 2 values"
        )


def look_sheet(samples: Tensor, train: Tensor | None, spec: ModelSpec, scaling: Scaling) -> Image.Image:
    """Samples (n, D), and below each row of them the nearest training examples (m, D); without those, samples alone.

    Raises:
        InputError: a model whose samples are not pictures.
    """
    check_sheet(spec)
    columns = min(SHEET_COLUMNS, len(samples))
    rows = min(SHEET_ROWS, len(samples) // columns)
    shown = samples[: rows * columns]
    if train is not None:
        beside = train[nearest_examples(shown, train)[0]]
        pairs = (shown.unflatten(0, (rows, columns)), beside.unflatten(0, (rows, columns)))
        shown = torch.stack(pairs, dim=1).flatten(0, 2)
    return image_grid(shown, spec, scaling, columns=columns)
