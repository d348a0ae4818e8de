"""Monitoring of a run: metrics, loggers, profiler, manifest, memory."""
