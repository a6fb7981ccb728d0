"""Compiled code on disk between processes, in place of numba's own cache.

numba keeps an index file beside its code: a damaged one raises at every call, two first calls at the same time can
leave the code of one type under the name of another, and code is read only from folders that can be written. Here each
version of the code is one file with checksums, and whatever is wrong with it costs one compilation.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import config as _typed_config
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from kaleido_fast.errors import InputError
from kaleido_fast.system.files import atomic_path
from kaleido_fast.system.folders import user_cache

config: Any = _typed_config  # its names are made when it is loaded
DIGEST = 32  # bytes of a SHA-256
# Of numba's settings those that change what is compiled; its code generator states those of the processor itself.
SETTINGS = (
    "OPT",
    "LOOP_VECTORIZE",
    "SLP_VECTORIZE",
    "BOUNDSCHECK",
    "DEBUGINFO_DEFAULT",
    "EXTEND_VARIABLE_LIFETIMES",
    "ENABLE_PROFILING",
    "DISABLE_INTEL_SVML",
    "LLVM_REFPRUNE_PASS",
    "LLVM_REFPRUNE_FLAGS",
)


class CodeCache:
    """What numba's dispatchers ask of a cache, for one function.

    A file holds the digest of what its code was made from, the digest of the code, and the code.

    Args:
        function: the function; all that is compiled for it is in the folder of its source file.
        folders: gives the folders to look in, in this order; the first one that can be written takes new code.
    """

    def __init__(self, function: Callable[..., Any], folders: Callable[[], list[Path]]) -> None:
        self.folders = folders
        self.name, self.source = function.__qualname__.strip("<>"), Path(function.__code__.co_filename)
        self.warned = False

    cache_path = None  # numba shows it in a dispatcher's statistics

    def load_overload(self, signature: Any, target_context: Any) -> CompileResult | None:
        """The compiled code for argument types; None where it has to be compiled."""
        target_context.refresh()
        name, stamp = self.file_name(signature, target_context.codegen()), self.stamp()
        for folder in self.folders():
            path = folder / name
            try:
                content = path.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as problem:
                self.warn(f"{path} cannot be read ({problem.strerror}): compiled anew")
                continue
            if content[:DIGEST] != stamp and len(content) > 2 * DIGEST:
                continue  # of other sources
            code = content[2 * DIGEST :]
            if hashlib.sha256(code).digest() == content[DIGEST : 2 * DIGEST]:
                return CompileResult._rebuild(target_context, *pickle.loads(code))
            self.warn(f"{path} is damaged: compiled anew")
        return None

    def save_overload(self, signature: Any, compiled: CompileResult) -> None:
        """Keep compiled code, if there is a place."""
        code = dumps(compiled._reduce())
        content = self.stamp() + hashlib.sha256(code).digest() + code
        name, problems = self.file_name(signature, compiled.codegen), ["no home folder"]
        for folder in self.folders():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with atomic_path(folder / name) as temporary:
                    temporary.write_bytes(content)
                return
            except (OSError, InputError) as problem:
                problems.append(str(problem))
        self.warn(
            f"compiled code is not kept, so that each process compiles it again: {problems[-1]}; set NUMBA_CACHE_DIR "
            "to a folder that can be written"
        )

    def file_name(self, signature: Any, codegen: Any) -> str:
        """One for each version of the code that may be wanted beside others."""
        settings = [f"{name}={getattr(config, name, None)}" for name in SETTINGS]
        made_by = (sys.version, numba.__version__, llvmlite.__version__)
        facts = (made_by, str(signature), codegen.magic_tuple(), settings)
        return f"{self.source.stem}.{self.name}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.code"

    def stamp(self) -> bytes:
        """Digest of what the code is made from: code of other sources is replaced."""
        return _digest(self.source.parent)

    def warn(self, text: str) -> None:
        """Warn, once a process."""
        if not self.warned:
            self.warned = True
            warnings.warn(text, stacklevel=1)

    def enable(self) -> None:
        """It is always on."""

    def disable(self) -> None:
        """It is always on: `numba.njit` without a cache compiles without one."""

    def flush(self) -> None:
        """Nothing waits to be written."""


def code_folders() -> list[Path]:
    """Where compiled code is kept: in NUMBA_CACHE_DIR alone if it is set, else beside the sources or for the person."""
    if config.CACHE_DIR:
        return [Path(config.CACHE_DIR)]
    cache = user_cache()
    return [Path(__file__).parent / "__pycache__", *([] if cache is None else [cache / "code"])]


@functools.cache
def _digest(folder: Path) -> bytes:
    """Of the Python sources in a folder, with their names."""
    sources = {path.name: path.read_bytes() for path in sorted(folder.glob("*.py"))}
    return hashlib.sha256(repr(sources).encode()).digest()
