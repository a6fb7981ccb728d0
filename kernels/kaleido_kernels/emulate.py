"""``python -m kaleido_kernels.emulate``: see `kaleido_kernels.proving.emulate`."""

from __future__ import annotations

import sys

from kaleido_kernels.proving.emulate import main

if __name__ == "__main__":
    sys.exit(main())
