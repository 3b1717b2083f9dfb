"""Usage of jobs, from what the kernel counted."""
