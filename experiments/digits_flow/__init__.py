"""A small normalizing flow on digits: 1 x 1, masked and full invertible convolutions."""
