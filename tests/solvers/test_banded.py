"""The triangle of a block-banded matrix against dense QR factorizations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from convspectra.solvers import BandedTriangle

GROUPS, LINES = 2, 7


def banded(rows: int, width: int, reach: int) -> tuple[Tensor, list[int]]:
    """Rows of every line, of which each begins at its own block column, and the dense matrix."""
    generator = torch.Generator().manual_seed(0)
    shape = LINES, GROUPS, rows, reach * width
    return torch.randn(shape, dtype=torch.float64, generator=generator), list(range(LINES))


def dense(blocks: Tensor, width: int) -> Tensor:
    """The matrix of each group, with the columns that there are."""
    lines, groups, rows, across = blocks.shape
    whole = blocks.new_zeros(groups, lines * rows, lines * width + across)
    for j in range(lines):
        whole[:, j * rows : (j + 1) * rows, j * width : j * width + across] = blocks[j]
    return whole[:, :, : lines * width]


@pytest.mark.parametrize("rows", [3, 4, 11])
@pytest.mark.parametrize("reach", [1, 2, 4])
def test_the_triangle_has_the_gram_matrix_of_the_rows(rows: int, reach: int) -> None:
    width = 3
    blocks, starts = banded(rows, width, reach)
    matrix = dense(blocks, width)
    norm = float(torch.linalg.matrix_norm(matrix, 2).amax())
    triangle = BandedTriangle(starts, blocks.__getitem__, width, reach, norm)
    gram = matrix.mT @ matrix
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(LINES, GROUPS, width, 2, dtype=torch.float64, generator=generator)
    found = triangle.solve(triangle.solve_transposed(x))
    flat = found.transpose(0, 1).flatten(1, 2)
    torch.testing.assert_close(
        gram @ flat, x.transpose(0, 1).flatten(1, 2), rtol=0, atol=1e-9 * float(flat.abs().amax())
    )
    logarithms = torch.linalg.svdvals(matrix).log().sum()
    assert triangle.logarithm() == pytest.approx(float(logarithms), rel=1e-9)


@pytest.mark.parametrize("rows", [6, 2])
def test_rows_that_repeat_are_eliminated_once_the_tail_is_steady(rows: int) -> None:
    """A thousand lines alike: the singular values are those of the dense matrix."""
    width, reach, lines = 2, 2, 300
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(1, rows, reach * width, dtype=torch.float64, generator=generator)
    asked: list[int] = []

    def block_rows(start: int) -> Tensor:
        asked.append(start)
        return block

    matrix = dense(block.expand(lines, 1, rows, reach * width), width)
    truth = torch.linalg.svdvals(matrix)[0]
    triangle = BandedTriangle([0] * lines, block_rows, width, reach, float(truth[0]))
    assert (len(asked) < lines // 2) == (rows > width)
    columns = torch.eye(lines * width, dtype=torch.float64).reshape(-1, lines, 1, width)
    inverse = triangle.solve(columns.permute(1, 2, 3, 0)).flatten(0, 2)
    least = 1 / torch.linalg.svdvals(inverse)[0]
    assert abs(float(least) - float(truth[-1])) <= triangle.rounding


def test_too_few_rows_make_a_singular_triangle() -> None:
    blocks, starts = banded(2, 3, 2)
    triangle = BandedTriangle(starts, blocks.__getitem__, 3, 2, 1.0)
    x = torch.ones(LINES, GROUPS, 3, 1, dtype=torch.float64)
    assert float(triangle.solve_transposed(x).abs().amax()) > 1e12


def test_nan_is_never_a_factor() -> None:
    blocks, starts = banded(3, 3, 2)
    with pytest.raises(ArithmeticError, match="finite factors, got NaN or Inf"):
        BandedTriangle(starts, (blocks * torch.nan).__getitem__, 3, 2, 1.0)
