"""Benchmarks: accuracy and ratios of times within one run."""
