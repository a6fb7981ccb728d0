"""Reads the IR after Triton's GPU passes (``ttgir``) where order and barriers matter. Plain Python, no Triton.

Read in this order: `operations` (the text as a tree), `barriers` (who waits for whom), `scratch` (memory that a kernel
writes for its own copies), `ahead` (copies under way while products run).
"""
