"""Compiled kernels in one file: made on a machine without a GPU, unpacked into Triton's cache on one that has one.

Triton finds a kernel by a key made of its source, its options and Triton itself, in a folder of that name; one file
there lists the others by absolute paths, which `unpack` writes anew. Only what a launch needs is packed: binary and
metadata.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path

import kaleido_kernels
from kaleido_fast.errors import InputError
from kaleido_fast.files import atomic_path, check_folder
from kaleido_fast.versions import library_versions

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
        commit: of the repository, for people.
        kernels: how many there are.
    """

    sources: str
    triton: str
    commit: str
    kernels: int

    def difference(self, other: Manifest) -> str:
        """In what ``other`` differs so that its kernels are of no use here; nothing if they are."""
        if other.triton != self.triton:
            return f"it is for Triton {other.triton}, here is {self.triton}"
        if other.sources != self.sources:
            return f"it is for the kernels of commit {other.commit[:10]}, here are others"
        return ""


def manifest_here(commit: str | None, kernels: int = 0) -> Manifest:
    """The manifest of an archive made here and now."""
    return Manifest(sources_hash(), str(library_versions("triton")["triton"]), commit or "unknown", kernels)


def sources_hash() -> str:
    """Hash of the package of device code: of what decides the kernels' keys, and of somewhat more."""
    folder = Path(kaleido_kernels.__file__).parent
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
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
        raise InputError(f"{len(folders)} kernels take {len(packed) / 2**20:.1f} MiB, at most 16 travel: name fewer")
    with atomic_path(archive) as temporary:
        temporary.write_bytes(packed)
    return manifest


def _add(bundle: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    bundle.addfile(entry, io.BytesIO(data))


def unpack(archive: Path, cache: Path, here: Manifest) -> Manifest:
    """Put an archive's kernels into a Triton cache, in place of nothing that is there.

    Args:
        archive: what `pack` wrote.
        cache: Triton's cache folder (TRITON_CACHE_DIR); made if needed.
        here: what the kernels must be for.

    Raises:
        InputError: no such archive, or one that is damaged or for other kernels; nothing was unpacked.
    """
    files = _read(archive)
    try:
        record = json.loads(files.pop(MANIFEST))
        if record.pop("format") != FORMAT:
            raise KeyError("format")
        manifest = Manifest(**record)
    except (KeyError, TypeError, ValueError) as problem:
        raise InputError(f"{archive} is no archive of prepared kernels: make it with --prepare") from problem
    difference = here.difference(manifest)
    if difference:
        raise InputError(f"{archive} is not used: {difference}")
    for name, data in files.items():
        target = cache / name
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary:
            temporary.write_bytes(_relocated(data, target.parent) if target.name.startswith(GROUP) else data)
    return manifest


def _read(archive: Path) -> dict[str, bytes]:
    """Files of an archive by their names, which are NAME or FOLDER/NAME."""
    try:
        with tarfile.open(fileobj=io.BytesIO(lzma.decompress(archive.read_bytes()))) as bundle:
            members = [member for member in bundle if member.isfile()]
            found = {member.name: bundle.extractfile(member).read() for member in members}  # type: ignore[union-attr]
    except OSError as problem:
        raise InputError(f"archive {archive} cannot be read: {problem.strerror or problem}") from problem
    except (lzma.LZMAError, tarfile.TarError, EOFError) as problem:
        raise InputError(f"archive {archive} is damaged: {problem}; make it again with --prepare") from problem
    for name in found:
        parts = Path(name).parts
        if len(parts) > 2 or ".." in parts or Path(name).is_absolute():
            raise InputError(f"archive {archive} holds {name!r}, which none of ours does: make it again with --prepare")
    return found


def _relocated(group: bytes, folder: Path) -> bytes:
    """Triton's list of a kernel's files with the paths that they have in ``folder``, those left out left out."""
    listed = json.loads(group)
    names = [name for name in listed["child_paths"] if name.endswith(NEEDED)]
    listed["child_paths"] = {name: str(folder.resolve() / name) for name in names}
    return json.dumps(listed).encode()
