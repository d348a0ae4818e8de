"""The trainer, its step and state, optimisers, EMA and CUDA graph."""
