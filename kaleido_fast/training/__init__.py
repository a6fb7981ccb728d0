"""Training: by one process or several workers, resumed exactly."""
