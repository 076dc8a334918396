"""What benchmarks and experiments share: measuring, peers in training, images and networks."""
