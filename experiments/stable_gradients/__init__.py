"""With our penalties the gradients of deep plain CNNs stay stable: the evidence, beside peers."""
