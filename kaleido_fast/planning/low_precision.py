"""A run in fp32 as it would be in 16 bits, in flags and in words: what a person is told who may want it faster."""

from __future__ import annotations

from dataclasses import replace

from kaleido_fast.planning.request import SampleRequest

MOST_POLISH = 50
"""Steps in fp32 that are enough for a chain to come to rest: most arrive in 10 to 60."""
POLISH_SHARE = 4
"""One step of so many before the first draw is polish at most, so that short runs gain as well."""
CLEARLY_FASTER = 1.3
"""Below this an estimate may be wrong by more than it promises."""


def low_request(request: SampleRequest, precision: str) -> SampleRequest | None:
    """The same run in 16 bits, with polish where the sampler has it; None for one not in fp32, or too short."""
    if request.precision != "fp32":
        return None
    if request.sampler == "flow":  # a draw does not depend on a state that could come to rest
        return replace(request, precision=precision)
    polish = min(MOST_POLISH, (request.burn_in + request.thin) // POLISH_SHARE)
    return replace(request, precision=precision, polish=polish) if polish else None


def low_words(request: SampleRequest, seconds: float) -> str:
    """The estimate of a run in 16 bits, the flags that ask for it, and what changes."""
    time = f"about {seconds:,.0f} s" if seconds >= 10 else f"about {seconds:.2g} s"
    if not request.polish:
        return f"{time}, estimated, by --precision {request.precision}: draws then differ from those in fp32"
    polish = request.polish
    steps = "the last step" if polish == 1 else f"the last {polish} steps"
    return (
        f"{time}, estimated, by --precision {request.precision} --polish {polish} ({steps} before the first draw, and "
        "all after it, in fp32): chains then differ from those in fp32"
    )
