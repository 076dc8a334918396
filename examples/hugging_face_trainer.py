"""The regularizer in the Trainer of Hugging Face: a small ResNet from its configuration."""

import tempfile

import torch
from transformers import ResNetConfig, ResNetForImageClassification, TrainingArguments

from convspectra.integrations.transformers import SpectralTrainer

torch.manual_seed(0)
labels = [step % 4 for step in range(64)]
examples = [{"pixel_values": torch.randn(1, 16, 16) + label, "labels": label} for label in labels]
model = ResNetForImageClassification(
    ResNetConfig(
        num_channels=1,
        embedding_size=8,
        hidden_sizes=[8, 8],
        depths=[1, 1],
        layer_type="basic",
        num_labels=4,
    )
)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        max_steps=20,
        logging_steps=10,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = SpectralTrainer(
        model,
        arguments,
        train_dataset=examples,
        spectral={"penalty": "conditioning", "weight": 1e-2},
    )
    trainer.train()
for line in trainer.state.log_history:
    if "spectral/penalty" in line:
        print(
            f"step {line['step']}  loss {line['loss']:.3f}, of which penalty "
            f"{line['spectral/penalty']:.3f}, cond up to {line['spectral/condition/max']:.3g}"
        )
print(trainer.regularizer.report())
