"""From a running loop to a snapshot: one collector for each field."""
