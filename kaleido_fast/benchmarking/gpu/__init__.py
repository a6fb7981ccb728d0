"""The report of a GPU: kernels proved, tiles tuned, networks timed against every peer, in processes that may fail."""
