"""What one step of each optimizer is."""
