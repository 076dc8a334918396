"""Figures and tables from plain results: no torch, nothing else of convspectra."""
