"""From a module or a file to named operators: one tracer, one reader a file format."""

from convspectra.models._layers import (
    Layer,
    Selection,
    find_layers,
    is_convolution,
    named,
    selected,
    unwrapped,
)
from convspectra.models._linear_layers import Target, module_targets
from convspectra.models._rank_division import DEFAULT_GROUP, Division, divide, refuse_sharded

__all__ = [
    "DEFAULT_GROUP",
    "Division",
    "Layer",
    "Selection",
    "Target",
    "divide",
    "find_layers",
    "is_convolution",
    "module_targets",
    "named",
    "refuse_sharded",
    "selected",
    "unwrapped",
]
