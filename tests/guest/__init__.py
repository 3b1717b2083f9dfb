"""A QEMU guest with all controllers on cgroup v2, to run the cell suite in."""
