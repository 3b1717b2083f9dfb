"""Kernel mechanisms of the launcher."""
