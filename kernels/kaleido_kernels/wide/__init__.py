"""The wide kernel: any width."""
