"""The caller's modules: which run by their weights alone, how all others run, and how each is identified."""
