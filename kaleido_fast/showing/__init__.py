"""Pictures, plots, animations and pages of states."""
