"""Lipschitz constants of networks, beside what others give.

``python -m benchmarks.lipschitz --out docs/benchmarks``; ``--quick`` for two small networks that
are hardly trained. Prints a table, and writes ``lipschitz.md`` and ``lipschitz.json``. ECLipsE-Fast
has a row where ``eclipse-nn`` is installed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import convspectra as cs
from benchmarks import report
from benchmarks.lipschitz_networks import NETWORKS, trained
from benchmarks.peers import circular, reshaped_weight
from benchmarks.report import Row
from common.measure import machine, timed
from convspectra.models import example_arguments
from convspectra.network._frozen import undisturbed
from convspectra.network._lipschitz import Network
from convspectra.network._lipschitz_maps import LinearMap, Norm
from convspectra.network._lipschitz_parts import parts, sources
from convspectra.network._lipschitz_rules import Slopes
from convspectra.network._lipschitz_trace import Node, traced
from convspectra.network._segment import Segment

ITERATIONS = 5
"""Gram iterations, the number that the papers take."""
LARGEST = 2100
"""Side of the largest matrix that ECLipsE-Fast gets: it inverts dense ones. A choice: 4 s each."""
QUICK = ("perceptron, 4 layers", "critic, spectral_norm")
"""Networks of the quick table."""


def gram_circular(op: cs.ConvOperator) -> float:
    """Delattre et al., ICML 2023 (arXiv:2305.16173): Gram iteration of the circular symbols."""
    if op.geometry.ndim == 0:
        return _gram_bound(op.weight.detach()[None])
    sizes = [-(-n // s) for n, s in zip(op.geometry.input_size, op.geometry.stride, strict=True)]
    return _gram_bound(_symbols(_phases(op), sizes))


def gram_zero(op: cs.ConvOperator) -> float:
    """Delattre et al., 2024 (arXiv:2402.00240): Gram iteration of the kernel, for zero padding.

    The Gram kernel of 2^t factors, convolved in full, and the largest sum of absolute values in
    one of its rows. A layer with stride s is one without on the s^d phases of its input.
    """
    if op.geometry.ndim == 0:
        return _gram_bound(op.weight.detach()[None])
    kernel = _phases(op)
    sizes = [2**ITERATIONS * (k - 1) + 1 for k in kernel.shape[2:]]
    symbols = _symbols(kernel, sizes)
    gram, log_scale = symbols.mH @ symbols, 0.0
    for step in range(ITERATIONS):
        if step:
            gram = gram @ gram
            log_scale *= 2
        size = float(torch.linalg.matrix_norm(gram).amax())
        gram, log_scale = gram / size, log_scale + math.log(size)
    kernel = torch.fft.ifftn(gram.reshape(*sizes, *gram.shape[1:]), dim=tuple(range(len(sizes))))
    rows = kernel.real.abs().sum(tuple(range(len(sizes)))).sum(1)
    return math.exp((math.log(float(rows.amax())) + log_scale) / 2**ITERATIONS)


def _phases(op: cs.ConvOperator) -> Tensor:
    """The kernel (h, g s^d, *taps) of the layer without its stride, on the phases of its input."""
    kernel = op.weight.detach().double()
    for axis, s in enumerate(op.geometry.stride):
        k = kernel.shape[2 + axis]
        padded = kernel.new_zeros(
            *kernel.shape[: 2 + axis], -(-k // s) * s, *kernel.shape[3 + axis :]
        )
        padded.narrow(2 + axis, 0, k).copy_(kernel)
        kernel = padded.unflatten(2 + axis, (-1, s)).movedim(3 + axis, 2).flatten(1, 2)
    return kernel


def _symbols(kernel: Tensor, sizes: Any) -> Tensor:
    """Symbols (points, h, g) of a kernel on a torus; taps beyond it are wrapped."""
    for axis, (size, k) in enumerate(zip(sizes, kernel.shape[2:], strict=True)):
        shape = list(kernel.shape)
        shape[2 + axis] = size
        kernel = kernel.new_zeros(shape).index_add(2 + axis, torch.arange(k) % size, kernel)
    symbols = torch.fft.fftn(kernel, dim=tuple(range(2, kernel.ndim)))
    symbols = symbols.flatten(2).movedim(2, 0)
    return symbols if symbols.shape[1] >= symbols.shape[2] else symbols.mH


def _gram_bound(matrices: Tensor) -> float:
    """The largest Frobenius norm of an iterated Gram matrix, to the power of 2^-t."""
    log_scale = torch.zeros(len(matrices), dtype=torch.float64)
    for _ in range(ITERATIONS):
        size = torch.linalg.matrix_norm(matrices)
        matrices = matrices / size[:, None, None]
        log_scale = 2 * (log_scale + size.log())
        matrices = matrices.mH @ matrices
    logs = (torch.linalg.matrix_norm(matrices).log() + log_scale) / 2**ITERATIONS
    return float(logs.amax().exp())


class Others(Network):
    """The plain bound of a network with norms of layers by another way.

    Chains, skips, pooling and folded batch normalization are those of `lipschitz_bound`.
    """

    layer_norm: Callable[[cs.ConvOperator], float]

    def norm_of(self, linear: LinearMap) -> Norm:
        """The norm of one linear part; ours where it is no layer."""
        op = linear.layer()
        return super().norm_of(linear) if op is None else Norm(self.layer_norm(op), "")


PEERS: dict[str, tuple[Callable[[cs.ConvOperator], float], str]] = {
    "product of reshaped norms": (
        lambda op: reshaped_weight(op).values["sigma_max"][0],
        "not a bound",
    ),
    "product of circular norms": (
        lambda op: circular(op).values["sigma_max"][0],
        "a bound for circular padding only",
    ),
    "Gram iteration, circular (2023)": (gram_circular, "a bound for circular padding only"),
    "Gram iteration, zero padding (2024)": (gram_zero, "a bound"),
}
"""Ways to the norm of a layer, and what their product is."""


def eclipse(start: Node, end: Node, like: Tensor) -> float:
    """ECLipsE-Fast (Xu and Sivaranjani, NeurIPS 2024) on the dense matrices of the linear parts.

    Raises
    ------
    ModuleNotFoundError
        Where ``eclipse-nn`` is not installed.
    ValueError
        For a network that is not a chain of matrices and activations, or is too large.
    """
    from eclipse_nn.eclipsE_fast import ECLipsE_Fast

    weights, ends = [], []
    for part in parts(end):
        rule = None if part.reader is None else part.reader.rule
        before = sources(part.targets)
        if len(before) != 1 or not (rule is None or isinstance(rule, Slopes)):
            raise ValueError("no chain of matrices and activations")
        linear = LinearMap(before[0], part.targets, frozenset(), like)
        if max(linear.shape) > LARGEST:
            raise ValueError(f"a matrix of {linear.shape[0]} x {linear.shape[1]} is too large")
        units = torch.eye(linear.shape[1], dtype=torch.float64).reshape(-1, *linear.input_shape)
        weights.append(linear.apply(units).flatten(1).mT.contiguous())
        ends += [] if rule is None else [(rule.lower, rule.upper)]
    return float(ECLipsE_Fast(weights, [low for low, _ in ends], [high for _, high in ends]))


def rows_of(name: str, model: nn.Module, images: Tensor, ascent: int) -> Iterator[Row]:
    """What everybody says of one network; ours last."""
    segment = Segment(model, example_arguments(images[:1]), None, None, None, torch.float64)
    like = torch.zeros((), dtype=torch.float64)
    with undisturbed(images.device):
        start, end = traced(segment.model, segment.inputs, segment.selected)
        for who, (norm, note) in PEERS.items():
            others = Others(start, end, like, 0, {})
            others.layer_norm = norm  # type: ignore[method-assign]
            seconds, (_, value) = timed(others.bound)
            yield Row(name, "Lipschitz", who, value=value, seconds=seconds, note=note)
        try:
            seconds, value = timed(lambda: eclipse(start, end, like))
            yield Row(
                name, "Lipschitz", "ECLipsE-Fast", value=value, seconds=seconds, note="a bound"
            )
        except (ModuleNotFoundError, ValueError) as error:
            yield Row(name, "Lipschitz", "ECLipsE-Fast", note=str(error))
    seconds, found = timed(lambda: cs.lipschitz_bound(model, images, ascent=ascent))
    note = "a bound: skips and pooling as in the others"
    yield Row(name, "Lipschitz", "product of exact norms", value=found.plain, note=note)
    yield Row(
        name,
        "Lipschitz",
        value=found.upper,
        lower=found.lower,
        upper=found.upper,
        seconds=seconds,
        note="a bound" + ", channels scaled" * found.scaled,
    )


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two networks, hardly trained")
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    args = parser.parse_args(argv)
    console = Console()
    rows = []
    for name in QUICK if args.quick else NETWORKS:
        model, images = trained(name, 3 if args.quick else args.steps)
        for row in rows_of(name, model, images, ascent=3 if args.quick else 30):
            console.print(row.layer, row.who, row.value, row.seconds, row.note)
            rows.append(row)
    arguments = sys.argv[1:] if argv is None else argv
    facts = {
        "command": " ".join(["python -m benchmarks.lipschitz", *arguments]),
        "machine": machine(),
        "networks": "trained on the digits of scikit-learn, 8 x 8 pixels or enlarged to 16 x 16",
        "enclosure": "between the norm of a Jacobian, by ascent from four images, and our bound",
    }
    files = report.write_report(
        args.out / "lipschitz", "Lipschitz constants of networks", facts, rows
    )
    console.print("wrote", ", ".join(map(str, files)))
    return rows


if __name__ == "__main__":
    main()
