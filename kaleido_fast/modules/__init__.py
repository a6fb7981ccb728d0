"""The caller's modules: which run by their weights alone, how all others run, how they are told apart."""
