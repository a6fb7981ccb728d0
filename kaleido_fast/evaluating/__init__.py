"""How good samples are, where chains end, and how draws depend on each other."""
