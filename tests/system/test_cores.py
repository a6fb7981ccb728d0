"""The number of useful threads: torch's, the cores that the process may use, and the share that a container has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from kaleido_fast.system import cores
from kaleido_fast.system.cores import cores_at_hand, processor_share, useful_threads


def faked(root: Path, groups: str, **files: str) -> Path:
    """A root folder with ``/proc/self/cgroup`` and files of control groups (``__`` for ``/`` in their names)."""
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        path = root / (name if name.startswith("proc") else "sys/fs/cgroup/" + name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "share"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3.0),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "300000 100000\n"}, 3.0),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000\n", "a/cpu.max": "300000 100000\n"}, 0.5),
        ("0::/outside/of/it\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/../../above\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/a\n", {"unified/a/cpu.max": "200000 100000\n"}, 2.0),
        ("3:cpuset:/\n2:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "250000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 2.5),
        ("2:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        (
            "4:cpu,cpuacct:/docker/x\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "100000\n", "cpu,cpuacct/cpu.cfs_period_us": "50000\n"},
            2.0,
        ),
        ("2:memory:/a\n", {"memory/a/cpu.max": "100000 100000\n"}, None),
        ("0::/\n", {"cpu.max": "100000 0\n"}, None),
        ("0::/\n", {"cpu.max": "nonsense\n"}, None),
        ("nonsense\n", {"cpu.max": ""}, None),
    ],
    ids=str,
)
def test_the_share_that_control_groups_allow(tmp_path, groups, files, share):
    assert processor_share(faked(tmp_path, groups, **files)) == share


def test_no_control_groups_are_no_limit(tmp_path):
    assert processor_share(tmp_path) is None


@pytest.mark.parametrize(
    ("torch_has", "mask", "share", "useful"),
    [
        (8, 8, None, 8),
        (1, 8, None, 1),  # what the program set is the upper limit
        (16, 2, None, 2),
        (8, 8, 2.0, 2),
        (8, 8, 1.5, 2),
        (8, 8, 0.2, 1),
        (4, 2, 6.0, 2),
        (3, 8, 6.0, 3),
    ],
)
def test_the_least_of_the_three_counts(monkeypatch, torch_has, mask, share, useful):
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_has)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(mask)), raising=False)
    monkeypatch.setattr(cores, "_share_of_this_process", lambda: share)
    assert useful_threads() == useful


def test_what_the_program_sets_is_never_exceeded():
    before = torch.get_num_threads()
    try:
        for number in (1, 2, 64):
            torch.set_num_threads(number)
            assert 1 <= useful_threads() <= number
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="masks of this system cannot be set")
def test_a_mask_that_is_set_later_counts():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cores_at_hand() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert cores_at_hand() <= len(before)


def test_systems_without_masks_count_their_cores(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(cores, "_share_of_this_process", lambda: None)
    assert cores_at_hand() == 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores_at_hand() == 1
