"""Engines: what runs a kind of job."""
