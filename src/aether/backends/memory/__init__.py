"""Doubles that keep everything in memory."""
