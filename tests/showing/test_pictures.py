"""Sheets of samples: every sample in its cell, in raw values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from kaleido_fast import InputError, ModelSpec, Scaling
from kaleido_fast.showing.pictures import image_grid, save_picture, to_bytes


def test_scaling_is_undone_when_pictures_are_drawn():
    spec = ModelSpec((4, 2, 4), sample_shape=(2, 2))
    scaling = Scaling(2 / 255, -1.0)
    raw = torch.tensor([[0.0, 17.0, 128.0, 255.0]])
    assert torch.equal(to_bytes(scaling.apply(raw), spec, scaling).flatten(), raw.flatten().to(torch.uint8))


@pytest.mark.parametrize("shape", [(8, 8), (4, 3, 3)])
def test_grid_shows_each_sample_in_its_cell(shape, tmp_path):
    n = 7
    spec = ModelSpec((int(np.prod(shape)), 2, int(np.prod(shape))), sample_shape=shape)
    samples = torch.rand(n, spec.dim) * 2 - 1
    image = image_grid(samples, spec, Scaling(), columns=3)
    save_picture(image, tmp_path / "sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    factor = 24 // max(shape[:2])
    want = to_bytes(samples, spec, Scaling()).numpy()
    for i in range(n):
        top, left = (i // 3) * (shape[0] + 1) * factor, (i % 3) * (shape[1] + 1) * factor
        cell = pixels[top : top + shape[0] * factor : factor, left : left + shape[1] * factor : factor]
        assert np.array_equal(cell, want[i]), f"sample {i} is not in its cell"


def test_what_cannot_be_drawn_is_named():
    spec = ModelSpec((4, 2, 4))
    with pytest.raises(InputError, match="are not pictures"):
        image_grid(torch.zeros(2, 4), spec, Scaling())
    square = ModelSpec((4, 2, 4), sample_shape=(2, 2))
    with pytest.raises(InputError, match="hold NaN"):
        image_grid(torch.full((2, 4), torch.nan), square, Scaling())
    with pytest.raises(InputError, match="no samples"):
        image_grid(torch.zeros(0, 4), square, Scaling())
    with pytest.raises(InputError, match="do not belong together"):
        image_grid(torch.zeros(2, 5), square, Scaling())


def test_a_sheet_is_no_wider_than_its_samples():
    """Columns without samples would be grey, and ask for memory in proportion."""
    spec = ModelSpec((4, 4), sample_shape=(2, 2))
    samples = torch.zeros(3, 4)
    sheets = [image_grid(samples, spec, Scaling(), columns=columns) for columns in (3, 10**9)]
    assert sheets[0].size == sheets[1].size
