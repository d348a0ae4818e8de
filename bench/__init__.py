"""Benchmarks: one command, one suite per kind of work."""
