"""Projections of a kernel onto a bound on its norm: ours, and what people do."""
