"""Whether a change of the code changes any bit: some 450 configurations of kaleido-fast, one hash each.

    python benchmarks/same_bits.py --out before.txt        # on the code as it was
    python benchmarks/same_bits.py --against before.txt    # on the code as it is: exit status 1 if a hash differs
    python benchmarks/same_bits.py --quick                 # every eighth configuration
    python benchmarks/same_bits.py --only 'triton/*'       # those whose names fit a pattern

A restructuring has to keep states, outcomes, files and refusals. This samples networks by every engine (Triton's in its
interpreter), kernel, precision, kind of noise and form of output, and hashes all that comes back and every file. A line
is ``NAME  HASH  NOTE``; the note is the plan's text or a warning, which are not hashed, or the text of a refusal, which
is. Only the public interface is used, so that the script runs on versions whose modules lie elsewhere. Times, versions
and paths are left out of hashes. Processors differ in their last bits: compare runs on one machine. Code on PYTHONPATH
is taken before that of this script's own repository; standard error says which it was.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.bits.case import Line  # noqa: E402 - this file may be loaded from elsewhere

QUICK_SHARE = 8
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
FIXED = {"CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0", "COLUMNS": "100", **dict.fromkeys(THREADS, "1")}
WHERE = "import kaleido_fast, kaleido_kernels; print(*kaleido_fast.__path__, *kaleido_kernels.__path__)"


def environment(interpreted: bool) -> dict[str, str]:
    """Variables of a worker: one thread, no GPU, the caller's code before this repository's."""
    places = [os.environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "kernels")]
    return {
        **os.environ,
        **FIXED,
        "TRITON_INTERPRET": str(int(interpreted)),
        "PYTHONPATH": os.pathsep.join(filter(None, places)),
    }


def run_worker(kind: str, share: int, pattern: str) -> list[Line]:
    """Run the configurations of one kind of process.

    Raises:
        SystemExit: the worker ended early.
    """
    command = [sys.executable, "-m", "benchmarks.bits.worker", kind, str(share), pattern]
    done = subprocess.run(command, env=environment(kind == "interpreted"), stdout=subprocess.PIPE, text=True)
    *lines, end = done.stdout.splitlines() or [""]
    if done.returncode or not end.startswith("all were run"):
        sys.exit(f"the {kind} worker ended with status {done.returncode} after {len(lines)} configurations")
    return [Line.parse(line) for line in lines]


def run_all(share: int, pattern: str) -> list[Line]:
    """All lines, sorted by name."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        parts = pool.map(lambda kind: run_worker(kind, share, pattern), ("plain", "interpreted"))
        lines = sorted(line for part in parts for line in part)
    names = [line.name for line in lines]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        sys.exit(f"names that stand for two configurations: {', '.join(sorted(twice))}")
    return lines


def total(lines: list[Line]) -> Line:
    """The hash over names and hashes, without notes."""
    text = "".join(f"{line.name}  {line.digest}\n" for line in lines)
    return Line("TOTAL", hashlib.sha256(text.encode()).hexdigest(), f"{len(lines)} configurations")


def differences(before: dict[str, Line], now: dict[str, Line], *, partly: bool) -> list[str]:
    """Names whose hashes differ, with both notes; where only a part was run, the others are not missed."""
    texts = []
    for name in sorted(now.keys() | (set() if partly else before.keys())):
        old, new = before.get(name), now.get(name)
        if old is None or new is None:
            texts.append(f"{'NEW' if old is None else 'GONE'}  {name}")
        elif old.digest != new.digest:
            texts.append(f"DIFFERS  {name}\n    was  {old.note}\n    is   {new.note}")
    return texts


def changed_notes(before: dict[str, Line], now: dict[str, Line]) -> list[str]:
    """Names with the same hash whose notes differ: such as plans that say something else."""
    both = [(before[name], now[name]) for name in sorted(before.keys() & now.keys())]
    return [
        f"note  {new.name}\n    was  {old.note}\n    is   {new.note}"
        for old, new in both
        if old.digest == new.digest and old.note != new.note
    ]


def compare(path: Path, lines: list[Line], *, partly: bool) -> bool:
    """Print how the lines differ from those of a file; whether any hash does."""
    read = [Line.parse(line) for line in path.read_text().splitlines()]
    before = {line.name: line for line in read if line.name != "TOTAL"}
    now = {line.name: line for line in lines}
    different, notes = differences(before, now, partly=partly), changed_notes(before, now)
    print("\n".join([*notes, *different, f"{len(different)} hashes of {len(lines)} differ, {len(notes)} notes alone"]))
    return bool(different)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to write the lines to")
    parser.add_argument("--against", type=Path, help="file of lines to compare with")
    parser.add_argument("--only", default="*", help="pattern of names, such as 'triton/wide/*'")
    parser.add_argument("--quick", action="store_true", help="every eighth configuration")
    given = parser.parse_args()
    where = subprocess.run([sys.executable, "-c", WHERE], env=environment(False), stdout=subprocess.PIPE, text=True)
    print(f"code: {where.stdout.strip()}", file=sys.stderr)
    start = time.monotonic()
    lines = run_all(QUICK_SHARE if given.quick else 1, given.only)
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    text = "".join(f"{line}\n" for line in [*lines, total(lines)])
    if given.out is not None:
        given.out.write_text(text)
    if given.against is None:
        print(total(lines) if given.out is not None else text.rstrip())
        return
    different = compare(given.against, lines, partly=given.quick or given.only != "*")
    print(total(lines))
    sys.exit(int(different))


if __name__ == "__main__":
    main()
