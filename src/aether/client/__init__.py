"""The typed, synchronous client."""
