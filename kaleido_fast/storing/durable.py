"""When a block counts: its bytes are on disk before, as files of a .zarr store or as rows of a .npy."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path
from typing import Any

from kaleido_fast.errors import InputError
from kaleido_fast.system.files import flush, sync_folder

_CRC_BYTES = 4  # at the end of every chunk, little-endian


def import_zarr() -> Any:
    """The zarr library.

    Raises:
        InputError: it is not installed, or too old.
    """
    try:
        import zarr
    except ImportError as problem:
        raise InputError(
            "a .zarr store needs zarr (for Python 3.11 and newer): pip install 'kaleido-fast[zarr]'"
        ) from problem
    if int(zarr.__version__.split(".")[0]) < 3:
        raise InputError(f"zarr {zarr.__version__} is too old: pip install 'kaleido-fast[zarr]' brings 3.1 or newer")
    return zarr


def durable_store(path: Path, *, writable: bool) -> Any:
    """Zarr's store of local files, whose files are on disk under their names when ``set`` returns."""
    import_zarr()
    from zarr.storage import LocalStore

    class DurableStore(LocalStore):
        """Also notes the CRC-32C at the end of each chunk that it writes."""

        def __init__(self, root: Path | str, *, read_only: bool = False) -> None:
            super().__init__(root, read_only=read_only)
            self.checksums: dict[str, int] = {}

        async def set(self, key: str, value: Any) -> None:
            import asyncio

            await asyncio.to_thread(self._write, key, value)

        def set_sync(self, key: str, value: Any) -> None:
            self._write(key, value)

        def _write(self, key: str, value: Any) -> None:
            data = memoryview(value.as_buffer_like())
            place = self.root / key
            if key.endswith("zarr.json"):
                place.parent.mkdir(parents=True, exist_ok=True)
            else:
                self.checksums[key] = int.from_bytes(data[-_CRC_BYTES:], "little")
            write_durably(place, data)

    return DurableStore(path, read_only=not writable)


def write_durably(place: Path, data: memoryview) -> None:
    """A file that is on disk, whole and under its name, on return; its folder has to exist."""
    temporary = place.with_name(f"{place.name}.{uuid.uuid4().hex}.part")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            flush(file.fileno(), place.parent)
        temporary.replace(place)
        sync_folder(place.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_rows_durably(place: Path, offset: int, data: memoryview) -> None:
    """Bytes at their place in a file that is there; on disk on return."""
    with place.open("rb+", buffering=0) as file:
        file.seek(offset)
        while data:
            data = data[file.write(data) :]
        flush(file.fileno(), place.parent)


def last_checksum(place: Path) -> int:
    """The CRC-32C at the end of a chunk's file."""
    with place.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _CRC_BYTES))
        return int.from_bytes(file.read(_CRC_BYTES), "little")
