"""Gradients that gains predict, against measured ones, layer by layer in real networks."""
