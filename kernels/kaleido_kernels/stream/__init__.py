"""The stream kernel: widths up to 256, weights read again in every step."""
