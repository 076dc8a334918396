"""A layer as the matrix M: integers, products, explicit forms, structure."""

from convspectra.operator._blocks import (
    Block,
    Place,
    gather,
    group_matrices,
    independent_blocks,
    scatter,
)
from convspectra.operator._checks import (
    check_array,
    check_band,
    check_choice,
    check_gain,
    check_operator,
    check_positive_integer,
    check_positive_number,
    check_type,
)
from convspectra.operator._conv_operator import ConvOperator, block_diagonal, derived_operator
from convspectra.operator._convolution import (
    add_weight_gradient,
    kernel_to_weight,
    pad,
    scaled_outputs,
    weight_to_kernel,
)
from convspectra.operator._explicit import (
    DEFAULT_MAX_BYTES,
    FloatArray,
    check_bytes,
    scipy_operator,
)
from convspectra.operator._frobenius import (
    frobenius_form,
    squared_frobenius_norm,
    squared_frobenius_norm_now,
    subtract_frobenius_form,
)
from convspectra.operator._geometry import (
    PADDING_MODES,
    ConvGeometry,
    IntArray,
    conv_geometry,
)
from convspectra.operator._isometric import (
    check_halves,
    is_isometric_possible,
    isometric_taps,
    isometric_target,
    seen_operator,
)
from convspectra.operator._linear_operator import LinearOperatorLike
from convspectra.operator._lines import Lines, best_lines, elimination_flops
from convspectra.operator._modules import (
    CONVOLUTION_TYPES,
    LAYER_TYPES,
    convolution_options,
    has_own_forward,
)
from convspectra.operator._outer_padding import OuterPadding, outer_padding
from convspectra.operator._polyphase import (
    from_grid,
    from_phases,
    grid,
    grid_padding,
    join_phases,
    phase_lengths,
    polyphase,
    split_phases,
    to_grid,
    to_phases,
)
from convspectra.operator._product import Product, rounding_of, weight_rounding
from convspectra.operator._scaling import ldexp, normalized, with_distinct_taps
from convspectra.operator._structure import (
    has_augmented,
    has_embedding,
    inputs_per_point,
    is_circulant,
    is_square_grid,
    is_square_toeplitz,
    is_wide,
)
from convspectra.operator._surroundings import not_compiled, with_gradients

__all__ = [
    "CONVOLUTION_TYPES",
    "DEFAULT_MAX_BYTES",
    "LAYER_TYPES",
    "PADDING_MODES",
    "Block",
    "ConvGeometry",
    "ConvOperator",
    "FloatArray",
    "IntArray",
    "LinearOperatorLike",
    "Lines",
    "OuterPadding",
    "Place",
    "Product",
    "add_weight_gradient",
    "best_lines",
    "block_diagonal",
    "check_array",
    "check_band",
    "check_bytes",
    "check_choice",
    "check_gain",
    "check_halves",
    "check_operator",
    "check_positive_integer",
    "check_positive_number",
    "check_type",
    "conv_geometry",
    "convolution_options",
    "derived_operator",
    "elimination_flops",
    "frobenius_form",
    "from_grid",
    "from_phases",
    "gather",
    "grid",
    "grid_padding",
    "group_matrices",
    "has_augmented",
    "has_embedding",
    "has_own_forward",
    "independent_blocks",
    "inputs_per_point",
    "is_circulant",
    "is_isometric_possible",
    "is_square_grid",
    "is_square_toeplitz",
    "is_wide",
    "isometric_taps",
    "isometric_target",
    "join_phases",
    "kernel_to_weight",
    "ldexp",
    "normalized",
    "not_compiled",
    "outer_padding",
    "pad",
    "phase_lengths",
    "polyphase",
    "rounding_of",
    "scaled_outputs",
    "scatter",
    "scipy_operator",
    "seen_operator",
    "split_phases",
    "squared_frobenius_norm",
    "squared_frobenius_norm_now",
    "subtract_frobenius_form",
    "to_grid",
    "to_phases",
    "weight_rounding",
    "weight_to_kernel",
    "with_distinct_taps",
    "with_gradients",
]
