"""Benchmarks: one case table, the rivals, the clock and the report. `python -m benchmarks.run --help`."""
