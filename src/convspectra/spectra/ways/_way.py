"""The form of a way: what it needs, whether it fits a block, what it costs, and its answers.

A block is a `ConvOperator` that is not transposed, in float64 and scaled to entries near 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from torch import Tensor

from convspectra.operator import ConvOperator
from convspectra.solvers import SingularTriplets
from convspectra.spectra._request import Request

Question: TypeAlias = Literal["LM", "SM", "values", "logabsdet", "solve"]
QUESTIONS: dict[str, str] = {
    "LM": "largest singular values",
    "SM": "smallest singular values",
    "values": "all singular values",
    "logabsdet": "sum of the logarithms of the singular values",
    "solve": "linear system",
}
"""Every question that a block is asked, and its name in words."""


@dataclass(frozen=True)
class Cost:
    """A rough price: floating-point operations, the largest array in bytes, and what it rests on.

    The flops of an iteration are those of a typical number of products with M, named in
    `rests_on`.
    """

    flops: float
    bytes: float
    rests_on: str = ""


class Way(ABC):
    """One method: its name, what it needs in words, and what it can answer.

    Attributes
    ----------
    name : str
        As in ``svds(method=name)``.
    needs : str
        Completes "expected ... for method=name".
    answers : tuple of str
        The `QUESTIONS` that it can be asked.
    """

    name: ClassVar[str]
    needs: ClassVar[str]
    answers: ClassVar[tuple[Question, ...]]

    @abstractmethod
    def admits(self, op: ConvOperator, question: Question) -> bool:
        """Whether the structure of this block is one that the way can use."""

    @abstractmethod
    def cost(self, op: ConvOperator, question: Question) -> Cost:
        """The price of an answer for a block that it admits, without doing any of the work."""

    def separates(self, question: Question) -> bool:
        """Whether it can go on until a value is told from the next: `svds(separation=...)`."""
        return True

    def run(self, request: Request) -> SingularTriplets:
        """The triplets that are asked for; "LM" and "SM"."""
        raise TypeError(f"{self.name} gives no singular triplets")

    def trial(self, request: Request) -> SingularTriplets:
        """The same with the patience of one try among others."""
        return self.run(request)

    def matrices(self, op: ConvOperator, max_bytes: int) -> tuple[Tensor, Tensor]:
        """Dense matrices (b, m, n) with all singular values of M, and copies of each; "values"."""
        raise TypeError(f"{self.name} gives no dense matrices")

    def logabsdet(self, op: ConvOperator, max_bytes: int) -> Tensor:
        """The sum of the logarithms, 0-dim, with gradient; an ArithmeticError if it cannot say."""
        raise TypeError(f"{self.name} gives no log-determinant")

    def solve(self, op: ConvOperator, y: Tensor, adjoint: bool, max_bytes: int) -> Tensor:
        """The x with M x = y, or M' x = y if `adjoint`, for a batch; M is square."""
        raise TypeError(f"{self.name} solves no linear system")


def group_shape(op: ConvOperator) -> tuple[int, int]:
    """Rows and columns of the diagonal block of M that each group is."""
    rows, columns = op.shape
    return rows // op.groups, columns // op.groups


def dense_work(op: ConvOperator) -> float:
    """The product m n min(m, n), summed over groups: a dense SVD takes about ten times that."""
    rows, columns = group_shape(op)
    return float(op.groups * rows * columns * min(rows, columns))


def product_flops(op: ConvOperator) -> float:
    """The flops of one product of M with a vector."""
    return 2.0 * op.weight.numel() * math.prod(op.geometry.output_size)
