"""What a run reports while it goes on: metrics, loggers, profiler, manifest, memory."""
