"""Distances between many points in blocks: memory does not grow with the product of the two numbers of points."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kaleido_fast.errors import InputError

BLOCK_ROWS = 1024
BLOCK_COLUMNS = 8192  # a block of distances holds 32 MiB
DIRECT_DIM = 32  # up to here the differences themselves are summed; above, a matrix product is much faster
CLOSE = 0.01  # below this share of |a|^2 + |b|^2 the product has lost digits: measured again by differences
FEW = 1e-3  # share of close pairs up to which differences are cheaper than a product in fp64
CLOSE_VALUES = 1 << 22  # differences held at once while measuring again


def check_points(what: str, points: Tensor) -> None:
    """Refuse points that are no finite (n, D) cloud: `InputError` naming ``what``."""
    if not isinstance(points, Tensor):
        raise InputError(f"{what} are a {type(points).__name__}: give a tensor, such as by torch.from_numpy")
    if points.ndim != 2 or 0 in points.shape:
        raise InputError(f"{what} of shape {tuple(points.shape)}: give (n, D) with at least one row and one value")
    bad = int((~torch.isfinite(points)).any(dim=1).sum())
    if bad:
        raise InputError(f"{bad} of {len(points)} {what} hold NaN or infinity: leave those rows out")


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances of rows (n, D) and (m, D): fp32 (n, m), to a relative error of about 1e-4.

    Small ones, which a matrix product in fp32 would lose to cancellation, are as exact as fp32 differences are.
    """
    a, b = a.float(), b.float()
    if a.shape[1] <= DIRECT_DIM:
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
    centre = b.mean(dim=0)
    a, b = a - centre, b - centre
    lengths = _lengths(a, b)
    squares = torch.addmm(lengths, a, b.T, alpha=-2)
    close = squares < CLOSE * lengths
    n_close = int(close.sum())
    if n_close > FEW * close.numel():  # clusters of near copies
        return torch.addmm(_lengths(a.double(), b.double()), a.double(), b.double().T, alpha=-2).clamp_min(0).float()
    if n_close:
        rows, columns = close.nonzero(as_tuple=True)
        step = max(1, CLOSE_VALUES // a.shape[1])
        for i, j in zip(rows.split(step), columns.split(step), strict=True):
            squares[i, j] = (a[i] - b[j]).square().sum(dim=1)
    return squares


def _lengths(a: Tensor, b: Tensor) -> Tensor:
    return a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)


def distance_blocks(a: Tensor, b: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of `squared_distances`, row by row: rows, columns, values."""
    for top in range(0, len(a), BLOCK_ROWS):
        rows = slice(top, min(top + BLOCK_ROWS, len(a)))
        for left in range(0, len(b), BLOCK_COLUMNS):
            columns = slice(left, min(left + BLOCK_COLUMNS, len(b)))
            yield rows, columns, squared_distances(a[rows], b[columns])


def nearest(a: Tensor, b: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest rows of b (m, D) to each row of a (n, D), the nearest first: squared distances and indices,
    (n, k) each."""
    squares = torch.full((len(a), k), torch.inf, device=a.device)
    indices = torch.zeros((len(a), k), dtype=torch.int64, device=a.device)
    for rows, columns, block in distance_blocks(a, b):
        found = block.topk(min(k, block.shape[1]), dim=1, largest=False)
        values = torch.cat((squares[rows], found.values), dim=1)
        places = torch.cat((indices[rows], found.indices + columns.start), dim=1)
        squares[rows], order = values.topk(k, dim=1, largest=False)
        indices[rows] = places.gather(1, order)
    return squares, indices
