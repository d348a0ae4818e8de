"""Readers of the data sets, each a module with `read`, and the renderer of synthetic persons."""
