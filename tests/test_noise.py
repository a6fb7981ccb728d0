"""Noise is a pure function of (seed, chain, dim, step)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kaleido_fast.noise import jitter_noise, normals, philox4x32, random_words, start_noise, uniforms

# Known answers of philox4x32-10 from the Random123 distribution (kat_vectors): counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = st.integers(0, 2**64 - 1)
CHAINS = st.integers(0, 2**62)


def python_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """The cipher in Python's own whole numbers, written from the paper: a second opinion on overflow."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_random123_known_answers(counter, key, words):
    result = philox4x32(tuple(torch.tensor(c) for c in counter), key)
    assert tuple(int(w) for w in result) == words


@given(SEEDS, CHAINS, st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_words_follow_the_documented_counter(seed, chain, step, dim):
    words = random_words(seed, torch.tensor([chain]), dim, step)
    key = (seed & 0xFFFFFFFF, seed >> 32)
    for block in range(-(-dim // 4)):
        want = python_philox((chain & 0xFFFFFFFF, chain >> 32, block, step), key)
        assert tuple(words[0, block].tolist()) == want


@given(SEEDS, st.integers(0, 2**40), st.integers(0, 1000), st.integers(1, 13), st.integers(0, 6))
def test_noise_of_a_chain_does_not_depend_on_its_neighbours_or_dims(seed, first, step, dim, place):
    chains = torch.arange(first, first + 7)
    for draw in (uniforms, normals):
        together = draw(seed, chains, dim, step)
        alone = draw(seed, chains[place : place + 1], 13, step)[:, :dim]
        assert torch.equal(together[place : place + 1], alone)


def test_uniforms_pass_a_ks_test():
    from scipy.stats import kstest

    sample = uniforms(1, torch.arange(40_000), 5, 3)
    for d in range(5):
        assert kstest(sample[:, d].numpy(), "uniform").pvalue > 1e-4, f"dim {d} is not uniform"
    assert sample.min() >= 0
    assert sample.max() < 1


def test_normals_pass_a_ks_test_and_are_uncorrelated():
    from scipy.stats import kstest

    sample = normals(2, torch.arange(40_000), 6, 9)
    for d in range(6):
        assert kstest(sample[:, d].numpy(), "norm").pvalue > 1e-4, f"dim {d} is not normal"
    correlation = torch.corrcoef(sample.T) - torch.eye(6)
    assert correlation.abs().max() < 5 / math.sqrt(40_000)


def test_steps_and_seeds_give_different_noise():
    chains = torch.arange(1000)
    base = uniforms(1, chains, 8, 1)
    for other in (uniforms(2, chains, 8, 1), uniforms(1, chains, 8, 2), uniforms(1 + 2**32, chains, 8, 1)):
        assert (base == other).float().mean() < 1e-3


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0), (-0.25, 0.5)])
def test_start_noise_stays_in_the_data_range(low, high):
    chains = torch.arange(5000)
    for init in ("uniform", "normal"):
        x = start_noise(3, chains, 4, init, low, high)
        assert x.min() >= low
        assert x.max() <= high
    assert abs(float(start_noise(3, chains, 4, "uniform", low, high).mean()) - (low + high) / 2) < 0.02


def test_upstream_noise_spans_high_to_twice_high_minus_low():
    e = jitter_noise(5, torch.arange(5000), 4, 1, "upstream", -1.0, 1.0)
    assert 1.0 <= float(e.min()) < 1.01
    assert 2.99 < float(e.max()) <= 3.0


def test_centred_noises_have_mean_zero_and_their_spread():
    chains = torch.arange(20_000)
    normal = jitter_noise(5, chains, 4, 1, "normal", 0.0, 1.0)
    uniform = jitter_noise(5, chains, 4, 1, "uniform", 0.0, 1.0)
    assert abs(float(normal.mean())) < 0.01
    assert abs(float(normal.std()) - 0.5) < 0.01
    assert abs(float(uniform.mean())) < 0.01
    assert float(uniform.abs().max()) <= 0.5
