"""Sealed files: what is written is read, and the checksum tells apart all that differs."""

from __future__ import annotations

import itertools

import pytest
import torch

from kaleido_fast import InputError
from kaleido_fast.system.sealed import UNREADABLE, checksum_of, read_sealed, write_sealed

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor(1.5),
    "c": torch.zeros(0, 3),
    "d": torch.ones(2, dtype=torch.bfloat16),
}


def test_what_is_written_is_read_with_the_same_checksum(tmp_path):
    checksum = checksum_of("text", TENSORS)
    write_sealed(tmp_path / "a", "entry", "1", {"text": "text"}, TENSORS, checksum)
    metadata, tensors = read_sealed(tmp_path / "a")
    assert metadata == {"entry": f'{{"checksum": "{checksum}", "text": "text", "version": "1"}}'}
    assert checksum_of("text", tensors) == checksum
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_checksum_tells_names_shapes_types_values_and_texts_apart():
    one = torch.tensor([1.0, 2.0])
    contents = [("", {"a": one}), ("x", {"a": one}), ("", {"b": one}), ("", {"a": one.reshape(2, 1)})]
    contents += [("", {"a": one.flip(0)}), ("", {"a": one.view(torch.int32)}), ("", {"a": one, "b": one}), ("", {})]
    for left, right in itertools.combinations(contents, 2):
        assert checksum_of(*left) != checksum_of(*right), (left, right)
    assert checksum_of("", {"a": torch.stack([one, one], dim=1)[:, 0]}) == checksum_of("", {"a": one}), "strides"


def test_files_that_cannot_be_read_or_written_are_errors(tmp_path):
    (tmp_path / "torn").write_bytes(b"torn")
    for name in ("torn", "missing"):
        with pytest.raises(UNREADABLE):
            read_sealed(tmp_path / name)
    with pytest.raises(InputError, match="nowhere"):
        write_sealed(tmp_path / "nowhere" / "a", "entry", "1", {}, TENSORS, "")
