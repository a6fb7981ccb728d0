"""What a large run costs; docs/scaling.md explains every figure, ``benchmarks/costs.py`` is the command.

`arithmetic` counts and predicts, `planned` says what the plan and the kernels' model give, `text` puts figures into
words, `checking` holds the arithmetic against real runs.
"""
