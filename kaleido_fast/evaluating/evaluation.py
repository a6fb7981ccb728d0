"""How good a model is: its samples against real examples, and how it acts at its training examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kaleido_fast.checkpoint import Checkpoint
from kaleido_fast.errors import InputError
from kaleido_fast.evaluating.attractors import check_sigma, recovered
from kaleido_fast.evaluating.diagnostics import RADIUS_EXAMPLES, evenly, spectral_radii
from kaleido_fast.evaluating.reference import Reference
from kaleido_fast.evaluating.scorer import Scorer, SetScores
from kaleido_fast.evaluating.thinning import N_CHAINS as MIXED_CHAINS
from kaleido_fast.evaluating.thinning import N_DRAWS as MIXED_DRAWS
from kaleido_fast.model import KaleidoMLP, model_hash
from kaleido_fast.planning.merging import recommended_sampler
from kaleido_fast.planning.options import MAX_COUNT, OPTIONS_OF
from kaleido_fast.planning.request import SampleRequest
from kaleido_fast.running.mixing import Mixing, measure_mixing, watched_chains
from kaleido_fast.running.result import SampleResult, outcome_shares, quantiles, residual_quantiles
from kaleido_fast.sampling import fast_sample
from kaleido_fast.scalars import whole_number
from kaleido_fast.storing.draws import Draws
from kaleido_fast.system.neutral import neutral
from kaleido_kernels.exact import exact_products

N_CHAINS = 1000
N_COMPARED = 500  # coverage depends on both numbers: fixed ones make data sets and models comparable
SIGMAS = (0.1, 0.3, 1.0)
LONG_BURN_IN = 299
WATCHED = 500  # training examples that recovery is measured on
_RUN_NAMES: tuple[str, ...] = ("n_chains", "sampler", "burn_in", "n_draws", "thin", "seed", "init", "noise", "jitter")
_RUN_NAMES += ("settle", "steps", "noise_from", "noise_to", "tol", "precision")
_SPACING = ("thin", "jitter", "settle")
FLOW_NOTE = "a flow is not judged by stable examples or by where chains end: its draws start anew from noise"
SAMPLES, WITHOUT_JITTER, REAL = "samples", "without jitter", "real data"


@dataclass(frozen=True)
class Evaluation:
    """Everything that `evaluate` finds.

    Args:
        sets: scores of the samples with the settings asked for, of chains without jitter to their end (where that is
            another run, and not of a flow), and of real data: training examples in the place of samples as a ceiling,
            and the distances of held-out examples to training examples.
        runs: of each run the settings, the outcomes and the quantiles of residuals and steps.
        mixing: how independent draws of one chain are: of a run of its own with the settings of the samples, or of the
            draws given; None without jitter, which lets chains come to rest, of a flow, whose draws start anew, or for
            less than 4 draws a chain.
        spacing: thin, jitter and settle of that run, as far as they are known.
        stable_share: share of training examples that are stable attractors.
        recovery: share of them recovered from noise, by its standard deviation in units of half the data range.
        spectral_radius_median: of the Jacobian at training examples.
        frechet: what the Fréchet distance is measured with; None if it is left out.
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
    frechet: dict[str, Any] | None
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
            "frechet": self.frechet,
            "n_compared": self.n_compared,
            "compared_with": self.compared_with,
            "k": self.k,
            "notes": list(self.notes),
        }


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
    """Sample a model and measure it, or measure draws that were made before.

    Args:
        checkpoint: the model.
        reference: from `find_reference`.
        n_chains: samples.
        n_compared: held-out examples that the k-NN scores compare with, at most; evenly spaced ones of more.
        k: neighbours of precision, recall, density and coverage.
        seed: of the samples, of the noise at training examples, and of the classifier.
        sigmas: noise from which training examples are to be recovered, in units of half the data range.
        classes: whether to find the classes of samples; None does if there are labels and scikit-learn.
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
    is_flow = facts[SAMPLES].get("sampler", recommended_sampler(checkpoint.card.sampling)) == "flow"
    if scorer.train is not None and not is_flow:
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
        None if scorer.distance is None else scorer.distance.facts(),
        n_compared=len(scorer.compared),
        compared_with="training examples" if scorer.unseen is None else "held-out examples",
        k=k,
        notes=(*reference.notes, *scorer.notes, *((FLOW_NOTE,) if is_flow else ())),
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
    of_flow = facts[SAMPLES].get("sampler") == "flow"
    mixing = None if of_flow else measure_mixing(draws[: watched_chains(draws.shape[1])].float())
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
    result = fast_sample(checkpoint, n_chains=n_chains, seed=seed, **options)
    states = result.final.cpu().float()
    _check_finite(states)
    sets, runs = {SAMPLES: evaluation.sets[SAMPLES]}, {SAMPLES: evaluation.runs[SAMPLES]}
    sets[name], runs[name] = scorer.score(states), _run_facts(result)
    return replace(evaluation, sets={**sets, **_but(evaluation.sets)}, runs={**runs, **_but(evaluation.runs)})


def _but(sets: dict[str, Any]) -> dict[str, Any]:
    """All but the samples."""
    return {name: value for name, value in sets.items() if name != SAMPLES}


def _sample(checkpoint: Checkpoint, n_chains: int, seed: int, options: dict[str, Any]) -> dict[str, SampleResult]:
    """The run asked for and, if that has jitter or is short, one without jitter to the end; a flow has no such end."""
    runs = {SAMPLES: fast_sample(checkpoint, n_chains=n_chains, seed=seed, **options)}
    request = runs[SAMPLES].request
    if request.sampler == "flow":
        return runs
    if request.jitter > 0 or (request.burn_in < LONG_BURN_IN and bool((runs[SAMPLES].outcome != 0).any())):
        where = {name: options[name] for name in ("engine", "device")}
        runs[WITHOUT_JITTER] = fast_sample(
            checkpoint,
            n_chains=n_chains,
            seed=seed,
            sampler=request.sampler,
            burn_in=LONG_BURN_IN,
            jitter=0.0,
            tol=1e-4,
            **where,
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
    run = fast_sample(checkpoint, n_chains=MIXED_CHAINS, n_draws=MIXED_DRAWS, seed=request.seed, **options)
    return run.stats.mixing, {name: getattr(run.request, name) for name in _SPACING}


def check_draws(draws: Draws, checkpoint: Checkpoint) -> None:
    """Refuse draws that are not of a model: `InputError`. Draws without a record are not checked."""
    dim, hashed = checkpoint.model.spec.dim, draws.record.get("model_hash")
    if draws.shape[2] != dim:
        raise InputError(f"{draws.path} holds draws of {draws.shape[2]} values, {checkpoint.path} makes {dim}")
    own = model_hash(checkpoint.model)
    if hashed and hashed != own:
        raise InputError(
            f"{draws.path} was drawn from another model (hash {hashed[:12]}) than {checkpoint.path} "
            f"({own[:12]}): give the one that it was drawn from"
        )


def _draws_facts(draws: Draws, n_chains: int) -> dict[str, Any]:
    """What is known of the run that made the draws; outcomes and residuals of stores alone."""
    request = draws.record.get("request", {})
    facts = _settings_of(request)
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


def _settings_of(request: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a run, as far as they are known and its sampler has them."""
    others = [names for sampler, names in OPTIONS_OF.items() if sampler != request.get("sampler", "kaleidoscope")]
    foreign = {name for names in others for name in names}
    return {name: request[name] for name in _RUN_NAMES if name in request and name not in foreign}


def _run_facts(result: SampleResult) -> dict[str, Any]:
    return {
        **_settings_of(result.request.as_dict()),
        "engine": result.stats.engine,
        "outcome_shares": result.stats.outcome_shares,
        "residual_quantiles": result.stats.residual_quantiles,
        "steps_quantiles": result.stats.steps_quantiles,
    }
