"""``python -m kaleido_fast``."""

from kaleido_fast.cli import main

main()
