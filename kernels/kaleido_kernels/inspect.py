"""``python -m kaleido_kernels.inspect``: see `kaleido_kernels.proving.inspect.command`."""

from __future__ import annotations

import sys

from kaleido_kernels.proving.inspect.command import main

if __name__ == "__main__":
    sys.exit(main())
