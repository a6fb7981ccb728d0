"""Threads that share the layers of a tile: no bit depends on their number, and nobody waits for one that is away."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from conftest import random_mlp
from cpu_runs import ACTIVATIONS, assert_same_bits, run
from hypothesis import given, settings
from hypothesis import strategies as st

from kaleido_fast.planning.request import SampleRequest

pytest.importorskip("numba", reason="the CPU engine needs numba")
from kaleido_fast.engines import cpu
from kaleido_fast.engines.cpu import CpuEngine
from kaleido_fast.engines.loops.arrays import Tile
from kaleido_fast.engines.loops.choice import LOOPS
from kaleido_fast.engines.loops.packing import make_board, member_tile
from kaleido_fast.engines.loops.schedule import start_kind
from kaleido_fast.engines.loops.team import SIZE, STOPPED
from kaleido_fast.engines.team import Pace, Team

MODEL = random_mlp(40, 130, 90, 40)


def member_of(tile: Tile, board: np.ndarray) -> Tile:
    return member_tile(tile, np.array([-1, 0, board.ctypes.data], np.int64))


def run_shared(engine: CpuEngine, n: int, size: int, late: int = 0):
    """(draws, final, residual) of one call of the loops by ``size`` threads, and how many took part.

    ``late`` of the others come only after the leader has gone.
    """
    request, dim = engine.request, engine.spec.dim
    lanes = engine.loops.lanes
    tile = engine.loops.make_tile(engine.spec, -(-n // lanes) * lanes)
    board = make_board()
    place = np.array([0, size, board.ctypes.data if size > 1 else 0], np.int64)
    tile = tile._replace(place=place)
    draws = np.full((n, request.n_draws, dim), np.nan, np.float32)
    final, residual = np.empty((n, dim), np.float32), np.zeros(n, np.float32)

    def call(own):
        engine.loops.advance(
            engine.layers,
            engine.steps,
            own,
            np.arange(n),
            final,
            start_kind(request),
            0,
            request.schedule.n_steps,
            draws,
            final,
            residual,
        )

    others = [threading.Thread(target=call, args=(member_of(tile, board),)) for _ in range(size - 1)]
    for other in others[late:]:
        other.start()
    call(tile)
    for other in others[:late]:
        other.start()
    for other in others:
        other.join(timeout=60)
        assert not other.is_alive(), "a member never came back"
    return [torch.from_numpy(values) for values in (draws, final, residual)], int(place[1])


OPTIONS = st.sampled_from(
    [
        {"burn_in": 2, "n_draws": 2},
        {"burn_in": 1, "n_draws": 2, "thin": 2, "jitter": 0.2},
        {"burn_in": 1, "n_draws": 2, "jitter": 0.2, "noise": "upstream", "settle": 0},
        {"n_draws": 2, "sampler": "flow", "steps": 3},
        {"n_draws": 3, "init": "normal", "jitter": 0.1, "noise": "uniform", "settle": 0},
    ]
)


@settings(max_examples=60, deadline=None)
@given(
    widths=st.lists(st.integers(1, 130), min_size=1, max_size=4),
    activation=st.sampled_from(ACTIVATIONS),
    n=st.one_of(st.integers(1, 8), st.integers(9, 70)),
    size=st.integers(2, 5),
    options=OPTIONS,
)
def test_the_number_of_members_changes_no_bit(widths, activation, n, size, options):
    model = random_mlp(*widths, widths[0], activation=activation)
    engine = CpuEngine(model, SampleRequest(n_chains=n, seed=5, **options))
    alone, _ = run_shared(engine, n, 1)
    shared, came = run_shared(engine, n, size)
    assert 1 <= came <= size
    assert_same_bits(shared, alone, f"{came} members, {n} chains of {model.spec.widths} {activation}")


@pytest.mark.parametrize("loops", ["rounded", "pairs"])
@pytest.mark.parametrize("n", [3, 8, 33])
def test_members_change_no_bit_of_loops_in_bf16(loops, n):
    from kaleido_fast.engines.loops.processor import HAS_PAIRS

    if loops == "pairs" and not HAS_PAIRS:
        pytest.skip("no AVX512-BF16 here")
    engine = CpuEngine(MODEL, SampleRequest(n_chains=n, burn_in=3, n_draws=2, jitter=0.1, seed=5))
    engine.loops = LOOPS[loops]
    engine.layers = engine.loops.pack(MODEL)
    alone, _ = run_shared(engine, n, 1)
    for size in (2, 3):
        assert_same_bits(run_shared(engine, n, size)[0], alone, f"{size} members of {loops}")


def test_members_do_take_part():
    """In one of some runs at least: what is shared by nobody would have the right bits too."""
    engine = CpuEngine(MODEL, SampleRequest(n_chains=4, burn_in=400))
    assert any(run_shared(engine, 4, 3)[1] == 3 for _ in range(20))


def test_a_member_that_comes_late_is_not_waited_for_and_leaves_again():
    engine = CpuEngine(MODEL, SampleRequest(n_chains=4, burn_in=5))
    alone, _ = run_shared(engine, 4, 1)
    for late, size in ((1, 2), (2, 3), (1, 3)):
        shared, came = run_shared(engine, 4, size, late=late)
        assert came <= size - late
        assert_same_bits(shared, alone, f"{late} of {size} late")


@pytest.fixture
def team_of(monkeypatch):
    def ask(members):
        monkeypatch.setattr(cpu, "team_members", lambda *_: members)
        monkeypatch.setattr(cpu, "working_threads", lambda *_: members)

    return ask


@pytest.mark.parametrize("members", [2, 5])
def test_a_run_of_a_team_has_the_bits_of_one_thread_however_it_is_cut(team_of, monkeypatch, members):
    request = SampleRequest(n_chains=6, burn_in=40, n_draws=3, thin=2, jitter=0.1, seed=4)
    engine, chains = CpuEngine(MODEL, request), torch.arange(6)
    team_of(1)
    whole = run(engine, chains)
    team_of(members)
    assert_same_bits(run(engine, chains), whole, "one call")
    early, state, _ = run(engine, chains, last=43)
    late, final, residual = run(engine, chains, state, 43)
    assert_same_bits((torch.where(early.isnan(), late, early), final, residual), whole, "split in time")
    monkeypatch.setattr(cpu, "steps_per_call", lambda *_: 3)
    counted: list[int] = []
    assert_same_bits(run(engine, chains, report=counted.append), whole, "three steps a call")
    assert sum(counted) == 6 * 46 and len(counted) > 10


@pytest.mark.parametrize("stops_at", [1, 4])
def test_a_team_that_is_stopped_leaves_no_thread_at_work(team_of, monkeypatch, stops_at):
    engine, calls = CpuEngine(MODEL, SampleRequest(n_chains=4, burn_in=10**7)), []
    team_of(3)
    monkeypatch.setattr(cpu, "steps_per_call", lambda *_: 20)
    at_work: list[int] = []
    follow = Team.follow

    def counted(team):
        at_work.append(1)
        follow(team)
        at_work.pop()

    monkeypatch.setattr(Team, "follow", counted)

    def stop(steps):
        calls.append(steps)
        if len(calls) == stops_at:
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        engine.advance(torch.arange(4), None, 0, 10**7, None, stop)
    assert time.monotonic() - began < 30 and not at_work


def test_a_leader_that_is_interrupted_before_its_call_leaves_no_member_waiting(team_of, monkeypatch):
    """Between asking others and its own call, where they have enrolled and look for it."""
    engine = CpuEngine(MODEL, SampleRequest(n_chains=4, burn_in=100))
    team_of(3)

    def interrupted(team, call):
        team._board = make_board()
        for _ in range(2):
            team._calls.put((call, team._board, 0))
        time.sleep(0.2)
        raise KeyboardInterrupt

    monkeypatch.setattr(Team, "_lead", interrupted)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(engine, torch.arange(4))
    assert time.monotonic() - began < 30


def test_who_finds_a_team_stopped_leaves():
    engine = CpuEngine(MODEL, SampleRequest(n_chains=4, burn_in=5))
    board = make_board()
    board[SIZE] = STOPPED
    own, final = (
        member_of(engine.loops.make_tile(engine.spec, engine.loops.lanes), board),
        np.full((4, 40), 7, np.float32),
    )
    none = np.empty((0, 1, 40), np.float32)
    engine.loops.advance(
        engine.layers, engine.steps, own, np.arange(4), final, 0, 0, 5, none, final, np.zeros(4, np.float32)
    )
    assert (final == 7).all()


def test_a_team_that_is_slower_than_one_thread_gives_way_to_it_for_a_while():
    def alone_of(together, calls):
        pace, alone = Pace(), []
        for _ in range(calls):
            alone.append(not pace.together())
            pace.add(1 if alone[-1] else 2, 1.0 if alone[-1] else together)
        return alone

    slow = alone_of(1.5, 200)
    assert slow[:4] == [False] * 4, "there is nothing to compare with yet"
    assert slow[4:19] == [True, False, *[True] * 4, False, *[True] * 8]
    assert sum(slow) > 185
    assert sum(alone_of(0.6, 200)) == 1, "a team that is faster stays, but for one call to compare with"
