"""The job machine, its store and queue."""
