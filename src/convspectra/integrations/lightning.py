"""Callbacks of Lightning, the regularizer among them: ``pip install 'convspectra[lightning]'``."""

from __future__ import annotations

from typing import Any

import torch

from convspectra.integrations import _shared as shared
from convspectra.network import GradientFlowMonitor
from convspectra.training import SpectralRegularizer

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    try:
        from pytorch_lightning import Callback
    except ModuleNotFoundError as error:
        raise shared.missing("lightning", "lightning") from error

SHARDING = {"DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy"}
"""Strategies that leave no process a whole weight: a layer's matrix needs it."""


class SpectralCallback(Callback):
    """Adds the gradient of `SpectralRegularizer` to training; the LightningModule stays as it is.

    Parameters
    ----------
    example_input : Tensor, tuple of positional arguments, or mapping of keyword arguments, optional
        By default the module's ``example_input_array``.
    decoupled : bool
        If False, the penalty is part of the objective: its gradient joins that of the loss, and
        the optimizer scales, clips and averages both. If True, the weights go down the penalty
        after the optimizer's step, by the learning rate of that step: as in decoupled weight
        decay, an adaptive optimizer cannot rescale the penalty.
    optimizer : int, optional
        Which of ``trainer.optimizers`` steps the penalized layers; needed where there are several.
    log_every_n_steps : int, optional
        How often the report is logged; by default as often as the trainer logs.
    per_layer : bool
        Whether to log every layer, ``spectral/<layer>/<quantity>``, beside the aggregates.
    **options
        Of `SpectralRegularizer`: ``penalty``, ``weight``, ``include`` and so on.

    Attributes
    ----------
    regularizer : SpectralRegularizer or None
        Made when training starts, on the device of the module, from the weights a checkpoint
        restored.

    Raises
    ------
    TypeError
        For an option that `SpectralRegularizer` does not have.
    ValueError
        When training starts: without an example input; with several optimizers and no choice; with
        a strategy that shards weights; in decoupled mode, where the parameter groups have
        different learning rates.

    Notes
    -----
    The hook is ``on_before_optimizer_step``. Lightning calls it once for each step of an optimizer:
    after the accumulated and, over ranks, averaged gradient is complete and the scale of fp16 is
    off it, and before clipping, which therefore sees the penalty as well. A fused optimizer takes
    the scale off itself: for those the penalty's gradient is multiplied by it. The loss that
    Lightning shows is that of the module, without the penalty; this is ``spectral/penalty``.

    Optimizers that evaluate the loss themselves (LBFGS) see the gradient but not the value.

    Examples
    --------
    >>> SpectralCallback(penalty="conditioning", weight=1e-2, log_every_n_steps=50).state_key
    "SpectralCallback{'penalty': 'conditioning'}"
    """

    def __init__(
        self,
        example_input: Any = None,
        *,
        decoupled: bool = False,
        optimizer: int | None = None,
        log_every_n_steps: int | None = None,
        per_layer: bool = False,
        **options: Any,
    ) -> None:
        shared.check_options(options)
        shared.check_period("log_every_n_steps", log_every_n_steps)
        self.example_input = example_input
        self.decoupled = decoupled
        self.optimizer = optimizer
        self.log_every_n_steps = log_every_n_steps
        self.per_layer = per_layer
        self.options = options
        self.regularizer: SpectralRegularizer | None = None
        self._module: Any = None
        self._restored: dict[str, Any] | None = None
        self._learning_rate: float | None = None  # of a step not yet followed up

    @property
    def state_key(self) -> str:
        """Callbacks with different penalties keep their states apart in a checkpoint."""
        penalty = self.options.get("penalty")
        name = penalty if isinstance(penalty, str) else getattr(penalty, "__name__", None)
        return self._generate_state_key(penalty=name)

    def state_dict(self) -> dict[str, Any]:
        """The regularizer's state; empty before training."""
        if self._restored is not None:
            return self._restored
        return self.regularizer.state_dict() if self.regularizer is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts, when there is a regularizer to take it."""
        self._restored = state_dict

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the regularizer, on the module's device, and give it the state of a checkpoint."""
        strategies = {base.__name__ for base in type(trainer.strategy).__mro__}
        if strategies & SHARDING:
            raise ValueError(
                f"expected a strategy that keeps every weight whole, got "
                f"{type(trainer.strategy).__name__}: use a single device or 'ddp'"
            )
        count = len(trainer.optimizers)
        if (count != 1 and self.optimizer is None) or not 0 <= (self.optimizer or 0) < count:
            raise ValueError(
                f"expected optimizer to say which of the module's {count} optimizers steps the "
                f"penalized layers, got {self.optimizer}: pass optimizer=<index>, and include= "
                "for the layers that it steps"
            )
        if self.regularizer is None or self._module is not pl_module:
            self.regularizer = self._build(trainer, pl_module)
            self._module = pl_module
        self.regularizer.to(pl_module.device)
        if self._restored is not None:
            self.regularizer.load_state_dict(self._restored)
            self._restored = None
        self._learning_rate = None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Add the gradient; in decoupled mode only remember the learning rate of this step."""
        if self.regularizer is None or optimizer is not trainer.optimizers[self.optimizer or 0]:
            return
        if self.decoupled:
            self._learning_rate = _learning_rate(optimizer)
            return
        self._learning_rate = 0.0
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        self.regularizer.add_gradient(scaler.get_scale() if scaler is not None and fused else 1.0)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer's step: the decoupled step, and the log."""
        if self.regularizer is None or self._learning_rate is None:
            return  # This batch's gradient is being accumulated.
        if self.decoupled:
            self.regularizer.step(self._learning_rate)
        self._learning_rate = None
        period = self.log_every_n_steps or trainer.log_every_n_steps
        if not period or (_steps(trainer) + 1) % period:
            return
        _log(trainer, shared.scalars(self.regularizer.report(), self.per_layer))

    def _build(self, trainer: Any, pl_module: Any) -> SpectralRegularizer:
        """Run the example the way the trainer runs a batch: on its device, in its precision."""
        example = self.example_input
        if example is None:
            example = pl_module.example_input_array
        if example is None:
            raise ValueError(
                "expected an example input, got none: pass SpectralCallback(example_input=...) or "
                f"set example_input_array on {type(pl_module).__name__}"
            )
        precision = trainer.precision_plugin
        example = precision.convert_input(trainer.strategy.batch_to_device(example))
        with precision.forward_context():
            return SpectralRegularizer(pl_module, example, **self.options)


class GradientFlowCallback(Callback):
    """Logs `GradientFlowMonitor`: gradients at layers, and the first one's over the last one's.

    Parameters
    ----------
    every : int, optional
        Steps of the optimizer from one record to the next; by default as often as the trainer logs.
    per_layer : bool
        Whether to log the norms of every layer, ``flow/<layer>/gradient`` and
        ``flow/<layer>/weight_gradient``, beside ``flow/first_over_last``.
    optimizer : int
        Which of ``trainer.optimizers`` counts as a step, where there are several.

    Attributes
    ----------
    monitor : GradientFlowMonitor or None
        There while training runs.

    Raises
    ------
    ValueError
        If `every` is no integer of at least 1 or None; when training starts, for a module with
        fewer than two layers or an optimizer that is not there.

    Notes
    -----
    Norms are those of the step's own gradients, accumulated batches included, before clipping and
    with the scale of fp16 taken off.

    Examples
    --------
    >>> GradientFlowCallback(every=50).every
    50
    """

    def __init__(
        self, every: int | None = None, *, per_layer: bool = True, optimizer: int = 0
    ) -> None:
        shared.check_period("every", every)
        self.every = every
        self.per_layer = per_layer
        self.optimizer = optimizer
        self.monitor: GradientFlowMonitor | None = None
        self._values: dict[str, float] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the hooks on the module."""
        if not 0 <= self.optimizer < len(trainer.optimizers):
            raise ValueError(
                f"expected optimizer to be one of the module's {len(trainer.optimizers)}, counted "
                f"from 0, got {self.optimizer}"
            )
        every = self.every or trainer.log_every_n_steps
        if every:
            self.monitor = GradientFlowMonitor(pl_module, every)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Count the step, and keep what it recorded."""
        if self.monitor is None or optimizer is not trainer.optimizers[self.optimizer]:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = float(scaler.get_scale()) if scaler is not None else 1.0
        values = self.monitor.step(scale)
        if getattr(optimizer, "_step_supports_amp_scaling", False):  # it takes the scale off itself
            for key in values:
                if key.endswith("/weight_gradient"):
                    values[key] /= scale
        self._values = values

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was recorded, at the step that Lightning's own logs have."""
        values, self._values = self._values, {}
        if values:
            ratio = {k: v for k, v in values.items() if k == "flow/first_over_last"}
            _log(trainer, values if self.per_layer else ratio)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the hooks off."""
        self._remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hooks off."""
        self._remove()

    def _remove(self) -> None:
        if self.monitor is not None:
            self.monitor.remove()
            self.monitor = None


def _steps(trainer: Any) -> int:
    """The axis of Lightning's own logs."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def _log(trainer: Any, values: dict[str, float]) -> None:
    trainer.callback_metrics.update(
        {key: torch.tensor(v, device="cpu") for key, v in values.items()}
    )
    for logger in trainer.loggers:
        logger.log_metrics(values, step=_steps(trainer))


def _learning_rate(optimizer: Any) -> float:
    rates = sorted({float(group["lr"]) for group in optimizer.param_groups})
    if len(rates) != 1:
        raise ValueError(
            f"expected one learning rate for all parameter groups in decoupled mode, got {rates}: "
            "use decoupled=False"
        )
    return rates[0]
