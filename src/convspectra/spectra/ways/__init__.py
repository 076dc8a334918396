"""The ways to singular triplets, one a file, and the registry that chooses among them."""
