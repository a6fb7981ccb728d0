"""What others use of the machine, from readings that are made up."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaleido_fast.benchmarking import busy
from kaleido_fast.benchmarking.busy import Reading
from kaleido_fast.errors import InputError

SECONDS = st.floats(0, 50)


@given(SECONDS, SECONDS, st.integers(1, 64), st.floats(0.1, 100))
def test_what_is_used_and_is_not_ours_is_used_by_others(own, others, cores, wall):
    before = Reading(5.0, 70.0, 30.0, 900.0)
    after = Reading(5.0 + wall, 70.0 + own + others, 30.0 + own, 900.0 + wall * cores)
    share = busy.others_share(before, after, cores)
    assert share == pytest.approx(min(1.0, others / (wall * cores)), abs=1e-9)


def test_what_cannot_be_told_is_not_called_quiet():
    reading = Reading(5.0, 70.0, 30.0, 900.0)
    assert busy.others_share(None, reading, 2) is None
    assert busy.others_share(reading, Reading(6.0, 70.0, 30.0, 900.0), 2) is None, "nothing was counted, not even idle"


@given(st.none() | st.floats(0, 1))
def test_a_machine_is_refused_when_others_use_more_than_a_fifth(share):
    if share is None or share <= 0.2:
        busy.refuse_busy(share)
    else:
        with pytest.raises(InputError, match=r"other processes use .* wait .* --busy"):
            busy.refuse_busy(share)


@pytest.fixture
def proc(tmp_path, monkeypatch):
    """A made-up /proc of four cores, of which this process may use two."""
    monkeypatch.setattr(busy, "_PROC", tmp_path)
    monkeypatch.setattr(busy, "allowed_cores", lambda: {1, 3})
    tick = os.sysconf("SC_CLK_TCK")

    def write(*, mine: float, theirs: float, elsewhere: float, idle: float) -> None:
        lines = ["cpu  1 2 3 4 5 6 7 8 0 0"]
        used = [elsewhere, mine, elsewhere, theirs]
        lines += [f"cpu{i} {int(x * tick)} 0 0 {int(idle * tick)} 0 0 0 0 0 0" for i, x in enumerate(used)]
        (tmp_path / "stat").write_text("\n".join([*lines, "intr 5 6"]))
        (tmp_path / "77").mkdir(exist_ok=True)
        ticks = int(mine * tick)
        (tmp_path / "77" / "stat").write_text(f"77 (odd ) name) S {' '.join(['0'] * 10)} {ticks - 2} 1 1 0 20 0")

    return write


def test_readings_count_the_allowed_cores_and_know_their_own_children(proc, monkeypatch):
    monkeypatch.setattr(os, "times", lambda: (0.0,) * 5)
    proc(mine=10, theirs=20, elsewhere=3, idle=100)
    before = busy.read([77, 99_999_999])
    assert (before.used, before.own, before.known) == (30, 10, 230)
    proc(mine=11, theirs=20.5, elsewhere=90, idle=101)
    after = busy.read([77])
    changed = Reading(before.clock + 1.0, after.used, after.own, after.known)
    assert busy.others_share(before, changed, 2) == pytest.approx(0.25)
    unknown = Reading(before.clock + 1.0, after.used, before.own, after.known)
    assert busy.others_share(before, unknown, 2) == pytest.approx(0.75), "of a process that is not ours"


def test_a_look_at_a_busy_and_at_a_quiet_machine(proc):
    proc(mine=10, theirs=20, elsewhere=3, idle=100)

    def later(theirs: float, seconds: float):
        def pause(asked: float) -> None:
            proc(mine=10, theirs=theirs, elsewhere=60, idle=103)
            until = busy.time.monotonic() + seconds
            while busy.time.monotonic() < until:
                pass

        return pause

    assert busy.share_now(later(theirs=200, seconds=0.05)) == 1.0
    proc(mine=10, theirs=20, elsewhere=3, idle=100)
    assert busy.share_now(later(theirs=20, seconds=0.05)) == 0.0


def test_without_proc_the_load_average_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(busy, "_PROC", tmp_path)
    monkeypatch.setattr(busy, "allowed_cores", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(os, "getloadavg", lambda: (1.0, 9.0, 9.0))
    assert busy.read() is None
    assert busy.share_now(lambda seconds: None) == 0.25


def test_children_that_have_ended_are_still_our_own():
    if busy.read() is None:
        pytest.skip("this system has no /proc/stat")
    code = "import time\nwhile time.process_time() < 0.5: pass"
    before = busy.read()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert busy.read().own - before.own >= 0.45
