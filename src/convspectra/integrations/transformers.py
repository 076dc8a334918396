"""The regularizer in the Trainer of Hugging Face: ``pip install 'convspectra[transformers]'``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from convspectra.integrations import _shared as shared
from convspectra.training import SpectralRegularizer

for _package in ("transformers", "accelerate"):  # Trainer itself asks for the second, but late.
    if find_spec(_package) is None:
        raise shared.missing(_package, "transformers")

from transformers import Trainer  # noqa: E402

STATE_NAME = "spectral_regularizer.pt"
"""The file in a checkpoint that holds the regularizer's state."""


class SpectralTrainerMixin:
    """Adds `SpectralRegularizer` to the training loss of any subclass of ``transformers.Trainer``.

    ``class MyTrainer(SpectralTrainerMixin, TheirTrainer)`` is all it takes.

    Parameters
    ----------
    *args, **kwargs
        Of the Trainer.
    spectral : mapping, optional
        Keyword arguments of `SpectralRegularizer`: ``{"penalty": "conditioning", "weight": 1e-2}``.
    example_input : Tensor, tuple of positional arguments, or mapping of keyword arguments, optional
        By default one example from the first batch, of what ``model.main_input_name`` names.
    per_layer : bool
        Whether to log every layer, ``spectral/<layer>/<quantity>``, beside the aggregates.

    Attributes
    ----------
    regularizer : SpectralRegularizer or None
        Made at the first training batch, for the model that is trained.

    Raises
    ------
    TypeError
        For an option that `SpectralRegularizer` does not have.
    ValueError
        In training: without an example input; where DeepSpeed or FSDP shard the weights.

    Notes
    -----
    Every batch of an accumulated gradient carries its share of the penalty, so that a step of the
    optimizer sees it once. The ``loss`` in the log has the penalty in it, ``spectral/penalty``
    stands beside it; the loss of evaluation, ``eval_loss``, has none.

    A checkpoint has the state in ``spectral_regularizer.pt``; ``train(resume_from_checkpoint=...)``
    restores it.

    Examples
    --------
    >>> SpectralTrainerMixin(spectral={"wieght": 1.0})
    Traceback (most recent call last):
    TypeError: got an unexpected keyword argument 'wieght'
    """

    def __init__(
        self,
        *args: Any,
        spectral: Mapping[str, Any] | None = None,
        example_input: Any = None,
        per_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        self.spectral = dict(spectral or {})
        shared.check_options(self.spectral)
        self.example_input = example_input
        self.per_layer = per_layer
        self.regularizer: SpectralRegularizer | None = None
        self._regularized: Any = None
        self._restored: dict[str, Any] | None = None
        super().__init__(*args, **kwargs)

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The loss of the Trainer, with the penalty in training."""
        if not model.training:
            return super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs, num_items_in_batch, **kwargs
            )
        regularizer = self._prepared(inputs)
        loss, outputs = super().compute_loss(  # type: ignore[misc]
            model, inputs, True, num_items_in_batch, **kwargs
        )
        loss = loss + regularizer() / self._shares(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's log; the lines of training have the report in them."""
        if "loss" in logs and self.regularizer is not None:
            logs.update(shared.scalars(self.regularizer.report(), self.per_layer))
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Not _save_checkpoint: that also uploads the folder, and may have deleted it on return.
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.regularizer is not None:
            state = self.regularizer.state_dict()
            if self.args.should_save:  # type: ignore[attr-defined]
                torch.save(state, os.path.join(output_dir, STATE_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(  # type: ignore[misc]
            resume_from_checkpoint, *args, **kwargs
        )
        path = os.path.join(resume_from_checkpoint, STATE_NAME)
        if os.path.isfile(path):
            self._restored = torch.load(path, map_location="cpu", weights_only=True)
        else:
            self._restored = None
            warnings.warn(
                f"expected {STATE_NAME} in {resume_from_checkpoint}, found none: the regularizer "
                "starts anew",
                stacklevel=2,
            )

    def _prepared(self, inputs: Any) -> SpectralRegularizer:
        """The regularizer of the model that is trained now, in the state of the checkpoint."""
        model = self.model  # type: ignore[attr-defined]
        if self.regularizer is None or self._regularized is not model:
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # type: ignore[attr-defined]
                raise ValueError(
                    "expected a setup that keeps every weight whole, got DeepSpeed or FSDP: "
                    "use a single device or distributed data parallel"
                )
            self.regularizer = SpectralRegularizer(model, self._example(inputs), **self.spectral)
            self._regularized = model
        if self._restored is not None:
            self.regularizer.load_state_dict(self._restored)
            self._restored = None
        return self.regularizer

    def _example(self, inputs: Any) -> Any:
        if self.example_input is not None:
            return self._prepare_input(self.example_input)  # type: ignore[attr-defined]
        name = getattr(self.model, "main_input_name", None)  # type: ignore[attr-defined]
        if name not in inputs:
            raise ValueError(
                f"expected an example input, got none and no {name!r} in the batch, which has "
                f"{sorted(inputs)}: pass {type(self).__name__}(example_input=...)"
            )
        return inputs[name][:1]

    def _shares(self, num_items_in_batch: Any) -> int:
        """How many batches make up the penalty, unless the Trainer divides the loss by that."""
        trainer: Any = self
        whole = getattr(trainer, "loss_is_scaled_for_ga", None)
        if whole is None:
            counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            whole = counted or trainer.compute_loss_func is not None
        return trainer.current_gradient_accumulation_steps if whole else 1


class SpectralTrainer(SpectralTrainerMixin, Trainer):
    """``transformers.Trainer`` with `SpectralTrainerMixin`.

    Examples
    --------
    >>> SpectralTrainer(model, args, spectral={"penalty": "stein"})  # doctest: +SKIP
    """
