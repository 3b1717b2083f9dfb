"""Content-addressed outputs."""
