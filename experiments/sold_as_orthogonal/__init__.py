"""What is sold as orthogonal or spectrally normalised, audited as zero-padded layers."""
