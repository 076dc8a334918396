"""Benchmarks: accuracy, certificates, and ratios of times within one run."""
