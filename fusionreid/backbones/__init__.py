"""The backbones of the two branches: a CNN gives a map (B, C, h, w), a Transformer tokens (B, 1 + N, C)."""
