"""The onchip kernel (Hopper): activations stay on the chip, weights stream through shared memory."""
