"""``kaleido-fast join``: the bytes of one run, interruptions, damage, and parts that do not fit."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import call, random_mlp
from folders import contents

from kaleido_fast import InputError, ModelCard, fast_sample, open_draws, sample_to, save_checkpoint
from kaleido_fast.errors import StreamInterruptedError
from kaleido_fast.storing.joining import join_stores
from kaleido_fast.storing.layout import ARRAYS
from kaleido_fast.storing.zarr_output import ZarrOutput

pytest.importorskip("zarr")

MODEL = random_mlp(3, 5, 3)
RUN: dict[str, Any] = {"burn_in": 1, "chunk_chains": 4096, "seed": 3, "device": "cpu"}
SIZES = (4096 * 2, 4096 + 10, 500)
ALL_CHAINS = 4096 * 5 + 77


@pytest.fixture
def parts(tmp_path) -> list[Path]:
    """Three stores of neighbouring chains, the first one of chain 1000."""
    first, paths = 1000, []
    for i, n_chains in enumerate(SIZES):
        paths.append(tmp_path / f"part{i}.zarr")
        sample_to(paths[-1], MODEL, **RUN, n_chains=n_chains, first_chain=first)
        first += n_chains
    return paths


def join(monkeypatch, capsys, *args: object) -> tuple[int, str, str]:
    return call(monkeypatch, capsys, "join", *args)


def test_the_command_joins_and_says_what(parts, tmp_path, monkeypatch, capsys):
    out = tmp_path / "all.zarr"
    status, said, _ = join(monkeypatch, capsys, out, *parts)
    assert (status, said) == (0, f"{out} holds {sum(SIZES):,} chains of 3 stores, in 4 chunks\n")
    want = fast_sample(MODEL, n_chains=sum(SIZES), first_chain=1000, burn_in=1, seed=3, device="cpu")
    draws = open_draws(out)
    assert torch.equal(draws[:], want.draws)
    assert torch.equal(torch.from_numpy(draws.per_chain("residual")), want.residual)
    assert draws.record["request"]["first_chain"] == 1000
    assert sample_to(out, MODEL, **RUN, n_chains=sum(SIZES), first_chain=1000).stats is None, "as of one run"


@pytest.mark.parametrize(("number", "what"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_an_interrupted_join_goes_on(parts, tmp_path, number, what):
    def stop(done: int, total: int) -> None:
        if done == 2:
            os.kill(os.getpid(), number)

    with pytest.raises(StreamInterruptedError, match=rf"{what}: 2 of 4 chunks are in .*all.zarr; the same") as caught:
        join_stores(tmp_path / "all.zarr", parts, callback=stop)
    assert caught.value.terminated is (number == signal.SIGTERM)
    steps: list[tuple[int, int]] = []
    join_stores(tmp_path / "all.zarr", parts, callback=lambda done, total: steps.append((done, total)))
    assert steps == [(3, 4), (4, 4)], "nothing is joined twice"
    join_stores(tmp_path / "whole.zarr", parts)
    assert contents(tmp_path / "all.zarr") == contents(tmp_path / "whole.zarr")


def test_a_damaged_part_is_named_and_can_be_repaired(parts, tmp_path, monkeypatch, capsys):
    chunk = parts[1] / "draws" / "c.1.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-5])
    status, _, errors = join(monkeypatch, capsys, tmp_path / "all.zarr", *parts, "--quiet")
    assert (status, errors.count("\n")) == (2, 1)
    assert f"{parts[1]}: chunk draws/c.1.0.0 of block 1 is damaged" in errors
    sample_to(parts[1], MODEL, **RUN, n_chains=SIZES[1], first_chain=1000 + SIZES[0], repair=True)
    assert join(monkeypatch, capsys, tmp_path / "all.zarr", *parts, "--quiet")[0] == 0
    assert len(open_draws(tmp_path / "all.zarr")[:]) == sum(SIZES)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("all.npy", "part0.zarr"), "whose name ends in .zarr"),
        (("all.zarr",), "Missing argument 'PARTS...'"),
        (("all.zarr", "part0.zarr", "part2.zarr"), "leave a gap"),
        (("all.zarr", "part0.zarr", "part0.zarr"), "overlap"),
        (("all.zarr", "part0.zarr", "gone.zarr"), "gone.zarr does not exist"),
        (("all.zarr", "part0.zarr", "samples.npy"), "samples.npy is a file"),
        (("part1.zarr", "part0.zarr", "part1.zarr"), "part1.zarr is read by this run (part 2)"),
        (
            ("part2.zarr", "part0.zarr", "part1.zarr"),
            "belongs to another run: request.first_chain was 13298, is now 1000",
        ),
        (
            ("file.zarr", "part0.zarr", "part1.zarr", "--overwrite"),
            "was not written by kaleido-fast and stays as it is",
        ),
        (("nowhere/all.zarr", "part0.zarr"), "nowhere does not exist"),
    ],
)
def test_what_does_not_fit_is_one_line_and_touches_nothing(parts, tmp_path, monkeypatch, capsys, args, text):
    monkeypatch.chdir(tmp_path)
    for name in ("samples.npy", "file.zarr"):
        Path(name).write_text("mine")
    before = contents(tmp_path)
    status, out, errors = join(monkeypatch, capsys, *args)
    assert (status, out, errors.count("\n")) == (2, "", 1), errors
    assert text in errors
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "cut", [[4096 * 2, 4096 * 3 + 77], pytest.param([100, 4096, ALL_CHAINS - 4196], marks=pytest.mark.slow)]
)
def test_jobs_of_an_array_join_to_one_run(tmp_path, cut):
    save_checkpoint(tmp_path / "m.safetensors", MODEL, ModelCard("m", sampling={"burn_in": 1}))
    sample_to(tmp_path / "one.zarr", tmp_path / "m.safetensors", n_chains=ALL_CHAINS, **RUN)
    parts, first = [], 0
    for i, n_chains in enumerate(cut):
        parts.append(tmp_path / f"{i}.zarr")
        options = {**RUN, "n_chains": n_chains, "first_chain": first}
        sample_to(parts[-1], tmp_path / "m.safetensors", **options)
        first += n_chains
    output = join_stores(tmp_path / "all.zarr", parts[::-1])
    if cut[0] == 4096 * 2:
        assert contents(tmp_path / "all.zarr") == contents(tmp_path / "one.zarr")
    assert output.layout.n_chains == ALL_CHAINS
    before = contents(tmp_path / "all.zarr")
    (tmp_path / "all.zarr" / "blocks" / "c.1.0").unlink()
    join_stores(tmp_path / "all.zarr", parts)
    assert contents(tmp_path / "all.zarr") == before
    with pytest.raises(InputError, match="overlap"):
        join_stores(tmp_path / "b.zarr", [*parts, parts[0]])
    with pytest.raises(InputError, match="is read by this run"):
        join_stores(parts[0], parts)
    if len(parts) > 2:
        with pytest.raises(InputError, match="leave a gap"):
            join_stores(tmp_path / "b.zarr", [parts[0], parts[2]])
    sample_to(tmp_path / "x.zarr", tmp_path / "m.safetensors", **{**RUN, "seed": 4}, n_chains=9, first_chain=first)
    with pytest.raises(InputError, match=r"different runs: request.seed was 3, is now 4"):
        join_stores(tmp_path / "b.zarr", [*parts, tmp_path / "x.zarr"])
    (parts[0] / "blocks" / "c.0.0").unlink()
    with pytest.raises(InputError, match="is unfinished: 1 blocks"):
        join_stores(tmp_path / "b.zarr", parts)
    assert not (tmp_path / "b.zarr").exists()


def with_record(part: Path, path: Path, **changed: Any) -> Path:
    """A store with the same draws and another record."""
    source = ZarrOutput.open(part)
    copy = ZarrOutput.create(path, source.layout, {**source.record, **changed})
    for block in range(source.layout.n_blocks):
        copy.write(block, {name: source.read(name, block) for name in ARRAYS})
    return path


def test_parts_of_different_kernels_do_not_join_beside_one_that_names_none(parts, tmp_path):
    """An earlier version recorded a kernel in words, which may be any."""
    narrow, wide = ({"kernels": {"from step 0": {"kernel": kernel}}} for kernel in ("narrow", "wide"))
    old = {"kernel": "narrow 64 chains"}
    for i, records in enumerate(([old, narrow, wide], [narrow, old, wide], [narrow, wide, old])):
        changed = [
            with_record(part, tmp_path / f"{i}{j}.zarr", **record)
            for j, (part, record) in enumerate(zip(parts, records, strict=True))
        ]
        with pytest.raises(InputError, match=r"different runs: kernels\.from step 0\.kernel was narrow, is now wide"):
            join_stores(tmp_path / "all.zarr", changed)
    same = [with_record(parts[0], tmp_path / "a.zarr", **old)]
    same += [with_record(part, tmp_path / f"{part.stem}b.zarr", **narrow) for part in parts[1:]]
    assert join_stores(tmp_path / "all.zarr", same).layout.n_chains == sum(SIZES)
