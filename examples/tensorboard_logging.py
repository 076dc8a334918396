"""The singular values of every convolution in TensorBoard, beside the loss."""

import tempfile

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.tensorboard import SummaryWriter

import convspectra as cs
from convspectra.integrations.tensorboard import write_report

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
reg = cs.SpectralRegularizer(model, images[:1], penalty="conditioning", weight=1e-1)

# A folder of your own instead, and then: tensorboard --logdir <folder>
with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
    for step in range(40):
        loss = cross_entropy(model(images), labels) + reg()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == 39:
            writer.add_scalar("loss", loss.item(), step)
            write_report(writer, reg.report(), step, per_layer=True)
    print(f"loss {loss.item():.3f}, written to {writer.log_dir}")
print(reg.report())
