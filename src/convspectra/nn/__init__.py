"""Layers of networks that the singular values make possible: invertible convolutions."""

from convspectra.nn._invertible import InvertibleConv2d

__all__ = ["InvertibleConv2d"]
