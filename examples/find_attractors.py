"""A search for the attractors of a network that goes on until few are left to find.

    python examples/find_attractors.py --model attractors --unseen 0.05 --out found.json

Chains are sampled in rounds; chain ids go on from round to round, so that a longer search contains a shorter one. The
chance that one more chain would end at an attractor not yet seen is estimated by Good and Turing's rule: the share of
chains that are alone at their attractor (Good, "The population frequencies of species", 1953).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from kaleido_fast import Catalogue, attractors, fast_sample, load_checkpoint
from kaleido_fast.model import KaleidoMLP


class Search:
    """Attractors found so far.

    Args:
        model: the network.
        distance: end states closer than this are the same (root mean square, in units of half the data range).
    """

    def __init__(self, model: KaleidoMLP, distance: float = 0.05) -> None:
        self.model, self.distance = model, distance
        self.states = torch.empty(0, model.spec.dim)
        self.counts = torch.empty(0, dtype=torch.int64)
        self.chains = 0

    @property
    def unseen(self) -> float:
        """Estimated chance that the next chain that settles ends somewhere new."""
        settled = int(self.counts.sum())
        return float((self.counts == 1).sum()) / settled if settled else 1.0

    def round(self, n_chains: int) -> int:
        """Sample that many more chains; the number of new attractors."""
        result = fast_sample(self.model, n_chains=n_chains, first_chain=self.chains, jitter=0.0)
        self.chains += n_chains
        return self._merge(attractors(result, self.model, distance=self.distance))

    def _merge(self, found: Catalogue) -> int:
        spec = self.model.spec
        near = self.distance * (spec.high - spec.low) / 2 * spec.dim**0.5
        new = 0
        for state, count, kind in zip(found.states.cpu(), found.counts.cpu(), found.kinds, strict=True):
            if kind == "repels":  # its chains rest there within tol, no more
                continue
            away = (self.states - state).norm(dim=1)
            if len(away) and float(away.min()) < near:
                self.counts[away.argmin()] += count
            else:
                self.states, self.counts = torch.cat([self.states, state[None]]), torch.cat([self.counts, count[None]])
                new += 1
        return new


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="attractors", help="bundled model or checkpoint")
    parser.add_argument("--round", type=int, default=500, help="chains of one round")
    parser.add_argument("--rounds", type=int, default=20, help="at most")
    parser.add_argument("--unseen", type=float, default=0.05, help="stop when a new chain is this unlikely to be new")
    parser.add_argument("--out", type=Path, help="JSON file for states and counts")
    options = parser.parse_args()
    if options.out and options.out.exists():
        parser.error(f"{options.out} is there already: give another --out")

    search = Search(load_checkpoint(options.model).model)
    for _ in range(options.rounds):
        new = search.round(options.round)
        print(f"{search.chains:,} chains: {len(search.counts):,} attractors, {new:,} new, {search.unseen:.1%} unseen")
        if search.unseen <= options.unseen:
            break
    order = search.counts.argsort(descending=True)
    if options.out:
        found = {"chains": search.chains, "unseen": search.unseen, "counts": search.counts[order].tolist()}
        options.out.write_text(json.dumps({**found, "states": search.states[order].tolist()}))


if __name__ == "__main__":
    main()
