"""Derivatives of modules: pure calls, Jacobians, and the record of a backward pass."""
