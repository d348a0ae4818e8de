"""The trainer, its step, optimisers, EMA and CUDA graph."""
