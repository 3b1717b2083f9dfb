"""Tests of AetherOS; the folders mirror the tree."""
