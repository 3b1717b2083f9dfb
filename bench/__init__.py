"""Benchmarks: each prints a table and writes JSON to bench/out/, beside a peer measured in the same run."""
