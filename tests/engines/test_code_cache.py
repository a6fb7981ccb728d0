"""Compiled loops on disk: whatever is wrong with them costs a compilation and is said once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from kaleido_fast.engines import available
from kaleido_fast.engines.available import plan_here
from kaleido_fast.engines.code_cache import DIGEST, CodeCache, code_folders
from kaleido_fast.engines.loops import choice, steps
from kaleido_fast.errors import InputError
from kaleido_fast.planning.request import SampleRequest
from kaleido_fast.reproducing.models import cache_folder
from kaleido_fast.storing.sample_to import sample_to
from kaleido_fast.system.devices import device_facts, resolve_device
from kaleido_fast.system.files import atomic_path
from kaleido_fast.system.folders import user_cache

from conftest import random_mlp  # isort: skip

numba = pytest.importorskip("numba")


def twice(x):
    return 2 * x


class Process:
    """What one process sees: a dispatcher of its own for `twice`."""

    def __init__(self, *folders: Path) -> None:
        self.dispatcher = numba.njit(twice)
        self.dispatcher._cache = CodeCache(twice, lambda: list(folders))

    def call(self, x=21) -> list[str]:
        """Compute with it; the texts of all warnings."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert self.dispatcher(x) == 2 * x
        return [str(warning.message) for warning in caught]

    @property
    def compiled(self) -> int:
        """How often it had to compile."""
        return sum(self.dispatcher.stats.cache_misses.values())


@pytest.fixture
def kept(tmp_path):
    """The file of one compiled version."""
    first = Process(tmp_path)
    assert first.call() == [] and first.compiled == 1
    (path,) = tmp_path.iterdir()
    second = Process(tmp_path)
    assert second.call() == [] and second.compiled == 0
    return path


def flip(content: bytes) -> bytes:
    return content[:-100] + bytes([content[-100] ^ 4]) + content[-99:]


@pytest.mark.parametrize(
    "damage",
    [lambda c: b"", lambda c: c[:10], lambda c: c[: 2 * DIGEST], lambda c: c[:-1], lambda c: c + b"0", flip],
    ids=["empty", "stub", "no code", "truncated", "longer", "one bit"],
)
def test_damaged_code_is_compiled_anew_said_once_and_mended(kept, damage):
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    process = Process(kept.parent)
    (said,) = process.call() + process.call(2.5)  # a second type finds the same folder
    assert str(kept) in said and "damaged" in said
    after = Process(kept.parent)
    assert after.call() == [] and after.compiled == 0, "the file was not mended"


def test_code_of_other_sources_is_replaced_in_silence(kept):
    content = kept.read_bytes()
    kept.write_bytes(bytes(DIGEST) + content[DIGEST:])
    process = Process(kept.parent)
    assert process.call() == [] and process.compiled == 1
    assert kept.read_bytes()[:DIGEST] == content[:DIGEST]


def test_types_settings_and_versions_have_files_of_their_own(kept, monkeypatch):
    assert Process(kept.parent).call(0.5) == []
    monkeypatch.setattr(numba.config, "BOUNDSCHECK", 1)
    assert Process(kept.parent).call() == []
    monkeypatch.setattr(numba, "__version__", "another")
    assert Process(kept.parent).call() == []
    assert len(list(kept.parent.iterdir())) == 4


def test_code_is_read_from_a_folder_that_cannot_be_written_and_kept_in_the_next(kept, tmp_path, monkeypatch):
    """As in an image that was prepared by its builder and is run by somebody else."""
    monkeypatch.setattr(
        "kaleido_fast.engines.code_cache.atomic_path",
        lambda path: refuse(path) if path.parent == kept.parent else atomic_path(path),
    )
    reader = Process(kept.parent, tmp_path / "mine")
    assert reader.call() == [] and reader.compiled == 0
    assert reader.call(0.5) == [] and len(list((tmp_path / "mine").iterdir())) == 1
    assert Process(kept.parent).call(0.5)[0].startswith("compiled code is not kept"), "no second folder"


def refuse(path: Path):
    raise InputError(f"cannot write {path}: no space left there")


@pytest.mark.parametrize("blocked", ["a file", "no folder at all"])
def test_without_a_place_code_is_compiled_and_that_is_said_once(tmp_path, blocked):
    (tmp_path / "a file").write_text("")
    process = Process(*([tmp_path / "a file" / "code"] if blocked == "a file" else []))
    (said,) = process.call() + process.call(0.5)
    assert "not kept" in said and "NUMBA_CACHE_DIR" in said
    assert process.compiled == 2


def test_the_folder_asked_for_is_the_only_one(monkeypatch, tmp_path):
    assert len(code_folders()) >= 1
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert code_folders() == [tmp_path]
    assert isinstance(steps.advance_rows._cache, CodeCache)


def test_without_a_home_nothing_is_made_in_the_current_folder(monkeypatch, tmp_path):
    """A user id without an entry: what stands for the home folder stays ``~``, a name like any other."""
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    assert user_cache() is None
    assert all(folder.is_absolute() for folder in code_folders())
    with pytest.raises(InputError, match=r"no home folder.*--cache"):
        cache_folder()
    assert not list(tmp_path.iterdir())


def plan(**options):
    model = random_mlp(6, 11, 6)
    return plan_here(SampleRequest(n_chains=3, **options), model.spec, device_facts(resolve_device("cpu")), 6)


@pytest.mark.parametrize("problem", ["numba cannot be loaded (Numba needs NumPy 2.2 or less)", "compiles nothing"])
def test_where_numba_does_not_work_auto_takes_the_reference_and_says_why(monkeypatch, problem):
    monkeypatch.setattr(available, "_load_loops", lambda: (None, problem))
    assert plan().engine == "reference"
    assert problem in plan().reason
    with pytest.raises(InputError, match="engine 'cpu' cannot run this: " + problem[:20]):
        plan(engine="cpu")


@pytest.mark.parametrize("options", [{}, {"engine": "cpu"}, {"engine": "reference"}, {"precision": "fp64"}])
def test_a_plan_is_made_once_and_loads_numba_only_for_its_engine(monkeypatch, options):
    made, loaded = [], []
    make, load = available.make_plan, available._load_loops
    monkeypatch.setattr(available, "make_plan", lambda *args, **given: made.append(1) or make(*args, **given))
    monkeypatch.setattr(available, "_load_loops", lambda: loaded.append(1) or load())
    engine = plan(**options).engine
    assert made == [1]
    assert bool(loaded) == (engine == "cpu")


def test_a_store_is_not_continued_where_products_round_otherwise(monkeypatch, tmp_path):
    """A processor without fused multiply-add, or numba told to compile for one."""
    model = random_mlp(6, 9, 6)
    path, options = tmp_path / "a.npy", {"n_chains": 20, "burn_in": 2, "engine": "cpu", "device": "cpu"}
    sample_to(path, model, **options)
    assert "arithmetic" not in json.loads(path.with_suffix(".json").read_text())
    monkeypatch.setattr(choice, "fuses", lambda: False)
    with pytest.raises(InputError, match="arithmetic was None, is now products are rounded before"):
        sample_to(path, model, **options)


def test_a_store_of_the_reference_is_not_continued_with_other_instructions(monkeypatch, tmp_path):
    """A store that an earlier version began says nothing of them, and is continued."""
    model = random_mlp(6, 9, 6)
    path, options = tmp_path / "a.npy", {"n_chains": 20, "burn_in": 2, "engine": "reference", "device": "cpu"}
    sample_to(path, model, **options)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SOMETHING ELSE")
    with pytest.raises(InputError, match=r"arithmetic was torch's kernels for .*, is now .* SOMETHING ELSE"):
        sample_to(path, model, **options)
    record = path.with_suffix(".json")
    content = json.loads(record.read_text())
    del content["arithmetic"]
    record.write_text(json.dumps(content))
    sample_to(path, model, **options)


TOLD = """
import numba
from kaleido_fast import InputError, fast_sample
from conftest import random_mlp

model = random_mlp(6, 9, 6)
result = fast_sample(model, n_chains=9, burn_in=2)
print(result.plan.engine, "|", result.plan.reason)
try:
    fast_sample(model, n_chains=9, burn_in=2, engine="cpu")
except InputError as problem:
    print(problem)
print(numba.config.DISABLE_JIT)
"""


def test_numba_without_its_compiler_means_the_reference_engine(tmp_path):
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", TOLD], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    first, refused, _ = result.stdout.splitlines()
    assert first.startswith("reference | cpu cannot run this: numba compiles nothing in this process")
    assert "NUMBA_DISABLE_JIT" in first and "engine='reference'" in refused
