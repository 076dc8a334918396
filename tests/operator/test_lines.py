"""Lines of a layer against its naive dense matrix."""

from __future__ import annotations

import pytest
import torch
from helpers.strategies import direct, layers
from hypothesis import given

from convspectra.operator import ConvOperator, Lines, best_lines


def dense(lines: Lines, groups: int) -> torch.Tensor:
    """The rows of all lines, (groups, rows, columns), in the order of their first column."""
    width, reach = lines.width, lines.reach
    parts = []
    for j, start in enumerate(lines.starts):
        rows = lines.block_rows(start)
        whole = rows.new_zeros(*rows.shape[:2], (lines.count + reach) * width)
        whole[:, :, j * width : (j + reach) * width] = rows
        assert not whole[:, :, lines.count * width :].any()
        parts.append(whole[:, :, : lines.count * width])
    return torch.cat(parts, 1)


@given(layers())
def test_the_rows_of_all_lines_are_those_of_the_matrix(layer):
    op, matrix = direct(layer)
    if op.shape[0] < op.shape[1]:
        matrix = matrix.T
    gram = matrix.T @ matrix
    axes = list(range(op.geometry.ndim)) or [None]
    for axis in axes:
        count = Lines(op, axis).count
        for together in {1, count}:
            lines = Lines(op, axis, together)
            rows = dense(lines, op.groups)
            blocks = torch.block_diag(*(rows.mT @ rows))
            # M'M, with the columns in the order of the lines.
            order = lines.split(torch.arange(len(gram))[None]).permute(1, 0, 2, 3).flatten()
            torch.testing.assert_close(blocks, gram[order][:, order], rtol=0, atol=1e-11)


@given(layers())
def test_lines_are_joined_as_they_were_split(layer):
    op, _ = direct(layer)
    x = torch.arange(3.0 * min(op.shape), dtype=torch.float64).reshape(3, -1)
    for axis in list(range(op.geometry.ndim)) or [None]:
        for together in {1, Lines(op, axis).count}:
            lines = Lines(op, axis, together)
            assert torch.equal(lines.join(lines.split(x)), x)


@pytest.mark.parametrize(
    ("shape", "size", "axis", "count"),
    [((4, 4, 3, 3), (9, 60), 1, 10), ((4, 4, 3, 3), (60, 9), 0, 10), ((1, 1, 3), (600,), 0, 3)],
)
def test_the_longest_axis_is_eliminated_and_short_lines_are_joined(shape, size, axis, count):
    lines = best_lines(ConvOperator(torch.ones(shape, dtype=torch.float64), size))
    assert (lines.axis, lines.count) == (axis, count)


def test_the_lines_of_a_square_layer_and_of_its_adjoint():
    op = ConvOperator(torch.randn(2, 2, 3, 3, dtype=torch.float64), (4, 5), padding=1)
    matrix = op.to_dense()
    for adjoint, gram in ((False, matrix.T @ matrix), (True, matrix @ matrix.T)):
        rows = dense(Lines(op, 0, adjoint=adjoint), 1)[0]
        order = Lines(op, 0, adjoint=adjoint).split(torch.arange(40)[None]).flatten()
        torch.testing.assert_close(rows.mT @ rows, gram[order][:, order])
