"""AetherOS: an auditable, sandboxed substrate for AI work on Linux."""
