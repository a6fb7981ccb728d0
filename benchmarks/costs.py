"""What a large run costs: ``python benchmarks/costs.py --help``; docs/scaling.md explains every figure."""

from __future__ import annotations

from kaleido_fast.cli.costs import main

if __name__ == "__main__":
    main()
