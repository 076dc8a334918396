"""`SpectralCallback` against a plain loop that has the penalty in its loss."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import convspectra as cs

pytestmark = pytest.mark.filterwarnings(
    # Of Lightning 2.6 itself, with PyTorch 2.13.
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
)
BATCHES = [torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(6)]
WEIGHT = 0.3
QUIET = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture(params=["lightning.pytorch"])
def pl(request):
    return pytest.importorskip(request.param)


@pytest.fixture
def callback(pl):
    from convspectra.integrations.lightning import SpectralCallback

    return SpectralCallback


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1))


def make(pl, optimizer=sgd, factor=1.0):
    """A LightningModule whose loss is factor * the mean square of the output."""

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.example_input_array = torch.zeros(1, 1, 8, 8)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            loss = factor * self(batch).square().mean()
            self.log("own", loss)
            return loss

        def configure_optimizers(self):
            return optimizer(self.parameters())

    return Module()


def by_hand(optimizer=sgd, accumulate=1, clip=None, decoupled=False):
    """The same training as a plain loop."""
    net = network()
    opt = optimizer(net.parameters())
    for start in range(0, len(BATCHES), accumulate):
        parts = BATCHES[start : start + accumulate]
        loss = sum(net(batch).square().mean() for batch in parts) / accumulate
        weights = [net[0].weight, net[2].weight]
        if not decoupled:
            loss = loss + WEIGHT / 2 * sum(weight.square().sum() for weight in weights)
        opt.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        opt.step()
        if decoupled:
            with torch.no_grad():
                for weight in weights:
                    weight -= opt.param_groups[0]["lr"] * WEIGHT * weight
    return net


class Batches:
    """For Lightning a list is several loaders, and a DataLoader wants workers."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)

    def __len__(self):
        return len(self.items)


def fit(pl, module, *callbacks, batches=BATCHES, ckpt_path=None, **options):
    trainer = pl.Trainer(callbacks=list(callbacks), **{**QUIET, **options})
    trainer.fit(module, Batches(batches), ckpt_path=ckpt_path)
    return trainer


def assert_same(net, expected):
    for ours, theirs in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pl", ["lightning.pytorch", "pytorch_lightning"], indirect=True)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, None), (3, 0.05)])
def test_training_is_that_of_a_plain_loop(pl, callback, made, accumulate, clip, decoupled):
    module = make(pl)
    fit(
        pl, module, callback(weight=WEIGHT, decoupled=decoupled),
        accumulate_grad_batches=accumulate, gradient_clip_val=clip,
    )  # fmt: skip
    assert_same(module.net, by_hand(sgd, accumulate, clip, decoupled))
    assert made[0].count == len(BATCHES) // accumulate


@pytest.mark.parametrize(("fused", "scale"), [(False, 1.0), (True, 1024.0)])
def test_the_scale_of_fp16_neither_stays_on_nor_is_missing(pl, callback, made, fused, scale):
    module = make(pl, lambda p: torch.optim.SGD(p, lr=0.1, fused=fused), factor=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    fit(pl, module, callback(weight=WEIGHT), plugins=[plugin])
    assert made[0].calls[1:] == [("add_gradient", scale)] * len(BATCHES)
    for weight, start in zip(made[0].weights, made[0].at_start, strict=True):
        torch.testing.assert_close(weight, start * (1 - 0.1 * WEIGHT) ** len(BATCHES))


def test_decoupled_takes_the_rate_of_the_step_not_of_the_next(pl, callback, made):
    def halved(parameters):
        opt = sgd(parameters)
        schedule = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
        return [opt], [{"scheduler": schedule, "interval": "step"}]

    fit(pl, make(pl, halved), callback(decoupled=True), batches=BATCHES[:3])
    assert made[0].calls[1:] == [("step", 0.1), ("step", 0.05), ("step", 0.025)]


def test_decoupled_needs_one_learning_rate(pl, callback, made):
    def grouped(parameters):
        first, *rest = parameters
        return torch.optim.SGD([{"params": [first], "lr": 0.5}, {"params": rest}], lr=0.1)

    with pytest.raises(ValueError, match=r"one learning rate .*got \[0\.1, 0\.5\]"):
        fit(pl, make(pl, grouped), callback(decoupled=True))


def test_with_several_optimizers_the_chosen_one_counts(pl, callback, made):
    base = type(make(pl))

    class Manual(base):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for opt in self.optimizers():
                opt.zero_grad()
                self.manual_backward(self(batch).square().mean())
                opt.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]

    with pytest.raises(ValueError, match=r"which of the module's 2 optimizers .*got None"):
        fit(pl, Manual(), callback())
    with pytest.raises(ValueError, match=r"which of the module's 2 optimizers .*got 2"):
        fit(pl, Manual(), callback(optimizer=2))
    fit(pl, Manual(), callback(optimizer=1))
    assert made[-1].calls[1:] == [("add_gradient", 1.0)] * len(BATCHES)


def test_the_example_is_the_modules_unless_given(pl, callback, made):
    module = make(pl)
    fit(pl, module, callback())
    assert made[0].example_input is module.example_input_array
    fit(pl, module, callback(BATCHES[0]))
    assert made[1].example_input is BATCHES[0]
    module.example_input_array = None
    with pytest.raises(ValueError, match=r"pass SpectralCallback\(example_input=.*on Module"):
        fit(pl, module, callback())


def test_a_strategy_that_shards_is_refused(callback):
    strategy = type("FSDPStrategy", (), {})
    trainer = SimpleNamespace(strategy=type("Mine", (strategy,), {})())
    with pytest.raises(ValueError, match=r"keeps every weight whole, got Mine"):
        callback().on_train_start(trainer, None)


def test_what_is_wrong_is_said_at_once(callback):
    with pytest.raises(TypeError, match="unexpected keyword argument 'wieght'"):
        callback(wieght=1.0)
    for bad in (0, True, 1.5):
        with pytest.raises(ValueError, match=f"expected log_every_n_steps .*got {bad}"):
            callback(log_every_n_steps=bad)


@pytest.mark.parametrize(
    ("ours", "theirs", "steps"), [(2, 1, [1, 3, 5]), (None, 3, [2, 5]), (None, 0, []), (4, 3, [3])]
)
def test_the_log(pl, callback, made, ours, theirs, steps):
    rows = []

    class Memory(pl.loggers.Logger):
        name = version = "memory"

        def log_hyperparams(self, *args, **kwargs):
            pass

        def log_metrics(self, metrics, step=None):
            rows.append((step, dict(metrics)))

    trainer = fit(
        pl, make(pl), callback(log_every_n_steps=ours),
        logger=Memory(), log_every_n_steps=theirs,
    )  # fmt: skip
    found = [(step, set(row)) for step, row in rows if "spectral/failures" in row]
    assert found == [(step, {"spectral/failures", "spectral/sigma_max/max"}) for step in steps]
    own = {step for step, row in rows if "own" in row}
    assert ours is not None or own == set(steps)  # The same axis as the module's own numbers.
    if steps and steps[-1] == 5:
        largest = max(weight.norm().item() for weight in made[0].weights)
        assert trainer.callback_metrics["spectral/sigma_max/max"] == pytest.approx(largest)


def test_every_layer_in_the_log(pl, callback, made):
    trainer = fit(pl, make(pl), callback(log_every_n_steps=1, per_layer=True))
    assert {"spectral/net.0/sigma_max", "spectral/net.2/sigma_max"} <= set(trainer.callback_metrics)
    assert "spectral/net.0/sigma_min" not in trainer.callback_metrics


def test_the_state_goes_through_a_checkpoint(pl, callback, made, tmp_path):
    path = tmp_path / "a.ckpt"
    fit(pl, make(pl), callback(penalty="cond"), callback()).save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["callbacks"]
    assert sorted(saved) == [
        "SpectralCallback{'penalty': 'cond'}",
        "SpectralCallback{'penalty': None}",
    ]
    resumed = callback(penalty="cond")
    fit(pl, make(pl), resumed, callback(), max_epochs=2, ckpt_path=path)
    for fake in made[2:]:
        assert [name for name, _ in fake.calls] == ["to", "load", *["add_gradient"] * len(BATCHES)]
    assert resumed.state_dict()["count"] == 2 * len(BATCHES)


def test_a_restored_state_is_not_lost_before_training(callback):
    untrained = callback()
    assert untrained.state_dict() == {}
    untrained.load_state_dict({"count": 3})
    assert untrained.state_dict() == {"count": 3}


def test_a_second_fit_goes_on_with_the_same_module_only(pl, callback, made):
    module, spectral = make(pl), callback()
    for _ in range(2):
        fit(pl, module, spectral)
    assert [fake.count for fake in made] == [2 * len(BATCHES)]
    fit(pl, make(pl), spectral)
    assert [fake.count for fake in made] == [2 * len(BATCHES), len(BATCHES)]


@pytest.mark.parametrize("decoupled", [False, True])
def test_the_real_one_trains_as_by_hand_and_resumes_bit_for_bit(pl, callback, tmp_path, decoupled):
    options = {"penalty": "conditioning", "weight": 0.1}
    path = tmp_path / "a.ckpt"
    whole, spectral = make(pl), callback(decoupled=decoupled, log_every_n_steps=1, **options)
    trainer = fit(pl, whole, spectral, max_epochs=2)

    net = network()
    opt = sgd(net.parameters())
    reg = cs.SpectralRegularizer(net, BATCHES[0], **options)
    for batch in 2 * BATCHES:
        opt.zero_grad()
        loss = net(batch).square().mean()
        (loss if decoupled else loss + reg()).backward()
        opt.step()
        if decoupled:
            reg.step(0.1)
    assert_same(whole.net, net)
    expected = reg.report().aggregates()
    for key in ("penalty", "sigma_min/min", "condition/max"):
        assert trainer.callback_metrics[f"spectral/{key}"] == pytest.approx(expected[key], rel=1e-3)

    fit(pl, make(pl), callback(decoupled=decoupled, **options)).save_checkpoint(path)
    resumed, second = make(pl), callback(decoupled=decoupled, **options)
    fit(pl, resumed, second, max_epochs=2, ckpt_path=path)
    for one, other in zip(resumed.net.parameters(), whole.net.parameters(), strict=True):
        assert torch.equal(one, other)
    assert second.regularizer.report() == spectral.regularizer.report()


@pytest.fixture
def flow(pl):
    from convspectra.integrations.lightning import GradientFlowCallback

    return GradientFlowCallback


class Kept:
    """A logger for Lightning that keeps what it gets."""

    def __new__(cls, pl):
        from lightning.pytorch.loggers.logger import Logger

        class Keeper(Logger):
            name = version = "kept"

            def __init__(self):
                super().__init__()
                self.rows = []

            def log_metrics(self, metrics, step=None):
                flow = {k: v for k, v in metrics.items() if k.startswith("flow/")}
                if flow:
                    self.rows.append((step, flow))

            def log_hyperparams(self, *args, **kwargs):
                pass

        return Keeper()


def first_gradients(accumulate):
    """Norms of the gradients at both outputs in the first step, and that of the second weight."""
    net, squares = network(), [0.0, 0.0]
    for batch in BATCHES[:accumulate]:
        first = net[0](batch)
        second = net[2](net[1](first))
        loss = second.square().mean() / accumulate
        parts = torch.autograd.grad(loss, [first, second], retain_graph=True)
        squares = [s + float(g.square().sum()) for s, g in zip(squares, parts, strict=True)]
        loss.backward()
    return [s**0.5 for s in squares], float(net[2].weight.grad.norm())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradient_flow_is_that_of_the_steps(pl, flow, accumulate):
    module, kept = make(pl), Kept(pl)
    fit(
        pl, module, flow(every=2), logger=kept, accumulate_grad_batches=accumulate,
        gradient_clip_val=0.01, log_every_n_steps=1,
    )  # fmt: skip
    steps = [step for step, _ in kept.rows]
    assert steps == list(range(0, len(BATCHES) // accumulate, 2))
    values = kept.rows[0][1]
    outputs, weight = first_gradients(accumulate)
    assert values["flow/net.0/gradient"] == pytest.approx(outputs[0], rel=1e-4)
    assert values["flow/net.2/gradient"] == pytest.approx(outputs[1], rel=1e-4)
    assert values["flow/net.2/weight_gradient"] == pytest.approx(weight, rel=1e-4)
    assert not any(m._forward_hooks for m in module.modules())
    assert_same(module.net, fitted_without(pl, accumulate))


def fitted_without(pl, accumulate):
    module = make(pl)
    fit(pl, module, accumulate_grad_batches=accumulate, gradient_clip_val=0.01)
    return module.net


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_flow_is_without_the_scale_of_fp16(pl, flow, fused):
    rows = []
    for scale in (1.0, 1024.0):
        module, kept = make(pl, lambda p: torch.optim.SGD(p, lr=0.1, fused=fused)), Kept(pl)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)
        fit(pl, module, flow(every=1), logger=kept, plugins=[plugin], log_every_n_steps=1)
        rows.append(kept.rows[0][1])
    assert rows[0] == pytest.approx(rows[1], rel=0.02)


def test_the_ratio_alone_and_what_is_refused(pl, flow):
    module, kept = make(pl), Kept(pl)
    fit(pl, module, flow(per_layer=False), logger=kept, log_every_n_steps=3)
    assert [(step, list(values)) for step, values in kept.rows] == [
        (0, ["flow/first_over_last"]),
        (3, ["flow/first_over_last"]),
    ]
    with pytest.raises(ValueError, match="expected every to be an integer"):
        flow(every=0)
    with pytest.raises(ValueError, match="expected optimizer to be one of the module's 1"):
        fit(pl, make(pl), flow(optimizer=1))
