"""Training says what it needs before it takes it."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kaleido_fast import InputError, ModelSpec, load_dataset, train
from kaleido_fast.presets import TrainingRecipe
from kaleido_fast.system.devices import device_facts
from kaleido_fast.training import memory as training_memory
from kaleido_fast.training import trainer
from kaleido_fast.training.memory import TrainingMemory, evaluation_rows

CPU = torch.device("cpu")


def with_free(monkeypatch, n_bytes: int) -> None:
    """A machine with so much memory, on which no training begins."""
    facts = replace(device_facts(CPU), memory=n_bytes)
    monkeypatch.setattr(training_memory, "device_facts", lambda device: facts)

    def begun(*arguments):
        raise AssertionError("the training began")

    monkeypatch.setattr(trainer, "TrainingRun", begun)


def striped(*shape: int) -> np.ndarray:
    """Bytes 0 and 255 in turns."""
    return np.broadcast_to((np.arange(shape[-1]) % 2 * 255).astype(np.uint8), shape)


@pytest.mark.parametrize("saves", [False, True])
def test_refused_with_the_arithmetic_before_anything_is_allocated(monkeypatch, tmp_path, saves):
    photos = load_dataset(striped(3, 600, 580, 3))
    with_free(monkeypatch, 2**33)
    with pytest.raises(InputError) as caught:
        train(photos, state=tmp_path / "x.training" if saves else None)
    text = str(caught.value)
    assert "\n" not in text
    assert "1,044,000 x 512" in text
    copies = 15 if saves else 6
    found = re.search(r"([\d,]+) weights .* x 4 bytes x (\d+) .* = ([\d.]+) GiB, and ([\d.]+) GiB", text)
    assert found, text
    weights, times, product, rest = (float(part.replace(",", "")) for part in found.groups())
    assert times == copies
    assert product == pytest.approx(weights * 4 * copies / 2**30, abs=0.06)
    total = float(text.split("about ")[1].split(" ")[0])
    assert total == pytest.approx(product + rest, abs=0.15)
    advised = re.search(r"to (\d+) x (\d+) or less", text)
    assert advised, text
    width, height = map(int, advised.groups())
    small = load_dataset(striped(3, height, width, 3))
    with pytest.raises(AssertionError, match="the training began"):  # what is advised is accepted
        train(small, state=tmp_path / "x.training" if saves else None)


def test_advice_for_what_is_no_picture(monkeypatch):
    with_free(monkeypatch, 2**28)
    with pytest.raises(InputError, match=r"narrower layers \(--hidden\), a smaller batch"):
        train(striped(3, 100_000) / np.float32(255))


def test_usual_trainings_begin(monkeypatch):
    with_free(monkeypatch, 2**30)
    for shape in ((1000, 28, 28), (1000, 32, 32, 3)):
        with pytest.raises(AssertionError, match="the training began"):
            train(striped(*shape))


@settings(max_examples=50, deadline=None)
@given(
    dim=st.integers(1, 2**20),
    hidden=st.integers(1, 4096),
    batch=st.integers(1, 4096),
    n=st.integers(1, 10_000),
    saves=st.booleans(),
)
def test_more_of_anything_never_needs_less(dim, hidden, batch, n, saves):
    def need(dim: int, hidden: int, batch: int, n: int) -> TrainingMemory:
        recipe = TrainingRecipe(batch_size=batch, held_out=1)
        return TrainingMemory.of(ModelSpec((dim, hidden, hidden, dim)), recipe, n, CPU, saves=saves)

    base = need(dim, hidden, batch, n).on_device(CPU)
    more = [need(dim, 2 * hidden, batch, n), need(dim, hidden, 2 * batch, n), need(dim, hidden, batch, 2 * n)]
    assert all(other.on_device(CPU) >= base for other in more)
    weights = 2 * dim * hidden + hidden * hidden
    assert base >= 5 * 4 * weights


def test_the_measure_looks_at_as_many_examples_as_ever_up_to_large_ones():
    assert {evaluation_rows(dim) for dim in (1, 784, 3072, 65_536)} == {2048}
    assert all(evaluation_rows(dim) * dim <= 2**27 for dim in (65_537, 2**20))
    assert evaluation_rows(2**20) == 128


MEASURE = """
import sys, threading, time, warnings
import numpy as np, torch
warnings.simplefilter("ignore")
from kaleido_fast import ModelSpec, load_dataset, train
from kaleido_fast.presets import TrainingRecipe
from kaleido_fast.training.memory import TrainingMemory
dim, hidden, state = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None
data = load_dataset(np.random.default_rng(0).integers(0, 255, (3, dim), dtype=np.uint8))
train("points1d", spec=ModelSpec((1, 4, 1)), recipe=TrainingRecipe(steps=1))
spec, recipe = ModelSpec((dim, hidden, hidden, dim)), TrainingRecipe(steps=2, batch_size=8)
held = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
before, peak, over = held(), [0], []
def watch():
    while not over:
        peak[0] = max(peak[0], held())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
train(data, spec=spec, recipe=recipe, state=state)
over.append(True)
thread.join()
need = TrainingMemory.of(spec, recipe, 3, torch.device("cpu"), saves=state is not None)
print(need.on_device(torch.device("cpu")), peak[0] - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("dim", "hidden", "saves"), [(10_000, 128, False), (1500, 1500, True)])
def test_the_estimate_is_near_what_is_used(tmp_path, dim, hidden, saves):
    arguments = [str(dim), str(hidden), *([str(tmp_path / "x.training")] if saves else [])]
    run = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
    estimated, measured = map(int, run.stdout.split())
    assert 0.7 < estimated / measured < 1.4, f"{estimated / 2**20:.0f} MiB estimated, {measured / 2**20:.0f} used"
