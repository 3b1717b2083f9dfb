"""Frozen types, codec, errors and limits shared by all roles; no I/O."""
