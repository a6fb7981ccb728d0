"""The picture of samples between two seeds in a report."""

from __future__ import annotations

import pytest
import torch
from conftest import random_mlp
from PIL import Image

from kaleido_fast import Dataset, ModelCard, load_checkpoint, save_checkpoint
from kaleido_fast.reproducing.between import show_between
from kaleido_fast.reproducing.images import ShownModel
from kaleido_fast.reproducing.report import Report
from kaleido_fast.reproducing.settings import Settings
from kaleido_fast.showing.animation import strip
from kaleido_fast.showing.between import sample_between


@pytest.mark.parametrize(
    ("recommended", "sampling"),
    [
        ({"sampler": "flow", "steps": 4}, {}),
        ({"burn_in": 4}, {}),
        ({"sampler": "flow"}, {"sampler": "flow", "steps": 3}),
    ],
)
def test_a_flow_is_shown_between_two_seeds_and_a_kaleidoscope_is_not(tmp_path, recommended, sampling):
    model = random_mlp(20, 9, 20, sample_shape=(4, 5))
    save_checkpoint(tmp_path / "m.safetensors", model, ModelCard("m", sampling=recommended))
    checkpoint = load_checkpoint(tmp_path / "m.safetensors")
    report = Report("m", "M", tmp_path)
    shown = ShownModel("M", checkpoint, Dataset("none", torch.zeros(1, 20)), sampling)
    show_between(Settings(seed=2**64 - 1), report, shown, "m")
    if "sampler" not in recommended:
        assert not report.written
        return
    (path,) = report.written
    want = sample_between(checkpoint, seeds=(2**64 - 1, 0), n_chains=10, n_frames=13, **sampling)
    assert Image.open(path).tobytes() == strip(want).tobytes()
