"""Which ways there are for a layer, what each would cost, and which is taken: `explain`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from convspectra.operator import (
    DEFAULT_MAX_BYTES,
    ConvOperator,
    check_choice,
    check_type,
    independent_blocks,
    normalized,
    not_compiled,
)
from convspectra.spectra._auto import candidates, direct_ways
from convspectra.spectra._request import Request
from convspectra.spectra.ways import QUESTIONS, WAYS, Question
from convspectra.text import text_table


@dataclass(frozen=True)
class WayExplanation:
    """One way: its name, what it needs, whether the block admits it, and its rough price."""

    name: str
    needs: str
    admitted: bool
    flops: float | None
    bytes: float | None
    rests_on: str


@dataclass(frozen=True)
class BlockExplanation:
    """One independent block: its shape, how often it stands in M, and the ways to it.

    `order` has the names of the ways that are tried, the first one first, and when each is.
    """

    shape: tuple[int, int]
    places: int
    ways: tuple[WayExplanation, ...]
    order: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Explanation:
    """The ways to an answer for a layer; printed as a table.

    Attributes
    ----------
    question : str
        "LM", "SM", "logabsdet" or "solve".
    layer : str
    blocks : tuple of BlockExplanation
        One for each kind of independent block; none for a weight of 0.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> found = cs.explain(cs.ConvOperator(torch.ones(64, 64, 3, 3), (32, 32)), "logabsdet")
    >>> [name for name, _ in found.blocks[0].order]
    ['capacitance', 'augmented', 'dense']
    """

    question: str
    layer: str
    blocks: tuple[BlockExplanation, ...]

    def __str__(self) -> str:
        lines = [f"{QUESTIONS[self.question]} of {self.layer}"]
        if not self.blocks:
            lines.append("the weight is 0, and so is every singular value")
        for block in self.blocks:
            rows, columns = block.shape
            lines += ["", f"block of {rows} x {columns}, at {block.places} places"]
            lines.append(text_table(_COLUMNS, [_row(way, block) for way in block.ways]))
            tried = "; then ".join(f"{name} ({when})" for name, when in block.order)
            lines.append(f"tried: {tried}")
        return "\n".join(lines)


_COLUMNS = ("way", "tried", "Gflop", "GiB", "needs")
"""The columns of the table of a block."""


def _row(way: WayExplanation, block: BlockExplanation) -> dict[str, str]:
    names = [name for name, _ in block.order]
    place = str(names.index(way.name) + 1) if way.name in names else "-" if way.admitted else "no"
    flops = "" if way.flops is None else f"{way.flops / 1e9:.3g}"
    return {
        "way": way.name,
        "tried": place,
        "Gflop": f"{flops} ({way.rests_on})" if way.rests_on else flops,
        "GiB": "" if way.bytes is None else f"{way.bytes / 2**30:.3g}",
        "needs": way.needs,
    }


@not_compiled
def explain(
    op: ConvOperator, which: str = "SM", *, k: int = 1, max_bytes: int = DEFAULT_MAX_BYTES
) -> Explanation:
    """The ways to an answer, which of them the layer admits, their costs, and the one taken.

    Parameters
    ----------
    op : ConvOperator
    which : {"LM", "SM", "logabsdet", "solve"}
        Largest or smallest singular values as in `svds`, or the function of that name.
    k : int
        Number of singular values.
    max_bytes : int
        As for `svds`.

    Returns
    -------
    Explanation
        A table when printed. "tried" gives the place in the order of trial: 1 is taken first, the
        others follow if its answer is not certified. "-" is admitted and not tried, "no" is not
        admitted. The costs are rough; those of iterations are for a typical number of products.

    Raises
    ------
    ValueError
        For another `which`.

    Notes
    -----
    Cost: at most 24 steps of Lanczos, which for smallest values tell whether the layer seems
    well-conditioned.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> op = cs.ConvOperator(torch.ones(1, 1, 3), 50, padding_mode="circular")
    >>> print(cs.explain(op, "SM").blocks[0].order)
    (('circulant', 'the symbols tell everything'),)
    """
    check_type("op", op, ConvOperator)
    check_choice("which", which, ("LM", "SM", "logabsdet", "solve"))
    if which == "solve" and op.shape[0] != op.shape[1]:
        raise ValueError(f"expected a square operator to solve with, got {op!r}")
    scaled, exponent = normalized(op)
    if exponent is None:
        return Explanation(which, repr(op), ())
    direct = scaled.T if scaled.transposed else scaled
    blocks = tuple(
        BlockExplanation(
            block.op.shape,
            len(block.places),
            _ways(block.op, which),  # type: ignore[arg-type]
            _order(block.op, which, k, max_bytes),  # type: ignore[arg-type]
        )
        for block in independent_blocks(direct)
    )
    return Explanation(which, repr(op), blocks)


def _ways(op: ConvOperator, question: Question) -> tuple[WayExplanation, ...]:
    found = []
    for way in WAYS.values():
        if question not in way.answers:
            continue
        fits = way.admits(op, question)
        cost = way.cost(op, question) if fits else None
        found.append(
            WayExplanation(
                way.name,
                way.needs,
                fits,
                cost.flops if cost else None,
                cost.bytes if cost else None,
                cost.rests_on if cost else "",
            )
        )
    return tuple(found)


def _order(
    op: ConvOperator, question: Question, k: int, max_bytes: int
) -> tuple[tuple[str, str], ...]:
    if question not in ("LM", "SM"):
        return tuple(
            (way.name, "the cheapest" if i == 0 else "if that cannot say")
            for i, way in enumerate(direct_ways(op, question, max_bytes))
        )
    generator = torch.Generator(device=op.device).manual_seed(0)
    wanted = min(k, min(op.shape))
    request = Request(op, wanted, question == "LM", True, 1e-8, None, generator, max_bytes, None)
    return tuple((choice.way.name, choice.when) for choice in candidates(request))
