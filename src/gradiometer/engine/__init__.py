"""The engine: when something is due, gathered once, averaged, read and recorded."""
