"""Processes and devices: groups, sharding, whole-batch statistics, compilation."""
