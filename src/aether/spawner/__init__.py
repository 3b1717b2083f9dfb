"""The privileged launcher; standard library only."""
