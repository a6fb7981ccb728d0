"""A training loop whose data loader adds variations of its images, made by a kaleidoscopic network.

Few labelled digits, a small classifier. Each batch is doubled: a copy of every image gets noise and takes some steps of
a network that was trained on digits without labels, which pulls it back to something like a digit. Sampling is one
operator of torch (`sample_op`), so that the augmentation could be compiled or exported with the rest of the program.

    python examples/augment.py

prints how many other digits the classifier gets right without and with the variations: 69.6 % and 72.2 % from 20
labelled ones, the mean of four splits. From 60 labelled ones there is no gain left. (The network has seen most of the
digits, without labels.) It needs scikit-learn.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kaleido_fast import Dataset, KaleidoMLP, load_checkpoint, load_dataset, sample_op


class Vary(nn.Module):
    """Images (n, D) to variations of them (n, D): noise, then ``steps`` steps of the network, the last two without it.

    Args:
        network: trained on such images.
        noise: of the start and of each step, in units of half the data range.
        steps: more of them move an image farther from where it started.
    """

    def __init__(self, network: KaleidoMLP, noise: float = 0.4, steps: int = 4) -> None:
        super().__init__()
        self.network, self.noise, self.steps = network, noise, steps

    def forward(self, images: Tensor, seed: int) -> Tensor:
        spec = self.network.spec
        half = (spec.high - spec.low) / 2
        start = (images + self.noise * half * torch.randn_like(images)).clamp(spec.low, spec.high)
        chains = sample_op(self.network, z0=start, burn_in=self.steps - 1, jitter=self.noise, settle=2, seed=seed)
        return chains.final


class AugmentedLoader:
    """A loader of (images, labels) whose batches hold every image twice: as it is, and varied."""

    def __init__(self, loader: DataLoader[tuple[Tensor, ...]], vary: Vary) -> None:
        self.loader, self.vary, self.batches = loader, vary, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.loader:
            self.batches += 1  # a seed of its own for each batch, the same ones in each run of the program
            yield torch.cat([images, self.vary(images, self.batches)]), labels.repeat(2)


def train(batches: DataLoader[tuple[Tensor, ...]] | AugmentedLoader, epochs: int) -> nn.Module:
    """A small classifier of 8 x 8 digits."""
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
    for _ in range(epochs):
        for images, labels in batches:
            loss = F.cross_entropy(classifier(images), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return classifier


def accuracy(digits: Dataset, n_labelled: int, split: int, epochs: int, vary: Vary | None) -> float:
    """Share of the other digits that a classifier gets right which knows the labels of a few."""
    assert digits.labels is not None
    order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(split))
    few, rest = order[:n_labelled], order[n_labelled:]
    data = TensorDataset(digits.data[few], digits.labels[few])
    loader = DataLoader(data, batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(0))
    classifier = train(loader if vary is None else AugmentedLoader(loader, vary), epochs)
    with torch.no_grad():
        return float((classifier(digits.data[rest]).argmax(1) == digits.labels[rest]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--labelled", type=int, default=20, help="digits with a label")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--splits", type=int, default=4, help="choices of labelled digits that are averaged")
    options = parser.parse_args()

    digits, vary = load_dataset("digits"), Vary(load_checkpoint("attractors").model)
    for name, augmentation in (("without", None), ("with", vary)):
        shares = [
            accuracy(digits, options.labelled, split, options.epochs, augmentation) for split in range(options.splits)
        ]
        mean = sum(shares) / len(shares)
        print(f"{name} variations: {mean:.1%} right, from {options.labelled} labelled digits")


if __name__ == "__main__":
    main()
