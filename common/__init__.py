"""Shared by benchmarks and experiments: measuring, peers in training, images and networks."""
