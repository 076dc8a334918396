"""The regularizer in Lightning: one callback, and the LightningModule stays as it is."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from convspectra.integrations.lightning import SpectralCallback


class Digits(pl.LightningModule):
    """Knows nothing of singular values."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 8 * 8, 10),
        )
        self.example_input_array = torch.zeros(1, 1, 8, 8)

    def forward(self, images):
        """One score a class."""
        return self.net(images)

    def training_step(self, batch, batch_idx):
        """The loss of the task, without any penalty."""
        images, labels = batch
        return cross_entropy(self(images), labels)

    def configure_optimizers(self):
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


torch.manual_seed(0)
# Each item is a batch already: a DataLoader would do, and asks for workers.
batches = TensorDataset(torch.randn(20, 64, 1, 8, 8), torch.randint(10, (20, 64)))
spectral = SpectralCallback(penalty="conditioning", weight=1e-1, log_every_n_steps=20)
trainer = pl.Trainer(
    accelerator="cpu",
    max_epochs=2,
    callbacks=[spectral],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Digits(), batches)
for name, value in trainer.callback_metrics.items():
    print(f"{name:28} {value:.3g}")
print(spectral.regularizer.report())
