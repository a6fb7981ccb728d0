"""Files of examples, as bytes."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image

from kaleido_fast.reading.readers import IDX_TYPES


def images_of(n: int = 7, height: int = 5, width: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, height, width), dtype=np.uint8)


def idx_bytes(array: np.ndarray) -> bytes:
    code = {np.dtype(text): code for code, text in IDX_TYPES.items()}[array.dtype.newbyteorder(">")]
    return (
        struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
        + array.astype(array.dtype.newbyteorder(">")).tobytes()
    )


def npy_bytes(array: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def npz_bytes(compressed: bool = True, **arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    save = np.savez_compressed if compressed else np.savez
    save(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


def png_bytes(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def tiff_bytes(pages: np.ndarray) -> bytes:
    stream = io.BytesIO()
    first, *rest = (Image.fromarray(page) for page in pages)
    first.save(stream, "TIFF", save_all=True, append_images=rest)
    return stream.getvalue()
