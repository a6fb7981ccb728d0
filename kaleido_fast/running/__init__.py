"""A run: packed models, blocks on their devices, frozen chains, results."""
