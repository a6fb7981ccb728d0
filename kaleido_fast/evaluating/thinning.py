"""How many steps take two draws of a jittered chain apart: measured on a trained network, for its card.

``python -m kaleido_fast.evaluating.thinning FILE`` measures a checkpoint, and ``--write`` puts the answer on its card.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kaleido_fast.checkpoint import ModelCard, load_checkpoint, save_checkpoint
from kaleido_fast.errors import InputError
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.names import DEFAULT_BURN_IN, DEFAULT_SETTLE, MIXED_R_HAT, MIXED_SHARE
from kaleido_fast.planning.merging import recommended_sampler
from kaleido_fast.running.mixing import Mixing
from kaleido_fast.sampling import fast_sample

N_CHAINS, N_DRAWS = 32, 64  # 64 chains of 32 cost the same, and call a fifth too many draws effective, not a tenth
TRIED = (4, 8, 16, 32, 64, 128)  # jittered steps between draws; then three quarters of the first that mix
_OPTIONS = ("burn_in", "jitter", "settle")


@dataclass(frozen=True)
class Thinning:
    """What was measured of a network with its recommended jitter.

    Args:
        thin: the fewest steps per draw, of those tried, that let draws of a chain pass for independent; where none
            did, the most.
        settle, jitter: what it goes with.
        mixing: R-hat and effective sizes with it.
        tried: share of effective draws by steps per draw.
    """

    thin: int
    settle: int
    jitter: float
    mixing: Mixing | None
    tried: dict[int, float]

    @property
    def mixes(self) -> bool:
        """Whether draws that far apart pass for independent (`Mixing.mixes`)."""
        return self.mixing is not None and self.mixing.mixes

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a model card."""
        facts = {} if self.mixing is None else self.mixing.to_dict()
        tried = {str(thin): share for thin, share in self.tried.items()}
        where = {"thin": self.thin, "settle": self.settle, "jitter": self.jitter}
        return {"mixes": self.mixes, **where, **facts, "tried": tried}


def thin_problem(facts: Mapping[str, Any] | None) -> str | None:
    """One line where no distance that was tried mixes; None where one does, or nothing was measured.

    Args:
        facts: of `Thinning.to_dict`.
    """
    if facts is None or facts["mixes"]:
        return None
    found = "draws do not differ"
    if facts.get("ess_share") is not None:
        r_hat = "infinite" if facts["r_hat"] is None else f"{facts['r_hat']:.3g}"
        found = f"R-hat {r_hat} and {facts['ess_share']:.0%} of the draws effective"
    return (
        f"draws of one chain do not become independent within {facts['thin']} steps at jitter {facts['jitter']:g} "
        f"({found}; {MIXED_R_HAT} and {MIXED_SHARE:.0%} are asked for): take one draw of more chains"
    )


def measure_thin(model: KaleidoMLP, sampling: Mapping[str, Any], device: torch.device | str = "cpu") -> Thinning | None:
    """Find the fewest steps between draws of a chain that mix, with the settings recommended for a network.

    32 chains of 64 draws are run at ever larger distances, up to 128 jittered steps: at most 750,000 chain-steps for a
    network that needs all of them.

    Args:
        model: trained, in eval mode.
        sampling: recommended ``burn_in``, ``jitter`` and ``settle``.
        device: runs the chains.

    Returns:
        What was found; None for settings without jitter, whose chains come to rest.
    """
    if not sampling.get("jitter"):
        return None
    options = {name: sampling[name] for name in _OPTIONS if name in sampling}
    options.setdefault("burn_in", DEFAULT_BURN_IN)
    settle, tried = int(options.setdefault("settle", DEFAULT_SETTLE)), {}

    def try_out(jittered: int) -> Thinning:
        thin = settle + jittered
        run = fast_sample(model, n_chains=N_CHAINS, n_draws=N_DRAWS, thin=thin, seed=0, device=device, **options)
        mixing = run.stats.mixing
        tried[thin] = 0.0 if mixing is None or mixing.ess_share is None else mixing.ess_share
        return Thinning(thin, settle, float(options["jitter"]), mixing, tried)

    found = try_out(TRIED[0])
    for jittered in TRIED[1:]:
        if found.mixes:
            break
        found = try_out(jittered)
    if found.mixes and found.thin > settle + TRIED[0]:
        fewer = try_out((found.thin - settle) * 3 // 4)
        return fewer if fewer.mixes else found
    return found


def thin_line(facts: Mapping[str, Any]) -> str:
    """What was measured, in one line; ``facts`` of `Thinning.to_dict`."""
    return thin_problem(facts) or (
        f"draws {facts['thin']} steps apart pass for independent: R-hat {facts['r_hat']:.3g}, "
        f"{facts['ess_share']:.0%} of them effective"
    )


def with_thin(card: ModelCard, facts: Mapping[str, Any] | None) -> ModelCard:
    """A card that recommends what was measured: ``facts`` of `Thinning.to_dict`; None leaves it without a measure."""
    diagnostics = {name: value for name, value in card.diagnostics.items() if name != "mixing"}
    if facts is None:
        return replace(card, diagnostics=diagnostics)
    sampling = {**card.sampling, "thin": facts["thin"]}
    return replace(card, sampling=sampling, diagnostics={**diagnostics, "mixing": dict(facts)})


def main(arguments: Sequence[str] | None = None) -> int:
    """The program that the module describes."""
    about = "Measure how many steps let draws of a jittered chain pass for independent."
    parser = argparse.ArgumentParser(prog="python -m kaleido_fast.evaluating.thinning", description=about)
    parser.add_argument("checkpoint", help="path of a checkpoint, or the name of a bundled model")
    parser.add_argument("--write", action="store_true", help="put it on the checkpoint's card; weights stay")
    given = parser.parse_args(arguments)
    try:
        checkpoint = load_checkpoint(given.checkpoint)
        if recommended_sampler(checkpoint.card.sampling) == "flow":
            raise InputError(
                f"{checkpoint.path} recommends sampler 'flow', whose draws start anew: there is no distance to measure"
            )
        found = measure_thin(checkpoint.model, checkpoint.card.sampling)
        if found is None:
            raise InputError(f"{checkpoint.path} recommends no jitter: without it draws of a chain are no new samples")
        for thin, share in sorted(found.tried.items()):
            print(f"thin {thin:4}: {share:.0%} of the draws effective")
        facts = found.to_dict()
        print(thin_line(facts))
        if given.write:
            save_checkpoint(checkpoint.path, checkpoint.model, with_thin(checkpoint.card, facts))
            print(f"written: {checkpoint.path}")
    except InputError as problem:
        print(f"kaleido-fast: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
