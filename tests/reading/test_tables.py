"""Tables of numbers, with and without names, labels and an index."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from example_data import QUICK, read, refused
from hypothesis import given
from hypothesis import strategies as st

from kaleido_fast import load_dataset


# A row of spaces cannot have an empty cell, so the index column is drawn for the other marks alone.
@QUICK
@given(
    mark=st.sampled_from([",", ";", "\t", " "]),
    names=st.booleans(),
    label=st.sampled_from([None, 0, 1, 2]),
    index=st.booleans(),
    values=st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=5),
)
def test_tables(tmp_path, mark, names, label, index, values):
    rows = [[repr(a), repr(b)] for a, b in values]
    header = ["a", "b"]
    if names and label is not None:
        for i, row in enumerate([header, *rows]):
            row.insert(label, "Label" if i == 0 else str(i))
    index = index and names and mark != " "
    if index:
        for i, row in enumerate([header, *rows]):
            row.insert(0, "" if i == 0 else str(i))
    lines = [mark.join(row) for row in ([header, *rows] if names else rows)]
    (tmp_path / "x.csv").write_text("\ufeff# made by a test\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    data, said = read(tmp_path / "x.csv")
    assert torch.equal(data.data, torch.tensor(values, dtype=torch.float64).float())
    assert ("index" in said) == index
    assert ("'Label' holds the classes" in said) == (names and label is not None)
    if names and label is not None:
        assert data.labels is not None
        assert data.labels.tolist() == list(range(1, len(values) + 1))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a,b\n1,cat\n", "cat"),
        ("1,2\n3\n", "columns"),
        ("", "no line"),
        ("a,b\n", "no line"),
        ("1,,2\n", "table"),
        ("1;0,5\n", "table"),
        ("0,,0\n1,0,0\n", "names or an example, with ''"),
        ("0 n/a\n1 0\n", "names or an example, with 'n/a'"),
        ("?\n1\n", "names or an example"),
        ("label\n1\n2\n", "at least one"),
        ("0.1,nan\n", "NaN"),
        ("1e999,0\n", "infinite"),
    ],
)
def test_tables_that_are_none(tmp_path, text, part):
    (tmp_path / "x.csv").write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        refused(tmp_path / "x.csv", part)


def test_labels_in_a_table(tmp_path):
    for text in ("label\n1\n2\n", "1\n2\n", ",class\n0,1\n1,2\n"):
        (tmp_path / "y.csv").write_text(text)
        data = load_dataset(np.zeros((2, 3)), labels=tmp_path / "y.csv")
        assert data.labels is not None
        assert data.labels.tolist() == [1, 2]


def test_numbered_columns_beside_named_classes_are_names(tmp_path):
    (tmp_path / "x.csv").write_text(",0,1,class\n0,.5,-.5,3\n1,.25,1,4\n")
    data, _ = read(tmp_path / "x.csv")
    assert data.data.tolist() == [[0.5, -0.5], [0.25, 1.0]]
    assert data.labels is not None
    assert data.labels.tolist() == [3, 4]
