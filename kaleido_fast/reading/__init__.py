"""Data sets: from names, files and arrays to examples."""
