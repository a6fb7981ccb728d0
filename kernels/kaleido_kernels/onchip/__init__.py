"""The onchip kernel (Hopper): activations stay in shared memory, weights stream through it."""
