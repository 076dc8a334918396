"""Plain networks of He et al. on CIFAR-10: whether more layers train worse."""
