"""Programs that use AetherOS as a user would: through its command, its client and its socket."""
