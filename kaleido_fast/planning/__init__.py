"""What is asked for, and what will run: decided before any work."""
