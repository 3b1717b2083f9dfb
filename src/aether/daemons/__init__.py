"""Composition roots and the supervisor."""
