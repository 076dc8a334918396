"""Layers that are sold as orthogonal or spectrally normalized, audited as zero-padded layers."""
