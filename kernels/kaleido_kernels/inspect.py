"""``python -m kaleido_kernels.inspect``: see `kaleido_kernels.proving.inspect`."""

from __future__ import annotations

import sys

from kaleido_kernels.proving.inspect import main

if __name__ == "__main__":
    sys.exit(main())
