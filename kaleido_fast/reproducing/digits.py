"""The 8 x 8 digits: the bundled model, without training."""

from __future__ import annotations

from kaleido_fast.checkpoint import bundled_path, load_checkpoint
from kaleido_fast.evaluating.reference import find_reference
from kaleido_fast.reproducing.between import show_between
from kaleido_fast.reproducing.flows import show_any
from kaleido_fast.reproducing.images import (
    ShownModel,
    measure,
    sample_sheets,
    score_table,
)
from kaleido_fast.reproducing.report import Report
from kaleido_fast.reproducing.settings import Settings
from kaleido_fast.showing.animation import strip
from kaleido_fast.showing.states import sample_shown

BANNER_CHAINS = 8
BANNER_STEPS = (0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 20)


def run(settings: Settings, report: Report) -> None:
    """Sample the bundled model and write the report; see `kaleido_fast.reproducing.reproduction.reproduce`."""
    checkpoint = load_checkpoint(bundled_path("digits"))
    reference = find_reference(checkpoint, "digits")
    assert reference.train is not None and reference.held_out is not None
    shown = ShownModel("Bundled model", checkpoint, reference.train)
    card = checkpoint.card
    noise = "all strengths" if card.recipe.get("kind") == "flow" else f"{card.recipe['noise']:g}"
    report.text(
        f"The model that comes with the package, {'-'.join(map(str, checkpoint.model.spec.widths))} with a tanh, "
        f"trained on {len(reference.train):,} digits with noise of {noise}; {len(reference.held_out)} digits were held "
        "out."
    )
    banner = sample_shown(
        checkpoint, n_chains=BANNER_CHAINS, steps=BANNER_STEPS, seed=settings.seed, device=settings.device
    )
    report.picture("noise-to-digits", strip(banner), "Eight chains from noise to digits; the step above each column")
    report.heading("Measured")
    found = measure(settings, shown, reference.held_out)
    score_table(report, [(shown, found)])
    show_any(settings, report, shown, reference.held_out, "digits")
    sample_sheets(report, shown, found, "digits")
    show_between(settings, report, shown, "digits")
    report.record(evaluation=found.to_dict(), model_hash=checkpoint.model_hash, seed=settings.seed)
