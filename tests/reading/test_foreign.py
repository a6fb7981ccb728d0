"""Files of other programs are named with what to do."""

from __future__ import annotations

import gzip
import pickle
import zipfile

import numpy as np
import torch
from example_data import refused

from kaleido_fast import KaleidoMLP, ModelCard, ModelSpec, save_checkpoint


def test_files_of_other_programs_are_named(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "x.pt")
    torch.save(torch.zeros(3), tmp_path / "unknown")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(np.zeros(3)))
    save_checkpoint(tmp_path / "m.safetensors", KaleidoMLP(ModelSpec((3, 3))), ModelCard())
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", b"")
    others = {
        "x.h5": b"\x89HDF\r\n\x1a\n",
        "x.mat": b"MATLAB 5.0",
        "x.parquet": b"PAR1",
        "x.json": b'{"a": 1}',
        "x.mp4": b"\0\0\0\x18ftypmp42",
        "x.heic": b"\0\0\0\x18ftypheic",
        "x.tar": bytes(257) + b"ustar",
        "x.npy.xz": b"\xfd7zXZ\0",
        "x.csv.gz": gzip.compress(b"1,2\n"),
        "x.svg": b"<svg>",
    }
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    kinds = {
        "x.pt": "torch.save",
        "unknown": "torch.save",
        "x.pkl": "a pickle, which can run code",
        "m.safetensors": "safetensors.numpy",
        "x.zip": "unpack it first",
        "x.h5": "HDF5",
        "x.mat": "MATLAB",
        "x.parquet": "Parquet",
        "x.json": "JSON",
        "x.mp4": "film",
        "x.heic": "HEIC",
        "x.tar": "tar archive",
        "x.npy.xz": "compressed by xz",
        "x.csv.gz": "unpack it first",
        "x.svg": "SVG",
    }
    for name, part in kinds.items():
        refused(tmp_path / name, name, part)
