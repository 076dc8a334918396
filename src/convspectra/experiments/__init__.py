"""Experiments: what the paper shows, and what its title claims, on real images."""
