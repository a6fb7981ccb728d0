"""Draws in files and stores: written block by block or at once, resumed, joined, read back."""
