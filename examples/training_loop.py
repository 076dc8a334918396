"""Keep the singular values of every convolution near 1 while a network trains: two lines."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import convspectra as cs

torch.manual_seed(0)
images, labels = torch.randn(256, 1, 8, 8), torch.randint(10, (256,))
model = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(8, 8, 3, padding=1),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(8 * 8 * 8, 10),
)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
reg = cs.SpectralRegularizer(model, images[:1], penalty="stein", weight=1e-1)

for step in range(60):
    loss = cross_entropy(model(images), labels)
    loss = loss + reg()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0 or step == 59:
        layer = cs.ConvOperator.from_module(model[2], (8, 8))
        print(
            f"step {step:2}  loss {loss.item():.3f}  second layer: sigma_max "
            f"{cs.sigma_max(layer):.3f}, sigma_min {cs.sigma_min(layer):.2e}"
        )
