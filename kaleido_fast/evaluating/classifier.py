"""A small classifier that says which class samples belong to, and how sure it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kaleido_fast.errors import InputError
from kaleido_fast.evaluating.diagnostics import evenly

N_TREES = 300
MOST_EXAMPLES = 5000  # more cost time and change shares by less than the sampling error


class Trees:
    """300 extremely randomised trees (Geurts et al. 2006), by scikit-learn.

    Give examples that the sampled model was not trained on: copies of known examples are recognised too easily.

    Args:
        examples: (m, D), at most 5000 of which, evenly spaced, are used.
        labels: (m,) whole numbers.
        seed: of the trees.

    Raises:
        InputError: scikit-learn is not installed, no label for each example, or fewer than two classes.
    """

    def __init__(self, examples: Tensor, labels: Tensor, *, seed: int = 0) -> None:
        try:
            from sklearn.ensemble import ExtraTreesClassifier
        except ImportError as problem:
            raise InputError("classes need scikit-learn: pip install 'kaleido-fast[data]'") from problem
        if labels.shape != examples.shape[:1]:
            raise InputError(f"labels of shape {tuple(labels.shape)} for {len(examples)} examples: give one for each")
        if len(labels.unique()) < 2:
            raise InputError("all examples have the same class: a classifier needs two or more")
        self._trees: Any = ExtraTreesClassifier(n_estimators=N_TREES, random_state=seed, n_jobs=2)
        self._trees.fit(evenly(examples.cpu(), MOST_EXAMPLES).numpy(), evenly(labels.cpu(), MOST_EXAMPLES).numpy())

    @property
    def classes(self) -> list[int]:
        """The labels, in increasing order."""
        return [int(label) for label in self._trees.classes_]

    def predict(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Place of every sample's (n, D) class in ``classes``, int64 (n,), and the trees' share of votes for it, (n,).

        A low share means blur: real digits get 0.7, blurred ones 0.2 to 0.5.
        """
        votes = np.concatenate(
            [self._trees.predict_proba(block.cpu().numpy()) for block in samples.float().split(4096)]
        )
        best = torch.from_numpy(votes).max(dim=1)
        return best.indices, best.values.float()


def classify(samples: Tensor, examples: Tensor, labels: Tensor, *, seed: int = 0) -> Tensor:
    """Class of every sample (n, D) by `Trees` grown on labelled examples: int64 (n,).

    Raises:
        InputError: as `Trees`.
    """
    trees = Trees(examples, labels, seed=seed)
    return torch.tensor(trees.classes)[trees.predict(samples)[0]]
