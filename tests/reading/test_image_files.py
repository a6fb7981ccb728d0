"""Pictures are read as people see them, alone and in folders."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from example_data import assert_same, colour, grey, raw_of, read, refused
from PIL import Image, ImageOps


@pytest.mark.parametrize("ending", ["png", "tif", "jpg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_rotation_is_applied_once(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    Image.fromarray(colour()).save(path, exif=exif, **({"lossless": True} if ending == "webp" else {}))
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert upright.shape[:2] == ((9, 12) if orientation < 5 else (12, 9))
    for source in (path, tmp_path):
        assert_same(raw_of(read(source)[0])[0], upright)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
@pytest.mark.parametrize(("background", "rgb"), [("white", (255, 255, 255)), ("black", (0, 0, 0)), ("#204060", None)])
def test_transparency_is_laid_over_the_background(tmp_path, mode, background, rgb):
    rgb = rgb or (0x20, 0x40, 0x60)
    picture = Image.fromarray(np.dstack([colour(), grey(seed=1)]), "RGBA" if mode != "LA" else None).convert("RGBA")
    if mode == "LA":
        picture = Image.merge("LA", (Image.fromarray(grey()), Image.fromarray(grey(seed=1))))
    elif mode in ("P", "PA"):
        picture = picture.quantize(16)
    picture.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as stored:
        shown = np.asarray(stored.convert("RGBA")).astype(float)
    share = shown[..., 3:] / 255
    expected = shown[..., :3] * share + np.array(rgb) * (1 - share)
    data, said = read(tmp_path, background=background)
    found = raw_of(data)[0]
    assert f"transparent: laid over {background}" in said
    if mode == "LA" and len(set(rgb)) == 1:
        assert found.shape == (9, 12)
        found = np.repeat(found[..., None], 3, axis=2)
    assert np.abs(found - expected).max() <= 1, np.unravel_index(np.abs(found - expected).argmax(), found.shape)


def test_opaque_pictures_with_an_alpha_channel_are_not_changed(tmp_path):
    Image.fromarray(np.dstack([colour(), np.full((9, 12), 255, np.uint8)])).save(tmp_path / "a.png")
    data, said = read(tmp_path)
    assert_same(raw_of(data)[0], colour())
    assert said == ""
    refused(tmp_path, "no colour", background="blak")


def test_sixteen_bits_are_kept_where_pillow_has_them(tmp_path):
    values = np.random.default_rng(0).integers(0, 65_536, (9, 12)).astype(np.uint16)
    for ending in ("png", "tif", "pgm"):
        Image.fromarray(values).save(tmp_path / f"a.{ending}")
        data, said = read(tmp_path / f"a.{ending}")
        assert_same(raw_of(data)[0], values)
        assert said == ""
        (tmp_path / f"a.{ending}").unlink()
    Image.fromarray(np.linspace(0, 1, 108, dtype=np.float32).reshape(9, 12)).save(tmp_path / "b.tif")
    assert float(read(tmp_path)[0].data.max()) == 1.0
    Image.fromarray(values).save(tmp_path / "c.png")
    refused(tmp_path, "float32", "uint16", "alike")


def test_sixteen_bits_a_colour_are_shortened_and_said(tmp_path):
    values = np.random.default_rng(0).integers(0, 65_536, (4, 5, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(png)
    data, said = read(tmp_path)
    assert "16 bits a colour" in said
    assert np.abs(raw_of(data)[0] - values / 257.0).max() <= 1


def test_palettes_show_their_colours_and_grey_ones_are_grey(tmp_path):
    Image.fromarray(colour()).quantize(16).save(tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as stored:
        expected = np.asarray(stored.convert("RGB"))
    assert_same(raw_of(read(tmp_path)[0])[0], expected)
    ramp = Image.fromarray(grey()).convert("RGB").quantize(256)
    ramp.save(tmp_path / "a.png")
    both, _ = read(tmp_path)  # a grey one among coloured ones is a coloured one
    assert both.sample_shape == (9, 12, 3)
    assert_same(raw_of(both)[1], expected)
    (tmp_path / "b.png").unlink()
    assert_same(raw_of(read(tmp_path)[0])[0], np.asarray(ramp.convert("L")))


@pytest.mark.parametrize("ending", ["gif", "tif", "webp", "png"])
def test_frames_are_examples_of_a_file_and_said_in_a_folder(tmp_path, ending):
    frames = np.stack([np.full((9, 12), value, np.uint8) for value in (0, 80, 160)])
    first, *rest = [Image.fromarray(frame) for frame in frames]
    lossless = {"lossless": True} if ending == "webp" else {}
    first.save(tmp_path / f"a.{ending}", save_all=True, append_images=rest, **lossless)
    data, said = read(tmp_path / f"a.{ending}")
    assert "3 frames" in said
    assert_same(raw_of(data), frames)
    data, said = read(tmp_path)
    assert "1 of 1 files hold several frames" in said
    assert_same(raw_of(data), frames[:1])


def test_one_picture_is_one_example(tmp_path):
    Image.fromarray(grey()).save(tmp_path / "a.PNG")
    (tmp_path / "a.PNG").rename(tmp_path / "picture")  # by what it holds, not by its name
    for source in (tmp_path / "picture", Image.fromarray(grey()), [Image.fromarray(grey())]):
        assert_same(raw_of(read(source)[0]), grey()[None])


def test_what_pillow_finds_wrong_is_said(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker" * 20
    Image.fromarray(grey()).save(tmp_path / "a.jpg", exif=exif)
    content = bytearray((tmp_path / "a.jpg").read_bytes())
    maker = content.index(b"\x01\x0f\x00\x02")
    content[maker + 8 : maker + 12] = b"\x7f\xff\xff\xff"  # the text is said to lie far behind the end
    (tmp_path / "a.jpg").write_bytes(content)
    said = read(tmp_path)[1]
    assert "1 of 1 pictures may be damaged" in said
    assert "a.jpg" in said


# --- folders


@pytest.mark.parametrize(
    ("folders", "labels", "said"),
    [
        (("0", "1", "10", "2"), (0, 1, 2, 10), ""),
        (("3", "7"), (3, 7), ""),
        (("cat", "dog"), (0, 1), "0 cat, 1 dog"),
        (("1", "01"), (0, 1), "0 01, 1 1"),
    ],
)
def test_class_folders(tmp_path, folders, labels, said):
    for i, name in enumerate(folders):
        (tmp_path / name).mkdir()
        for k in range(i + 1):
            Image.fromarray(grey(seed=10 * i + k)).save(tmp_path / name / f"{k}.png")
    (tmp_path / "empty").mkdir()
    data, told = read(tmp_path)
    assert said in told
    assert bool(said) == bool(told)
    assert data.labels is not None
    assert sorted(set(data.labels.tolist())) == sorted(labels)
    for values, label in zip(raw_of(data), data.labels.tolist(), strict=True):
        name = folders[[str(label) == f for f in folders].index(True)] if not said else sorted(folders)[label]
        i = folders.index(name)
        assert any((values == grey(seed=10 * i + k)).all() for k in range(i + 1)), (label, name)


def test_what_is_left_out_of_a_folder_is_said(tmp_path):
    Image.fromarray(grey()).save(tmp_path / "a.png")
    for name in ("b.heic", "c.heic", "notes.txt", ".hidden", "Thumbs.db"):
        (tmp_path / name).write_text("x")
    (tmp_path / "more").mkdir()
    Image.fromarray(grey()).save(tmp_path / "more" / "a.png")
    said = read(tmp_path)[1]
    assert "2 .heic, 1 .txt, the folder more" in said
    assert "hidden" not in said


def test_folders_without_pictures_say_what_to_do(tmp_path):
    for name in ("train", "val"):
        (tmp_path / "split" / name / "cat").mkdir(parents=True)
        Image.fromarray(grey()).save(tmp_path / "split" / name / "cat" / "a.png")
    refused(tmp_path / "split", "two folders down", str(Path("split") / "train"))
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "x.npy", np.zeros((2, 2)))
    refused(tmp_path / "arrays", "give the path of one file in it", "x.npy")
    (tmp_path / "store.zarr").mkdir()
    (tmp_path / "store.zarr" / "zarr.json").write_text("{}")
    refused(tmp_path / "store.zarr", "zarr store")
