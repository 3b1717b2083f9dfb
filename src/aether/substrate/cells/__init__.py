"""Cells: spec, plan, supervisor, drivers."""
