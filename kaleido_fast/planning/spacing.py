"""How many steps lie between the draws of a chain: the default, and what is refused.

Jittered chains move only by their jittered steps: ``thin - settle`` of them lie between two draws. With none the next
draw is the last one run a little further, a near-copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from kaleido_fast.errors import InputError
from kaleido_fast.names import DEFAULT_JITTER, DEFAULT_JITTERED_STEPS, DEFAULT_SETTLE, DEFAULT_THIN
from kaleido_fast.scalars import plain_number

JITTERED_STEPS = "jittered_steps"  # of a recommendation: measured, between two draws


def recommended_options(sampling: Mapping[str, Any], diagnostics: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint recommends, as `default_thin` takes it.

    A measured ``thin`` is the distance of draws: the one draw of a chain that keeps no other does not wait for it.

    Args:
        sampling, diagnostics: of a `kaleido_fast.ModelCard`.
    """
    options = dict(sampling)
    if "mixing" in diagnostics and "thin" in options:
        options[JITTERED_STEPS] = options.pop("thin") - options.get("settle", DEFAULT_SETTLE)
    return options


def default_thin(options: Mapping[str, Any], n_draws: int, noise: str) -> int:
    """Steps per draw where ``thin`` was not passed.

    Several draws of a jittered chain lie as many jittered steps apart as were measured to mix, whatever ``settle`` is;
    where none were measured, `DEFAULT_JITTERED_STEPS`, unless the model recommends a ``thin`` above ``settle``.

    Args:
        options: ``jitter``, ``settle``, ``thin`` and `JITTERED_STEPS`, of those that are known.
        n_draws: draws kept per chain.
        noise: kind of jitter; "upstream" knows no clean steps.
    """
    thin, settle = options.get("thin", DEFAULT_THIN), plain_number(options.get("settle", DEFAULT_SETTLE))
    jitter, n_draws = plain_number(options.get("jitter", DEFAULT_JITTER)), plain_number(n_draws)
    numbers = isinstance(settle, Integral) and isinstance(n_draws, Integral) and isinstance(jitter, Real)
    if not numbers or not are_jittered(n_draws, jitter, noise):  # the request itself refuses what is no number
        return thin
    if JITTERED_STEPS in options:
        return settle + options[JITTERED_STEPS]
    return thin if thin > settle else settle + DEFAULT_JITTERED_STEPS


def are_jittered(n_draws: int, jitter: float, noise: str) -> bool:
    """Whether there are several draws a chain that jitter with clean steps is to take apart."""
    return n_draws > 1 and jitter > 0 and noise != "upstream"


def refuse_copies(n_draws: int, thin: int, settle: int, jitter: float, noise: str) -> None:
    """Refuse several draws of a jittered chain without any jittered step between them: `InputError`."""
    if not are_jittered(n_draws, jitter, noise) or thin > settle:
        return
    raise InputError(
        f"jitter {jitter:g} with thin {thin} and settle {settle}: the settle steps before each draw have none, which "
        f"leaves max(0, {thin} - {settle}) = 0 jittered steps between two draws of a chain, and its {n_draws:,} draws "
        f"would be near-copies; pass thin={settle + 1} or more (left out, it is as many as mix), or "
        f"settle={thin - 1}{' or less' if thin > 1 else ''}; or take one draw of more chains"
    )
