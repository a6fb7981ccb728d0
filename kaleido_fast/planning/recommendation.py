"""What a checkpoint may recommend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kaleido_fast.errors import unknown_name
from kaleido_fast.planning.merging import complete_request, recommended_sampler
from kaleido_fast.planning.options import OPTIONS
from kaleido_fast.planning.request import foreign_option


def check_sampling(sampling: Mapping[str, Any]) -> None:
    """Refuse settings that no run could follow.

    Args:
        sampling: options of a run by name.

    Raises:
        InputError: an unknown name, an option of another sampler than theirs, or a value outside of its range.
    """
    sampler = recommended_sampler(sampling)
    for name, value in sampling.items():
        if name not in OPTIONS:
            raise unknown_name("recommended option", name, OPTIONS)
        if OPTIONS[name].sampler not in ("", sampler):
            raise foreign_option(name, value, sampler, because="as the settings to recommend say")
    complete_request({"n_chains": 1}, sampling)
