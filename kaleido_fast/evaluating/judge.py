"""The judge: a small network that tells classes of pictures apart; its features stand for what a picture shows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaleido_fast.errors import InputError

N_FEATURES = 64
CHANNELS = (16, 32)
MOST_SIDE = 32  # larger pictures are averaged down to this many values a side
STEPS, BATCH, PEAK_RATE = 400, 128, 3e-3
SHIFTED = 14  # pictures are shifted by up to a 14th of a side: 1,000 MNIST digits then teach 95.8 %, else 92.2 %
BLOCK = 2048  # pictures judged at once


class Judge:
    """Two convolutions, 64 features and a layer that tells the classes from them; `train_judge` makes one.

    Args:
        network: pictures (n, channels, H, W) to a score of each class; its last layer takes the features.
        sample_shape: (H, W) or (H, W, channels).
        mean, spread: of the values of the pictures that it was trained on.
        classes: (c,) labels, in increasing order.
        n_trained: pictures that it was trained on.
    """

    def __init__(
        self,
        network: nn.Sequential,
        sample_shape: Sequence[int],
        mean: float,
        spread: float,
        classes: Tensor,
        n_trained: int,
    ) -> None:
        self.network, self.sample_shape = network, tuple(sample_shape)
        self.mean, self.spread, self.classes, self.n_trained = mean, spread, classes, n_trained

    def features(self, points: Tensor) -> Tensor:
        """Features of pictures (n, D): (n, 64) fp32."""
        with torch.no_grad():
            return torch.cat([self.network[:-1](self._pictures(block)) for block in points.split(BLOCK)])

    def accuracy(self, points: Tensor, labels: Tensor) -> float:
        """Share of pictures (n, D) whose class (n,) it tells rightly."""
        with torch.no_grad():
            found = self.classes[self.network[-1](self.features(points)).argmax(dim=1)]
        return float((found == labels).double().mean())

    def _pictures(self, points: Tensor) -> Tensor:
        return _pictures((points.float() - self.mean) / self.spread, self.sample_shape)


def train_judge(examples: Tensor, labels: Tensor, sample_shape: Sequence[int], *, seed: int = 0) -> Judge:
    """A judge trained on labelled pictures, in seconds on a CPU; the same one from the same arguments.

    Give pictures that neither the sampled model has seen nor the samples are compared with.

    Args:
        examples: (m, D).
        labels: (m,) whole numbers.
        sample_shape: (H, W) or (H, W, channels).
        seed: of its weights, the order of the pictures and their shifts.

    Raises:
        InputError: no label for each picture, or fewer than two classes.
    """
    if labels.shape != examples.shape[:1]:
        raise InputError(f"labels of shape {tuple(labels.shape)} for {len(examples)} examples: give one for each")
    classes, targets = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise InputError("all examples have the same class: a judge needs two or more")
    generator = torch.Generator().manual_seed(seed)
    examples = examples.float()
    mean, spread = float(examples.mean()), max(float(examples.std()), 1e-6)
    pictures = _pictures((examples - mean) / spread, sample_shape)
    network = _network(pictures.shape[1:], len(classes), generator)
    optimizer = torch.optim.Adam(network.parameters(), lr=PEAK_RATE)
    for step in range(STEPS):
        rows = torch.randint(len(pictures), (BATCH,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(network(_shifted(pictures[rows], generator)), targets[rows]).backward()
        optimizer.step()
    return Judge(network.eval(), sample_shape, mean, spread, classes, len(examples))


def _pictures(points: Tensor, sample_shape: Sequence[int]) -> Tensor:
    """Points (n, D) as (n, channels, H, W), no side above `MOST_SIDE`."""
    height, width, channels = (*sample_shape, 1)[:3]
    pictures = points.unflatten(1, (height, width, channels)).permute(0, 3, 1, 2)
    if max(height, width) > MOST_SIDE:
        pictures = F.adaptive_avg_pool2d(pictures, (min(height, MOST_SIDE), min(width, MOST_SIDE)))
    return pictures.contiguous()


def _shifted(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """A batch (n, channels, H, W), all of it shifted by one random step of a few values; edges are repeated."""
    height, width = pictures.shape[2:]
    most = min(height, width) // SHIFTED
    if not most:
        return pictures
    down, right = torch.randint(2 * most + 1, (2,), generator=generator).tolist()
    padded = F.pad(pictures, (most,) * 4, mode="replicate")
    return padded[:, :, down : down + height, right : right + width]


def _network(shape: Sequence[int], n_classes: int, generator: torch.Generator) -> nn.Sequential:
    """Its weights come from ``generator`` alone."""
    channels, height, width = shape
    first, second = CHANNELS
    flat = second * math.ceil(height / 4) * math.ceil(width / 4)
    with torch.device("meta"):  # no weights are drawn from the global generator
        network = nn.Sequential(
            nn.Conv2d(channels, first, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(flat, N_FEATURES),
            nn.ReLU(),
            nn.Linear(N_FEATURES, n_classes),
        )
    network = network.to_empty(device="cpu")
    for layer in network:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, generator=generator)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return network
