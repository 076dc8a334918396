"""Gradient flow of the demo's network of 20 layers, before and after `prepare`.

From a shell, in this folder::

    PYTHONPATH=. convspectra flow --factory gradient_flow:default --images digits
    PYTHONPATH=. convspectra flow --factory gradient_flow:prepared --images digits
"""

from torch import nn

import convspectra as cs
from convspectra.paper.images import load_digits
from convspectra.paper.stable_gradients import Settings, plain_network


def default() -> nn.Module:
    """20 convolutions with ReLU and PyTorch's initialization."""
    return plain_network(20, Settings(), (1, 8, 8), 10, "default")


def prepared() -> nn.Module:
    """The same after `prepare`."""
    model = default()
    cs.prepare(model, load_digits().train_images[:8])
    return model


if __name__ == "__main__":
    images = load_digits().train_images[:16]
    print(cs.gradient_flow(default(), images))
    print()
    print(cs.gradient_flow(prepared(), images))
