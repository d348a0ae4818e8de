"""Benchmarks: one door, one suite per kind of work."""
