"""What there is to audit: layers as operators, wherever the model came from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from convspectra.operator import ConvOperator


@dataclass(frozen=True)
class Target:
    """One layer at one input size, or one that was passed over.

    Attributes
    ----------
    name, type : str
        As in the model or file, such as "layer1.0.conv1" and "Conv2d".
    operator : ConvOperator, optional
        None if the layer was passed over.
    scale : Tensor, optional
        (h,), what the batch normalisation that alone reads the output multiplies each channel by.
    batch_norm : str
        Name of that normalisation; "" if there is none.
    skipped : str
        Why there is no operator.
    notes : tuple of str
        What else a reader should know, such as a separate padding before the layer.
    """

    name: str
    type: str
    operator: ConvOperator | None
    scale: Tensor | None = None
    batch_norm: str = ""
    skipped: str = ""
    notes: tuple[str, ...] = ()
