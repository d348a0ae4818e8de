"""What a run tells while it goes on: numbers, curves, traces, and what it was made from."""
