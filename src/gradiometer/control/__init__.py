"""Acting on readings: controllers, what they decide, and how it reaches the run."""
