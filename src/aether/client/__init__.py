"""The typed, synchronous client: `from aether.client import Client`."""

from aether.client.client import Client

__all__ = ["Client"]
