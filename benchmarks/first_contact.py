"""The first minutes with a GPU: are the fused kernels right, how fast are they; see docs/gpu.md.

    python benchmarks/first_contact.py --prepare --archive kernels.tar.xz   compile everything; needs no GPU
    python benchmarks/first_contact.py --archive kernels.tar.xz             on the GPU: a line a case as it goes
    python benchmarks/first_contact.py --emulate --only points2d            try the path without a GPU

Runs from a plain checkout, like gpu_report.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from kaleido_fast.benchmarking.gpu.first_contact import main  # noqa: E402 - found by the line before

if __name__ == "__main__":
    main()
