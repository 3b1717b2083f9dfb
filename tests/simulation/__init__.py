"""Whole-system simulations from a printed seed."""
