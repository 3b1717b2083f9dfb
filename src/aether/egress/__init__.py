"""The network process: the one way out of cells, and the only holder of their secrets."""
