"""Options as a caller passes them become a request: what was left out comes from the checkpoint, or is the default."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from kaleido_fast.errors import InputError
from kaleido_fast.planning.jitter import fit_to_noise
from kaleido_fast.planning.options import OPTIONS, OPTIONS_OF, RECOMMENDABLE
from kaleido_fast.planning.request import SampleRequest, foreign_option
from kaleido_fast.planning.spacing import default_thin, refuse_copies


def complete_request(options: Mapping[str, Any], recommended: Mapping[str, Any]) -> SampleRequest:
    """The request that a caller's options mean.

    Args:
        options: of `kaleido_fast.fast_sample`; None, or "recommended" for ``tol``, leaves one to the recommendation.
        recommended: as `kaleido_fast.planning.spacing.recommended_options` gives it.

    Raises:
        InputError: a value outside of its range, or options that do not go together.
    """
    explicit = {name: options[name] for name in RECOMMENDABLE if not _is_left_out(name, options)}
    sampler, recommended = choose_sampler(explicit, recommended)
    if sampler == "flow":
        return _flow_request(options, explicit, recommended)
    noise, n_draws = options.get("noise", "normal"), options.get("n_draws", 1)
    merged = fit_to_noise(merge_options(explicit, recommended), explicit, noise)
    merged = _without_tol_where_jittered(merged, explicit)
    if "thin" not in explicit:
        merged["thin"] = default_thin({**recommended, **merged}, n_draws, noise)
    given = {**{name: value for name, value in options.items() if name not in RECOMMENDABLE}, **merged}
    if given.get("seed", 0) is None:
        given["seed"] = secrets.randbits(64)
    request = SampleRequest(**given)
    refuse_copies(request.n_draws, request.thin, request.settle, request.jitter, request.noise)
    return request


def recommended_sampler(recommended: Mapping[str, Any]) -> str:
    """The sampler that a checkpoint's settings are for."""
    return str(recommended.get("sampler", OPTIONS["sampler"].default))


def choose_sampler(explicit: Mapping[str, Any], recommended: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The sampler of a run, and what is recommended for it: settings for another one do not hold.

    Raises:
        InputError: an option that the sampler does not have.
    """
    usual = recommended_sampler(recommended)
    sampler = explicit.get("sampler", usual)
    because = "" if "sampler" in explicit else f"the model recommends {usual!r}" if recommended else "the default"
    for other, names in OPTIONS_OF.items():
        for name in names:
            if other != sampler and name in explicit and not (sampler == "flow" and _is_idle(name, explicit)):
                raise foreign_option(name, explicit[name], sampler, because=because)
    if sampler != usual:
        return sampler, {}
    others = {name for other, names in OPTIONS_OF.items() if other != sampler for name in names}
    return sampler, {name: value for name, value in recommended.items() if name not in others}


def sampler_note(request: SampleRequest, recommended: Mapping[str, Any]) -> str:
    """One line where a checkpoint is sampled by another sampler than its card recommends, else empty."""
    usual = recommended_sampler(recommended)
    if request.sampler == usual:
        return ""
    settings = ", ".join(f"{name} {recommended[name]}" for name in RECOMMENDABLE if recommended.get(name) is not None)
    if usual == "flow":
        return f"sampler {request.sampler!r}: the model's card recommends {settings}, which it was trained for"
    recommends = f"recommends {settings} of sampler {usual!r}" if settings else "recommends no sampler"
    return (
        f"sampler {request.sampler!r}: the model's card {recommends}, and tells of no training for {request.sampler!r}"
    )


def _is_idle(name: str, explicit: Mapping[str, Any]) -> bool:
    """Whether an option of the kaleidoscope says what is so of a flow anyway."""
    return explicit[name] is None or (name in ("burn_in", "jitter", "settle") and explicit[name] == 0)


def _flow_request(
    options: Mapping[str, Any], explicit: Mapping[str, Any], recommended: Mapping[str, Any]
) -> SampleRequest:
    merged = merge_options(explicit, recommended)
    own = {name: merged[name] for name in OPTIONS_OF["flow"] if name in merged}
    others = {name: value for name, value in options.items() if name not in RECOMMENDABLE}
    if others.get("seed", 0) is None:
        others["seed"] = secrets.randbits(64)
    return SampleRequest(**{**others, **own, "sampler": "flow"})


def merge_options(explicit: Mapping[str, Any], recommended: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a request: the recommended ones of a checkpoint, over which every explicit one wins."""
    return {**{name: recommended[name] for name in RECOMMENDABLE if name in recommended}, **explicit}


def refuse_tol_with_jitter(tol: float | None, jitter: float) -> None:
    """Refuse a tolerance that was passed for jittered chains: `InputError`."""
    if tol is not None and jitter:
        raise InputError(
            f"tol {tol} with jitter {jitter}: a jittered chain never arrives, so none can be "
            "frozen; pass jitter=0, or leave tol out (trace shows how chains move)"
        )


def _is_left_out(name: str, options: Mapping[str, Any]) -> bool:
    """Whether the recommendation holds; None says so, except where it is a value of its own."""
    nothing = "recommended" if OPTIONS[name].or_none else None
    value = options.get(name, nothing)
    return value is nothing or (isinstance(value, str) and value == nothing)


def _without_tol_where_jittered(options: dict[str, Any], explicit: Mapping[str, Any]) -> dict[str, Any]:
    """A jittered chain never arrives: a default tolerance does not apply there, one that was passed is refused."""
    if not options.get("jitter"):
        return options
    refuse_tol_with_jitter(explicit.get("tol"), options["jitter"])
    return {**options, "tol": None}
