"""Checkpoints: what is written is read, and anything else is refused in one line."""

from __future__ import annotations

import json

import earlier
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kaleido_fast import InputError, ModelCard, ModelSpec, Scaling, load_checkpoint, save_checkpoint
from kaleido_fast.checkpoint import ENTRY
from kaleido_fast.system.sealed import checksum_of

SHARED_TMP = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rewrite(path, *, tensors=None, **replaced):
    """Write a checkpoint with parts replaced, with a checksum that fits."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = {**json.loads(file.metadata()[ENTRY]), **replaced}
    weights = load_file(path) if tensors is None else tensors
    header["checksum"] = checksum_of(header["spec"] + header["card"], weights)
    save_file(weights, path, {ENTRY: json.dumps(header)})


def test_round_trip(small_model, tmp_path):
    card = ModelCard("x", {"steps": 3}, {"name": "d"}, Scaling(2.0, -1.0), 0.25, {"rho": 0.5}, {"burn_in": 7})
    digest = save_checkpoint(tmp_path / "m.safetensors", small_model, card)
    back = load_checkpoint(tmp_path / "m.safetensors")
    assert back.card == card
    assert back.model_hash == digest
    assert back.model.spec == small_model.spec
    for name, tensor in small_model.state_dict().items():
        assert torch.equal(tensor, back.model.state_dict()[name])


def test_same_model_same_bytes(small_model, tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_checkpoint(tmp_path / name, small_model, ModelCard())
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_weights_in_fp16_are_read_as_the_fp32_that_they_are(small_model, tmp_path):
    """Written once they are as stored; written again they stay so."""
    card = ModelCard("half", {"weights": "fp16"})
    digest = save_checkpoint(tmp_path / "m.safetensors", small_model, card)
    back = load_checkpoint(tmp_path / "m.safetensors")
    assert back.card == card and back.model_hash == digest
    for name, tensor in small_model.state_dict().items():
        assert torch.equal(tensor.half().float(), back.model.state_dict()[name]), name
    assert {tensor.dtype for tensor in load_file(tmp_path / "m.safetensors").values()} == {torch.float16}
    assert save_checkpoint(tmp_path / "again.safetensors", back.model, back.card) == digest
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


def test_weights_that_fp16_cannot_hold_are_refused(small_model, tmp_path):
    with torch.no_grad():
        small_model.linears[1].weight[0, 0] = 7e4
    with pytest.raises(InputError, match=r"layers\.1\.weight has values above 65504") as caught:
        save_checkpoint(tmp_path / "m.safetensors", small_model, ModelCard("large", {"weights": "fp16"}))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    save_checkpoint(tmp_path / "m.safetensors", small_model, ModelCard("large", {"weights": "fp32"}))
    with pytest.raises(InputError, match="fp61"):
        save_checkpoint(tmp_path / "n.safetensors", small_model, ModelCard("misspelt", {"weights": "fp61"}))


def mutate(data: bytes, kind: str, place: float, value: int) -> bytes:
    at = int(place * (len(data) - 1))
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (value or 1)]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    return data[:at] + bytes([value]) * 3 + data[at:]


def check_mutation(checkpoint, tmp_path, kind, place, value):
    original = load_checkpoint(checkpoint)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(mutate(checkpoint.read_bytes(), kind, place, value))
    try:
        read = load_checkpoint(damaged)
    except InputError as problem:
        assert "\n" not in str(problem)
    else:
        assert read.model_hash == original.model_hash
        assert read.card == original.card


MUTATIONS = {
    "kind": st.sampled_from(["flip", "flip", "cut", "insert"]),
    "place": st.one_of(st.floats(0, 1), st.floats(0, 0.3)),
    "value": st.integers(0, 255),
}


@SHARED_TMP
@given(**MUTATIONS)
def test_a_damaged_file_reads_right_or_gives_one_line(small_checkpoint, tmp_path, kind, place, value):
    check_mutation(small_checkpoint, tmp_path, kind, place, value)


@pytest.mark.slow
@settings(SHARED_TMP, max_examples=2500)
@given(**MUTATIONS)
def test_a_damaged_file_reads_right_or_gives_one_line_2500_times(small_checkpoint, tmp_path, kind, place, value):
    check_mutation(small_checkpoint, tmp_path, kind, place, value)


def test_unknown_version_format_and_fields_are_refused_by_name(small_checkpoint):
    rewrite(small_checkpoint, version="9")
    with pytest.raises(InputError, match="version '9'"):
        load_checkpoint(small_checkpoint)
    rewrite(small_checkpoint, version="1", card=json.dumps({"moon": 1}))
    with pytest.raises(InputError, match="moon"):
        load_checkpoint(small_checkpoint)
    rewrite(small_checkpoint, card="{}", spec=ModelSpec((6, 6)).to_json())
    with pytest.raises(InputError, match=r"layers\.0\.bias has shape|layers\.0\.weight has shape"):
        load_checkpoint(small_checkpoint)


def test_shapes_that_do_not_fit_the_specification_are_named(small_checkpoint):
    tensors = load_file(small_checkpoint)
    tensors["layers.1.weight"] = torch.zeros(13, 12)
    rewrite(small_checkpoint, tensors=tensors)
    with pytest.raises(InputError, match=r"layers\.1\.weight has shape \(13, 12\), the specification says \(13, 11\)"):
        load_checkpoint(small_checkpoint)
    del tensors["layers.1.weight"]
    rewrite(small_checkpoint, tensors=tensors)
    with pytest.raises(InputError, match=r"layers\.1\.weight has shape None"):
        load_checkpoint(small_checkpoint)


def test_nan_weights_are_refused_on_both_ways(small_model, small_checkpoint, tmp_path):
    tensors = load_file(small_checkpoint)
    tensors["layers.0.bias"][3] = torch.nan
    rewrite(small_checkpoint, tensors=tensors)
    with pytest.raises(InputError, match=r"layers\.0\.bias holds 1 NaN"):
        load_checkpoint(small_checkpoint)
    with torch.no_grad():
        small_model.layers[0].bias[0] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        save_checkpoint(tmp_path / "new.safetensors", small_model, ModelCard())
    assert not (tmp_path / "new.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("missing.safetensors", "does not exist"),
        ("digts", "did you mean 'digits'"),
        ("cifar", "train --preset cifar"),
        (".", "is a folder"),
    ],
)
def test_sources_that_are_not_there(name, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=text):
        load_checkpoint(name)


def test_foreign_files_are_refused(tmp_path):
    for content in (b"", b"PK\x03\x04", b"\x80\x04\x95", b"\xff" * 100):
        path = tmp_path / "foreign.safetensors"
        path.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as safetensors"):
            load_checkpoint(path)
    save_file({"w": torch.ones(3)}, tmp_path / "bare.safetensors")
    with pytest.raises(InputError, match="not written by kaleido-fast"):
        load_checkpoint(tmp_path / "bare.safetensors")


def test_checkpoints_of_an_earlier_version_are_read_as_they_were(tmp_path):
    hashes = earlier.unpack(tmp_path)["hashes"]
    soft, sharp = (load_checkpoint(tmp_path / f"{name}.safetensors") for name in ("soft", "sharp"))
    assert {"soft": soft.model_hash, "sharp": sharp.model_hash} == hashes
    assert (soft.card, sharp.card) == (earlier.CARD, ModelCard("sharp"))
    for found, made in ((soft.model, earlier.soft_network()), (sharp.model, earlier.sharp_network())):
        assert found.spec == made.spec
        for name, tensor in made.state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor), name
