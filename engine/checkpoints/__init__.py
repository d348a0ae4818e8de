"""Checkpoints: written whole or not at all, verified when read, and the models made from them."""
