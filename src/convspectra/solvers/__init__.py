"""Algorithms for singular values, one a file; they know nothing of convolution."""
