"""From a module or a file to named operators: one tracer, one reader a file format."""

from convspectra.models._example import Arguments, example_arguments
from convspectra.models._forward_pass import signal_flow, slow_attention
from convspectra.models._gradient_paths import Activation
from convspectra.models._layers import Layer, find_layers, named
from convspectra.models._named_operators import NamedOperator, named_operators
from convspectra.models._rank_division import (
    DEFAULT_GROUP,
    RankDivision,
    divide_among_ranks,
    refuse_flat_shards,
)
from convspectra.models._selection import Selection, is_convolution, selected, unwrapped
from convspectra.models._sharded import piece_of, refuse_pieces, reshard, whole_weights
from convspectra.models._signal_flow import LayerFlow

__all__ = [
    "DEFAULT_GROUP",
    "Activation",
    "Arguments",
    "Layer",
    "LayerFlow",
    "NamedOperator",
    "RankDivision",
    "Selection",
    "divide_among_ranks",
    "example_arguments",
    "find_layers",
    "is_convolution",
    "named",
    "named_operators",
    "piece_of",
    "refuse_flat_shards",
    "refuse_pieces",
    "reshard",
    "selected",
    "signal_flow",
    "slow_attention",
    "unwrapped",
    "whole_weights",
]
