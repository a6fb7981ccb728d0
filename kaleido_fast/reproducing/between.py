"""The latent space of a flow for people to see: samples of one seed on their way to those of the next."""

from __future__ import annotations

from kaleido_fast.reproducing.images import ShownModel
from kaleido_fast.reproducing.report import Report
from kaleido_fast.reproducing.settings import Settings
from kaleido_fast.showing.animation import strip
from kaleido_fast.showing.between import sample_between

CHAINS, FRAMES = 10, 13


def show_between(settings: Settings, report: Report, shown: ShownModel, slug: str) -> None:
    """Draws from starts between two seeds, a row a chain; nothing for a model that is not sampled as a flow."""
    if shown.sampler != "flow":
        return
    seeds = (settings.seed, (settings.seed + 1) % 2**64)
    moved = sample_between(
        shown.checkpoint, seeds=seeds, n_chains=CHAINS, n_frames=FRAMES, device=settings.device, **shown.sampling
    )
    report.picture(
        f"{slug}-between",
        strip(moved),
        f"One start, one sample: chains 0 to {CHAINS - 1} on their way from seed {seeds[0]} to seed {seeds[1]}. All "
        "are finished samples; above each column is how far starts have moved on the arc between the two",
    )
