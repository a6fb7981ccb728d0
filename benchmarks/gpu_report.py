"""Checks, tunes and times the fused kernels on this machine's GPU against all peers: see docs/gpu.md.

    python benchmarks/gpu_report.py                     everything, within ten minutes
    python benchmarks/gpu_report.py --only mnist,cifar  some networks
    python benchmarks/gpu_report.py --quick             a minute or two; without a GPU it tries the path alone

Runs from a plain checkout: nothing has to be installed but what the library itself needs, triton included.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from kaleido_fast.cli.gpu_report import main  # noqa: E402 - found by the line before

if __name__ == "__main__":
    main()
