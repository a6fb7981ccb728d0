"""Counter-based noise: a pure function of (seed, chain, dim, step), the same on every engine and device.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with key = the 64-bit seed and
counter = (chain low, chain high, dim // 4, step); dim d takes word d % 4. Step 0 is the start noise, step t the jitter
of step t. Words are held in int64 tensors, because torch has little uint32 arithmetic.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_TO_UNIT = 2.0**-24

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Ten rounds of Philox4x32 over broadcastable int64 tensors that hold uint32 words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The wrapped int64 product has the bits of the unsigned one; masking after the shift drops the sign.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & MASK32) ^ c1 ^ k0,
            p1 & MASK32,
            ((p0 >> 32) & MASK32) ^ c3 ^ k1,
            p0 & MASK32,
        )
        k0, k1 = (k0 + _WEYL[0]) & MASK32, (k1 + _WEYL[1]) & MASK32
    return c0, c1, c2, c3


def random_words(seed: int, chain_ids: Tensor, dim: int, step: int) -> Tensor:
    """The uint32 words of one step.

    Args:
        seed: 0 .. 2**64 - 1.
        chain_ids: (n,) int64, absolute chain ids.
        dim: values per chain.
        step: 0 .. 2**32 - 1.

    Returns:
        (n, ceil(dim / 4), 4) int64 tensor on the device of ``chain_ids``.
    """
    blocks = torch.arange((dim + 3) // 4, device=chain_ids.device)
    low, high = (chain_ids & MASK32)[:, None], ((chain_ids >> 32) & MASK32)[:, None]
    counter = torch.broadcast_tensors(low, high, blocks[None, :], torch.full_like(low, step))
    key = (seed & MASK32, (seed >> 32) & MASK32)
    return torch.stack(philox4x32((counter[0], counter[1], counter[2], counter[3]), key), dim=-1)


def uniforms(seed: int, chain_ids: Tensor, dim: int, step: int) -> Tensor:
    """(n, dim) fp32 uniforms on [0, 1): the top 24 bits of each word, so that they are exact on every device."""
    words = random_words(seed, chain_ids, dim, step)
    return _to_unit(words).reshape(len(chain_ids), -1)[:, :dim]


def normals(seed: int, chain_ids: Tensor, dim: int, step: int) -> Tensor:
    """(n, dim) fp32 standard normals by Box-Muller (1958): words (0, 1) and (2, 3) give two each; at most 5.77."""
    words = random_words(seed, chain_ids, dim, step)
    radius = torch.sqrt(-2.0 * torch.log(_to_unit(words[..., 0::2]) + _TO_UNIT))
    angle = (2.0 * math.pi) * _to_unit(words[..., 1::2])
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.reshape(len(chain_ids), -1)[:, :dim]


def _to_unit(words: Tensor) -> Tensor:
    return (words >> 8).to(torch.float32) * _TO_UNIT


def start_noise(seed: int, chain_ids: Tensor, dim: int, init: str, low: float, high: float) -> Tensor:
    """x_0 of the chains, (n, dim) fp32: ``init`` "uniform" on [low, high), or "normal": N(mid, half range) clipped."""
    if init == "uniform":
        return low + (high - low) * uniforms(seed, chain_ids, dim, 0)
    mid, half = (low + high) / 2, (high - low) / 2
    return (mid + half * normals(seed, chain_ids, dim, 0)).clamp(low, high)


def flow_noise(seed: int, chain_ids: Tensor, dim: int, step: int, scale: float, low: float, high: float) -> Tensor:
    """Start of a draw of a flow, (n, dim) fp32: N(mid, scale x half range) from the counters of ``step``, unbounded."""
    mid, half = (low + high) / 2, (high - low) / 2
    return mid + half * (scale * normals(seed, chain_ids, dim, step))


def jitter_noise(seed: int, chain_ids: Tensor, dim: int, step: int, noise: str, low: float, high: float) -> Tensor:
    """The noise of one step before it is scaled by ``jitter``, (n, dim) fp32, in data units.

    ``noise`` is "normal" (half range x standard normal), "uniform" (on +- half range) or "upstream": uniform on
    [high, 2 high - low), as the published sampler draws it, which drifts upward.
    """
    half = (high - low) / 2
    if noise == "normal":
        return half * normals(seed, chain_ids, dim, step)
    u = uniforms(seed, chain_ids, dim, step)
    if noise == "uniform":
        return half * (2.0 * u - 1.0)
    return (high - low) * u + high
