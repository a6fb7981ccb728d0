"""The kernels' noise under Triton's interpreter: known answers, the same bits as torch, normals within a few ulp."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from kernel_oracle import DEVICE, assert_close

from kaleido_fast.noise import normals, random_words, uniforms
from kaleido_kernels.philox import noise_tile, philox_words

# Known answers of Philox4x32-10 (Random123's kat_vectors): counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = [0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1]
CHAINS = [0, 2**32 - 5, 2**40 + 3, 2**62 - 20]
ROWS = 8


@triton.jit
def words_kernel(
    words_ptr,  # (ROWS, 4) int64
    chains_ptr,  # (ROWS,) int64
    seed: tl.int64,
    block,
    step,
    ROWS: tl.constexpr,
):
    """Grid: (1,)."""
    rows = tl.arange(0, ROWS)
    chains = tl.load(chains_ptr + rows)
    w0, w1, w2, w3 = philox_words(seed, chains, tl.zeros([ROWS], tl.uint32) + block.to(tl.uint32), step.to(tl.uint32))
    tl.store(words_ptr + rows * 4, w0.to(tl.int64))
    tl.store(words_ptr + rows * 4 + 1, w1.to(tl.int64))
    tl.store(words_ptr + rows * 4 + 2, w2.to(tl.int64))
    tl.store(words_ptr + rows * 4 + 3, w3.to(tl.int64))


@triton.jit
def noise_kernel(
    values_ptr,  # (ROWS, COLS) fp32
    chains_ptr,  # (ROWS,) int64
    seed: tl.int64,
    first_col,
    step,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
):
    """Grid: (1,)."""
    rows = tl.arange(0, ROWS)
    values = noise_tile(seed, tl.load(chains_ptr + rows), first_col, step, DIM, ROWS, COLS, KIND)
    tl.store(values_ptr + rows[:, None] * COLS + tl.arange(0, COLS)[None, :], values)


def signed(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed


def kernel_words(seed: int, chains: torch.Tensor, block: int, step: int) -> torch.Tensor:
    words = torch.empty(len(chains), 4, dtype=torch.int64, device=DEVICE)
    words_kernel[(1,)](words, chains.to(DEVICE), signed(seed), block, step, len(chains))
    return words.cpu()


def kernel_noise(seed: int, first: int, dim: int, step: int, cols: int, kind: str, first_col: int = 0) -> torch.Tensor:
    values, chains = torch.empty(ROWS, cols, device=DEVICE), first + torch.arange(ROWS, device=DEVICE)
    noise_kernel[(1,)](values, chains, signed(seed), first_col, step, dim, ROWS, cols, kind)
    return values.cpu()


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers_of_random123(counter, key, result):
    chain = counter[0] | counter[1] << 32
    chain = chain - 2**64 if chain >= 2**63 else chain
    got = kernel_words(key[0] | key[1] << 32, torch.full((ROWS,), chain, dtype=torch.int64), counter[2], counter[3])
    assert got[0].tolist() == list(result)
    assert (got == got[0]).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("first", CHAINS)
def test_words_have_the_bits_of_torch(seed, first):
    chains = first + torch.arange(ROWS)
    for block, step in ((0, 0), (3, 17), (767, 2**31 - 1)):
        want = random_words(seed, chains, 4 * block + 4, step)[:, block]
        got = kernel_words(seed, chains, block, step)
        assert torch.equal(got, want), f"seed {seed} chain {first} block {block} step {step}"


@pytest.mark.parametrize(("dim", "cols"), [(1, 16), (2, 16), (3, 16), (4, 16), (5, 16), (13, 16), (31, 32)])
def test_uniforms_have_the_bits_of_torch(dim, cols):
    for first in CHAINS:
        got = kernel_noise(7, first, dim, 5, cols, "uniform")[:, :dim]
        assert torch.equal(got, uniforms(7, first + torch.arange(ROWS), dim, 5)), f"first chain {first}"


@pytest.mark.parametrize(("dim", "cols"), [(1, 16), (3, 16), (13, 16), (31, 32)])
def test_normals_agree_with_torch_to_a_few_ulp(dim, cols):
    for first in CHAINS:
        want = normals(11, first + torch.arange(ROWS), dim, 3)
        assert_close(kernel_noise(11, first, dim, 3, cols, "normal")[:, :dim], want, 1.5e-6, 0.0, f"chain {first}")


def test_a_tile_in_the_middle_is_that_part_of_the_whole():
    whole = kernel_noise(5, 100, 64, 9, 64, "normal")
    for first_col in (16, 48):
        assert torch.equal(kernel_noise(5, 100, 64, 9, 16, "normal", first_col), whole[:, first_col : first_col + 16])


def test_normals_are_standard_normal():
    values = torch.cat([kernel_noise(3, 0, 512, step, 512, "normal").flatten() for step in range(8)]).double()
    # 32,768 values: 4.9 standard errors of mean, variance and fourth moment.
    n = len(values)
    assert abs(values.mean()) < 4.9 / n**0.5
    assert abs(values.var() - 1) < 4.9 * (2 / n) ** 0.5
    assert abs((values**4).mean() - 3) < 4.9 * (96 / n) ** 0.5
    neighbours = (values[::2] * values[1::2]).mean()
    assert abs(neighbours) < 4.9 / (n / 2) ** 0.5
