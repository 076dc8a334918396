"""`SpectralTrainer` against a plain loop that has the penalty in its loss."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

EXAMPLE = {"pixel_values": torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0))}
EXAMPLES = [EXAMPLE | {"labels": 0}] * 6  # All the same: their order, which is drawn, is no matter.
WEIGHT = 0.3


@pytest.fixture
def trainer_class():
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from convspectra.integrations.transformers import SpectralTrainer

    return SpectralTrainer


class Net(nn.Module):
    """Its loss is a mean over the batch."""

    main_input_name = "pixel_values"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1)
        )

    def forward(self, pixel_values, labels=None):
        out = self.net(pixel_values)
        return {"loss": out.square().mean(), "logits": out.mean((2, 3))}


class CountingNet(Net):
    """Its loss is a sum, divided by the number of items in the whole accumulated batch."""

    def forward(self, pixel_values, labels=None, num_items_in_batch=None, **kwargs):
        found = super().forward(pixel_values)
        if num_items_in_batch is not None:
            found["loss"] = found["loss"] * len(pixel_values) / num_items_in_batch
        return found


@pytest.fixture
def make(trainer_class, tmp_path):
    """A trainer of six equal examples, two a batch: three batches an epoch."""
    from transformers import TrainingArguments

    def make(model=None, spectral=None, example_input=None, per_layer=False, sgd=True, **options):
        model = Net() if model is None else model
        arguments = {
            "output_dir": str(tmp_path), "use_cpu": True, "num_train_epochs": 2,
            "per_device_train_batch_size": 2, "learning_rate": 0.1, "max_grad_norm": 0.0,
            "lr_scheduler_type": "constant", "report_to": "none", "disable_tqdm": True,
            "dataloader_pin_memory": False, "save_strategy": "no", "logging_steps": 2,
        }  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if sgd else None
        return trainer_class(
            model, TrainingArguments(**arguments | options), train_dataset=EXAMPLES,
            eval_dataset=EXAMPLES, optimizers=(optimizer, None), spectral=spectral,
            example_input=example_input, per_layer=per_layer,
        )  # fmt: skip

    return make


def loss_of(model):
    return model.net(EXAMPLE["pixel_values"][None]).square().mean()


def penalty_of(model):
    return WEIGHT / 2 * sum(model.net[i].weight.square().sum() for i in (0, 2))


def by_hand(steps, clip=0.0):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (loss_of(model) + penalty_of(model)).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model


@pytest.mark.parametrize("net", [Net, CountingNet])
@pytest.mark.parametrize(("accumulate", "clip", "steps"), [(1, 0.0, 6), (2, 0.05, 4), (3, 0.0, 2)])
def test_training_is_that_of_a_plain_loop(make, made, net, accumulate, clip, steps):
    trainer = make(
        net(), {"weight": WEIGHT}, gradient_accumulation_steps=accumulate, max_grad_norm=clip
    )
    trainer.train()
    assert trainer.state.global_step == steps
    expected = by_hand(steps, clip)
    for ours, theirs in zip(trainer.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert [name for name, _ in made[0].calls] == ["call"] * 6


def test_the_losses_that_are_shown(make, made):
    trainer = make(spectral={"weight": WEIGHT}, max_steps=1, logging_steps=1, eval_strategy="steps")
    trainer.train()
    start, end = Net(), trainer.model
    logs = trainer.state.log_history
    shown = (loss_of(start) + penalty_of(start)).item()
    assert logs[0]["loss"] == pytest.approx(shown, abs=5.1e-5)  # to four digits before 5.0
    (evaluated,) = [line["eval_loss"] for line in logs if "eval_loss" in line]
    assert evaluated == pytest.approx(loss_of(end).item(), rel=1e-5)
    assert made[0].count == 1


def test_outputs_are_returned_where_asked_for(make, made):
    trainer = make(spectral={"weight": WEIGHT})
    batch = {"pixel_values": EXAMPLE["pixel_values"][None]}
    trainer.model.train()
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert set(outputs) == {"loss", "logits"}
    torch.testing.assert_close(
        loss.float(), outputs["loss"] + penalty_of(trainer.model), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("per_layer", [False, True])
def test_the_log(make, made, per_layer):
    trainer = make(per_layer=per_layer)
    trainer.train()
    expected = {"spectral/sigma_max/max", "spectral/failures"}
    if per_layer:
        expected |= {"spectral/net.0/sigma_max", "spectral/net.2/sigma_max"}
    spectral = [
        (line["step"], {key for key in line if key.startswith("spectral/")})
        for line in trainer.state.log_history
    ]
    assert spectral == [(2, expected), (4, expected), (6, expected), (6, set())]
    largest = max(weight.norm().item() for weight in made[0].weights)
    assert trainer.state.log_history[-2]["spectral/sigma_max/max"] == pytest.approx(largest)


def test_the_example_is_of_the_first_batch_unless_given(make, made):
    make(max_steps=1).train()
    assert made[0].example_input.shape == (1, 1, 8, 8)
    mine = (torch.zeros(2, 1, 8, 8),)
    make(max_steps=1, example_input=mine).train()
    assert torch.equal(made[1].example_input[0], mine[0])
    nameless = Net()
    nameless.main_input_name = "image"
    trainer = make(nameless, max_steps=1)
    with pytest.raises(
        ValueError, match=r"no 'image' in the batch, which has \['labels', 'pixel_values'\]: pass"
    ):
        trainer.train()


def test_an_unknown_option_is_refused_at_once(make):
    with pytest.raises(TypeError, match="unexpected keyword argument 'wieght'"):
        make(spectral={"wieght": 1.0})


@pytest.mark.parametrize("kind", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_sharded_weights_are_refused(make, made, kind):
    trainer = make()
    setattr(trainer, kind, True)
    with pytest.raises(ValueError, match="keeps every weight whole, got DeepSpeed or FSDP"):
        trainer.compute_loss(trainer.model, dict(EXAMPLE))


def test_the_state_lies_in_the_checkpoint(make, made, tmp_path):
    make(save_strategy="steps", save_steps=4).train()
    state = torch.load(tmp_path / "checkpoint-4" / "spectral_regularizer.pt", weights_only=True)
    assert state["count"] == 4
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert made[1].calls == [("load", 4), ("call", 1.0), ("call", 1.0)]
    assert made[1].count == 6
    json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())


def test_a_checkpoint_of_only_the_model_has_no_state(make, made, tmp_path):
    make(save_strategy="steps", save_steps=4, save_only_model=True).train()
    assert not (tmp_path / "checkpoint-4" / "spectral_regularizer.pt").exists()


def test_a_checkpoint_of_another_trainer_starts_anew_and_says_so(make, made, tmp_path):
    make(save_strategy="steps", save_steps=4).train()
    (tmp_path / "checkpoint-4" / "spectral_regularizer.pt").unlink()
    with pytest.warns(UserWarning, match=r"spectral_regularizer\.pt in .*found none"):
        make().train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert made[1].count == 2


def test_a_new_model_gets_a_new_regularizer(make, made):
    trainer = make()
    trainer.train()
    trainer.model_init = Net
    trainer.train()
    assert [fake.count for fake in made] == [6, 6]
    assert made[1].model is trainer.model


def test_the_real_one_resumes_bit_for_bit(make, tmp_path):
    options = {"penalty": "conditioning", "weight": 0.1}
    whole = make(spectral=options, save_strategy="steps", save_steps=4)
    whole.train()
    resumed = make(spectral=options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert resumed.regularizer.report() == whole.regularizer.report()
    assert whole.state.log_history[0]["spectral/condition/max"] > 1


@pytest.mark.parametrize(
    "optim",
    [
        "adamw_torch",
        "adamw_torch_fused",  # The default of TrainingArguments; it does not change versions.
    ],
)
def test_the_real_one_counts_the_steps_of_every_optimizer(make, optim):
    trainer = make(spectral={"penalty": "conditioning"}, sgd=False, optim=optim)
    trainer.train()
    assert trainer.regularizer.report().step == 5
