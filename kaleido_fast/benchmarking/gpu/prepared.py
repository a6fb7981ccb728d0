"""Compiled kernels in one file: made on a machine without a GPU, unpacked into Triton's cache on one that has one.

Triton finds a kernel by a key made of its source, its options and Triton itself, in a folder of that name; one file
there lists the others by absolute paths, which `unpack` writes anew. Only what a launch needs is packed: binary and
metadata.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import json
import lzma
import os
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path

import kaleido_kernels
from kaleido_fast.errors import InputError
from kaleido_fast.system.files import atomic_path, check_folder, write_error
from kaleido_fast.system.versions import library_versions

MOST_BYTES = 16 * 2**20
MANIFEST = "manifest.json"
FORMAT = "kaleido-fast prepared kernels"
GROUP = "__grp__"
NEEDED = (".cubin", ".json")


@dataclass(frozen=True)
class Manifest:
    """What an archive is for.

    Args:
        sources: hash of the device code.
        triton: its version.
        build: hash of its compiled part, by which its cache knows kernels too: each version of Python has another.
        commit: of the repository, for people.
        kernels: how many there are.
    """

    sources: str
    triton: str
    build: str
    commit: str
    kernels: int

    def difference(self, other: Manifest) -> str:
        """How ``other`` differs so that its kernels are of no use here; empty if they are of use."""
        if other.triton != self.triton:
            return f"it is for Triton {other.triton}, and {self.triton} is here"
        if other.build != self.build:
            return f"it is for another build of Triton {self.triton}: prepare with the Python version that is here"
        if other.sources != self.sources:
            return f"it is for the kernels of commit {other.commit[:10]}, and the kernels here are others"
        return ""


def manifest_here(commit: str | None, kernels: int = 0) -> Manifest:
    """The manifest of an archive made here and now."""
    triton = str(library_versions("triton")["triton"])
    return Manifest(sources_hash(), triton, triton_build(), commit or "unknown", kernels)


@functools.cache
def triton_build() -> str:
    """Hash of Triton's compiled part; empty without Triton."""
    spec = importlib.util.find_spec("triton")
    folders = [Path(place) / "_C" for place in (spec.submodule_search_locations or [])] if spec else []
    found = hashlib.sha256()
    libraries = sorted(path for folder in folders for path in folder.glob("libtriton.*") if path.is_file())
    for path in libraries:
        with path.open("rb") as file:
            while part := file.read(2**22):
                found.update(part)
    return found.hexdigest() if libraries else ""


def sources_hash() -> str:
    """Hash of the package of device code: of what decides the kernels' keys, and of somewhat more.

    What only judges kernels (``proving``) is not in it.
    """
    folder = Path(kaleido_kernels.__file__).parent
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if name.parts[0] != "proving":
            found.update(name.as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def pack(cache: Path, archive: Path, commit: str | None) -> Manifest:
    """Write the kernels of a Triton cache to an archive.

    Raises:
        InputError: no kernels there, an archive that would be larger than 16 MiB, or a file that cannot be written.
    """
    check_folder(archive)
    folders = sorted(path.parent for path in cache.glob(f"*/{GROUP}*.json") if any(path.parent.glob("*.cubin")))
    if not folders:
        raise InputError(f"{cache} holds no compiled kernels: run the preparation first")
    manifest = manifest_here(commit, len(folders))
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as bundle:
        _add(bundle, MANIFEST, json.dumps({"format": FORMAT, **asdict(manifest)}).encode())
        for folder in folders:
            for path in sorted(folder.iterdir()):
                if path.suffix in NEEDED:
                    _add(bundle, f"{folder.name}/{path.name}", path.read_bytes())
    packed = lzma.compress(data.getvalue(), preset=6)
    if len(packed) > MOST_BYTES:
        size = f"{len(folders)} kernels take {len(packed) / 2**20:.1f} MiB, at most {MOST_BYTES / 2**20:.3g} travel"
        raise InputError(f"{size}: name fewer networks with --only")
    with atomic_path(archive) as temporary:
        temporary.write_bytes(packed)
    return manifest


def _add(bundle: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    bundle.addfile(entry, io.BytesIO(data))


def unpack(archive: Path, cache: Path, here: Manifest) -> Manifest:
    """Put an archive's kernels into a Triton cache; kernels that are there stay.

    Args:
        archive: what `pack` wrote.
        cache: Triton's cache folder (TRITON_CACHE_DIR); made if needed.
        here: what the kernels must be for.

    Raises:
        InputError: no such archive, one that is damaged or for other kernels (nothing was unpacked), or a cache that
            cannot be written (each kernel that is there is whole).
    """
    files = _read(archive)
    try:
        manifest = _manifest(files.pop(MANIFEST, b""))
    except ValueError as problem:
        raise InputError(f"{archive} is no archive of prepared kernels: make it with --prepare") from problem
    difference = here.difference(manifest)
    if difference:
        raise InputError(f"{archive} is not used: {difference}")
    try:
        kernels = _kernels(files, cache)
        if len(kernels) != manifest.kernels:
            raise ValueError(f"it holds {len(kernels)} kernels of {manifest.kernels}")
    except ValueError as problem:
        raise InputError(f"archive {archive} is damaged: {problem}; make it again with --prepare") from problem
    for folder, entries in kernels.items():
        _write(cache / folder, entries)
    return manifest


def _manifest(data: bytes) -> Manifest:
    """The manifest that an archive holds.

    Raises:
        ValueError: it is none.
    """
    record = json.loads(data)
    kinds = {"format": str, "sources": str, "triton": str, "build": str, "commit": str, "kernels": int}
    if not isinstance(record, dict) or {name: type(value) for name, value in record.items()} != kinds:
        raise ValueError("other entries than a manifest's")
    if record.pop("format") != FORMAT:
        raise ValueError("of another format")
    return Manifest(**record)


def _kernels(files: dict[str, bytes], cache: Path) -> dict[str, dict[str, bytes]]:
    """Folder of the cache -> its files by name, as they are to be written: Triton's list last, with paths of here.

    Triton takes a kernel that is listed for whole.

    Raises:
        ValueError: files that none of our archives has.
    """
    found: dict[str, dict[str, bytes]] = {}
    for name, data in files.items():
        folder, _, file = name.partition("/")
        if not (folder and file):
            raise ValueError(f"it holds {name!r}")
        found.setdefault(folder, {})[file] = data
    for folder, entries in found.items():
        groups = [name for name in entries if name.startswith(GROUP)]
        if len(groups) != 1:
            raise ValueError(f"{folder!r} has {len(groups)} lists of its files")
        entries[groups[0]] = _relocated(entries.pop(groups[0]), set(entries), cache / folder)
    return found


def _write(folder: Path, entries: dict[str, bytes]) -> None:
    """Write what is not there yet, in the order of ``entries``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in entries.items():
            if not (folder / name).exists():
                with atomic_path(folder / name) as temporary:
                    temporary.write_bytes(data)
    except OSError as problem:
        raise write_error(folder, problem) from problem


def _read(archive: Path) -> dict[str, bytes]:
    """Files of an archive by their names, which are NAME or FOLDER/NAME."""
    try:
        with tarfile.open(fileobj=io.BytesIO(lzma.decompress(archive.read_bytes()))) as bundle:
            members = [member for member in bundle if member.isfile()]
            found = {member.name: bundle.extractfile(member).read() for member in members}  # type: ignore[union-attr]
    except OSError as problem:
        raise InputError(f"archive {archive} cannot be read: {problem.strerror or problem}") from problem
    except (lzma.LZMAError, tarfile.TarError, EOFError, ValueError) as problem:
        raise InputError(f"archive {archive} is damaged: {problem}; make it again with --prepare") from problem
    for name in found:
        parts = Path(name).parts
        if len(parts) > 2 or ".." in parts or "\0" in name or "/".join(parts) != name or Path(name).is_absolute():
            raise InputError(
                f"archive {archive} holds {name!r}, which no archive of ours holds: make it again with --prepare"
            )
    return found


def _relocated(group: bytes, there: set[str], folder: Path) -> bytes:
    """Triton's list of a kernel's files with their paths in ``folder``, without the files that are left out.

    Raises:
        ValueError: it is no such list, or lists other files than ``there`` are.
    """
    listed = json.loads(group)
    paths = listed.get("child_paths") if isinstance(listed, dict) else None
    names = [name for name in paths if name.endswith(NEEDED)] if isinstance(paths, dict) else []
    if set(names) != there:
        raise ValueError(f"{folder.name!r} holds other files than it lists")
    return json.dumps({**listed, "child_paths": {name: os.path.realpath(folder / name) for name in names}}).encode()
