"""How draws are stored: as computed, in fewer bits, or as bytes with a scale."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kaleido_fast.errors import InputError, unknown_name
from kaleido_fast.names import STORED_DTYPES


@dataclass(frozen=True)
class Encoding:
    """Model value = stored value * ``scale`` + ``offset``.

    Args:
        dtype: type of the stored values: "float64" (runs in fp64), "float32", "float16" or "uint8".
        scale, offset: 1 and 0 but for uint8, which spans the model's data range in 255 steps.
    """

    dtype: str = "float32"
    scale: float = 1.0
    offset: float = 0.0

    @classmethod
    def choose(cls, dtype: str | None, data_range: tuple[float, float], precision: str) -> Encoding:
        """The encoding for a type asked for; None keeps what is computed.

        Raises:
            InputError: an unknown type.
        """
        if dtype is None:
            return cls("float64" if precision == "fp64" else "float32")
        if dtype not in STORED_DTYPES:
            raise unknown_name("dtype", dtype, STORED_DTYPES)
        low, high = data_range
        return cls(dtype, (high - low) / 255, low) if dtype == "uint8" else cls(dtype)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Encoding | None:
        """The encoding that a record states; None for a record without one.

        Raises:
            InputError: it states one that makes no sense.
        """
        stated = record.get("encoding")
        if stated is None:
            return None
        try:
            encoding = cls(str(stated["dtype"]), float(stated["scale"]), float(stated["offset"]))
            np.dtype(encoding.dtype)
        except (KeyError, TypeError, ValueError) as problem:
            raise InputError(f"the record states an encoding that cannot be read: {stated}") from problem
        return encoding

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the record."""
        return asdict(self)

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Values as stored; for uint8 rounded to the nearest step, values outside of the range and NaN to its ends."""
        if self.dtype != "uint8":
            return np.ascontiguousarray(values, self.dtype)
        steps = np.nan_to_num((values.astype(np.float64) - self.offset) / self.scale, nan=0.0, posinf=255, neginf=0)
        return np.rint(steps).clip(0, 255).astype(np.uint8)

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """Model values: uint8 as float32, floats as they are stored."""
        if self.dtype != "uint8":
            return stored
        return (stored.astype(np.float64) * self.scale + self.offset).astype(np.float32)
