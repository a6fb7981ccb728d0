"""Comparing memory: any change of any word is seen, and nothing else is taken for one."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kaleido_fast.system import same_bits as module
from kaleido_fast.system.same_bits import same_bits

SHAPES = ((7, 5), (7,), (30, 7), (30,), (1, 30), (1,))


def random_tensors(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-(2**31), 2**31 - 1, s, dtype=torch.int32, generator=generator) for s in SHAPES]


def in_small_pieces(monkeypatch, n_threads: int) -> None:
    """As with networks of many MB."""
    monkeypatch.setattr(module, "PIECE", 64)
    monkeypatch.setattr(module, "_FOR_A_THREAD", 128)
    monkeypatch.setattr(module, "useful_threads", lambda: n_threads)


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("by", ["memcmp", "torch"])
def test_any_word_that_changes_is_seen(monkeypatch, n_threads, by):
    in_small_pieces(monkeypatch, n_threads)
    if by == "torch":  # where the C library's function is not found
        monkeypatch.setattr(module, "_memcmp", lambda: None)
    kept = random_tensors()

    @settings(max_examples=150, deadline=None)
    @given(st.integers(0, len(SHAPES) - 1), st.integers(0), st.integers(1, 2**32 - 1))
    def law(which: int, place: int, flipped: int) -> None:
        given_now = [tensor.clone() for tensor in kept]
        assert same_bits(list(zip(kept, given_now, strict=True)))
        words = given_now[which].view(-1)
        words[place % len(words)] ^= flipped - 2**32 if flipped >= 2**31 else flipped
        assert not same_bits(list(zip(kept, given_now, strict=True)))
        assert not same_bits(list(zip(given_now, kept, strict=True)))

    law()


@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_each_piece_of_a_large_tensor_is_compared_in_whatever_thread(monkeypatch, n_threads):
    in_small_pieces(monkeypatch, n_threads)
    kept = torch.arange(4096, dtype=torch.int32)
    used, compare = set(), module._memcmp()
    assert compare is not None

    def noted(first: int, second: int, size: int) -> int:
        used.add(threading.current_thread())
        return compare(first, second, size)

    monkeypatch.setattr(module, "_memcmp", lambda: noted)
    for place in range(0, 4096, 5):
        other = kept.clone()
        other[place] += 1
        assert not same_bits([(kept, other)]), place
    assert same_bits([(kept, kept.clone())])
    assert (len(used) > 1) == (n_threads > 1)


def test_bits_count_not_numbers():
    zeros, negative = torch.zeros(9), -torch.zeros(9)
    nan = torch.full((9,), float("nan"))
    assert torch.equal(zeros, negative)
    assert not same_bits([(zeros, negative)])
    assert same_bits([(nan, nan.clone())])
    assert not same_bits([(zeros, torch.zeros(8))])
    assert not same_bits([(zeros, torch.zeros(9, dtype=torch.int32))])
    assert same_bits([])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_wherever_the_values_lie(dtype):
    """Transposed, cut out of something larger, with a sign that torch only notes, as a parameter."""
    want = torch.randn(6, 10, generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = torch.zeros(6, 30, dtype=dtype)
    wide[:, 10:20] = want
    forms = {
        "transposed": want.t().contiguous().t(),
        "cut out": wide[:, 10:20],
        "negated": torch._neg_view(-want),
        "parameter": nn.Parameter(want.clone()),
    }
    for name, form in forms.items():
        for kept in (want, form.detach().clone()):
            assert same_bits([(kept, form)]), name
            with torch.no_grad():
                form[5, 9] += 1
            assert not same_bits([(kept, form)]), name
            with torch.no_grad():
                form[5, 9] = -want[5, 9] if name == "negated" and not form.is_neg() else want[5, 9]
    strided = torch.arange(20, dtype=torch.float32).to(dtype)[::2]
    assert same_bits([(strided, strided.clone())])
    assert not same_bits([(strided, strided + 1)])


def test_memory_that_is_gone_is_not_read():
    """As where a program keeps the shape of a weight and frees its memory."""
    kept, given_now = torch.rand(1000), torch.rand(1000)
    given_now.untyped_storage().resize_(0)
    assert not same_bits([(kept, given_now)])


def test_a_thread_that_fails_is_no_proof(monkeypatch):
    """What it had taken was not compared."""
    in_small_pieces(monkeypatch, 3)
    main = threading.current_thread()
    waiting = threading.Event()

    def compare(first: int, second: int, size: int) -> int:
        if threading.current_thread() is main:
            waiting.wait(10)
            return 0
        waiting.set()
        raise MemoryError

    monkeypatch.setattr(module, "_memcmp", lambda: compare)
    kept = torch.arange(4096)
    with pytest.raises(MemoryError):
        same_bits([(kept, kept.clone())])


def test_an_interrupted_comparison_reads_no_further(monkeypatch):
    """What was compared may be gone the moment after."""
    in_small_pieces(monkeypatch, 3)
    main, interrupted, over = threading.current_thread(), threading.Event(), threading.Event()

    def compare(first: int, second: int, size: int) -> int:
        assert not over.is_set()
        if threading.current_thread() is main:
            interrupted.set()
            raise KeyboardInterrupt
        interrupted.wait(10)
        return 0

    monkeypatch.setattr(module, "_memcmp", lambda: compare)
    kept = torch.arange(4096)
    with pytest.raises(KeyboardInterrupt):
        same_bits([(kept, kept.clone())])
    over.set()
    assert same_bits([]), "nothing else is left"
