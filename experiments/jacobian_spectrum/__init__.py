"""Singular values of the Jacobian of a deep plain network, before and after it is prepared."""
