"""Checks of linear operators, for the tests of this package and of yours.

The reference is naive on purpose: `naive_dense` applies a module to the identity, one column of
the matrix for each input element, and shares no code with `ConvOperator`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from convspectra.operator import ConvOperator


def naive_dense(
    module: nn.Module, input_shape: Sequence[int], *, max_bytes: int = 2 * 2**30
) -> Tensor:
    """Matrix of any affine module without its bias, by applying the module to the identity.

    Parameters
    ----------
    module : nn.Module
        Takes (b, *input_shape), gives (b, *output_shape), and is affine in each sample. Put it in
        ``eval()`` mode if that matters to it.
    input_shape : sequence of int
        Shape of one sample: (g, *spatial) for a convolution, (g,) for ``nn.Linear``.
    max_bytes : int
        Largest size of the identity and its image together.

    Returns
    -------
    Tensor
        (prod(output_shape), prod(input_shape)), of the dtype and device of the first parameter
        (the default ones if there is none). Column j is ``module(e_j) - module(0)``, flattened.
        Gradients flow to the module's parameters.

    Raises
    ------
    ValueError
        If `input_shape` is empty somewhere, if the identity and its image need more than
        `max_bytes`, or if the module is not affine, which one random sample tells.

    Notes
    -----
    Cost: the module on a batch of prod(input_shape) samples. Memory: rows * columns + columns**2
    entries, before what the module itself needs. For small sizes only.

    Examples
    --------
    >>> from torch import nn
    >>> pool = nn.AvgPool1d(2, stride=1)
    >>> naive_dense(pool, (1, 3))
    tensor([[0.5000, 0.5000, 0.0000],
            [0.0000, 0.5000, 0.5000]])
    """
    shape, columns = tuple(input_shape), math.prod(input_shape)
    if columns < 1:
        raise ValueError(f"expected an input_shape of positive integers, got {shape}")
    like = next(module.parameters(), torch.empty(0, device="cpu"))
    offset = module(like.new_zeros(1, *shape)).flatten()
    needed = (offset.numel() + columns) * columns * like.element_size()
    if needed > max_bytes:
        raise ValueError(
            f"expected the naive reference to take at most max_bytes={max_bytes:,} bytes, it would "
            f"take {needed:,}; use a smaller input or raise max_bytes"
        )
    identity = torch.eye(columns, dtype=like.dtype, device=like.device)
    matrix: Tensor = (module(identity.reshape(columns, *shape)).flatten(1) - offset).T
    sample = _random((1, *shape), like.dtype, like.device, _fresh_generator())
    direct = (module(sample).flatten() - offset).detach()
    error = _norm(direct - matrix.detach() @ sample.flatten())
    scale = _norm(direct) + _norm(matrix) + _norm(offset)
    if not error <= torch.finfo(like.dtype).eps ** 0.5 * scale:
        raise ValueError(
            f"expected a module that is affine in its input, got {type(module).__name__}, whose "
            f"answer to a random sample is off by {error:.3e} (size {scale:.3e})"
        )
    return matrix


def assert_adjoint(
    op: ConvOperator,
    *,
    generator: torch.Generator | None = None,
    batch: int = 4,
    rtol: float | None = None,
) -> None:
    """Assert ``<M x, y> = <x, M' y>`` for random batches x and y: that rmatvec belongs to matvec.

    Parameters
    ----------
    op : ConvOperator
        Or anything with its ``input_shape``, ``output_shape``, ``dtype``, ``device``, ``matvec``
        and ``rmatvec``.
    generator : torch.Generator, optional
        Source of x and y; a fresh one with seed 0 if not given, never the global one.
    batch : int
        Number of pairs (x, y).
    rtol : float, optional
        Largest ``|<M x, y> - <x, M' y>|`` relative to ``|M x| |y| + |x| |M' y|``; ``eps ** 0.75``
        of the dtype if not given (2e-12 in float64, 6e-6 in float32).

    Raises
    ------
    AssertionError
        With both inner products of the worst pair; also where a result has the wrong shape, dtype
        or device, or is not finite.

    Notes
    -----
    Cost: one matvec and one rmatvec of `batch` arrays. The inner products are taken in float64,
    so that the tolerance speaks of the operator only. On a GPU, float32 convolutions run in TF32
    unless ``torch.backends.cudnn.allow_tf32`` is False, and then miss the default tolerance.

    Examples
    --------
    >>> import torch
    >>> assert_adjoint(ConvOperator(torch.ones(2, 3, 3, dtype=torch.float64), 5))
    """
    generator = generator or _fresh_generator()
    x = _random((batch, *op.input_shape), op.dtype, op.device, generator)
    y = _random((batch, *op.output_shape), op.dtype, op.device, generator)
    with torch.no_grad():
        forward, backward = op.matvec(x), op.rmatvec(y)
    _assert_like(forward, y, "matvec(x)")
    _assert_like(backward, x, "rmatvec(y)")
    x, y, forward, backward = (a.flatten(1).double() for a in (x, y, forward, backward))
    left, right = (forward * y).sum(1), (x * backward).sum(1)
    scale = forward.norm(dim=1) * y.norm(dim=1) + x.norm(dim=1) * backward.norm(dim=1)
    tolerance = _default_rtol(op.dtype) if rtol is None else rtol
    excess = (left - right).abs() - tolerance * scale
    worst = int(excess.argmax())
    if not excess[worst] <= 0:
        raise AssertionError(
            f"rmatvec is not the adjoint of matvec: <Mx, y> = {left[worst]:.17g}, <x, M'y> = "
            f"{right[worst]:.17g}, difference {(left - right)[worst]:.3e}, expected at most "
            f"{tolerance:.1e} * {scale[worst]:.3e} for {op!r}"
        )


def assert_matches_dense(
    op: ConvOperator,
    dense: Tensor,
    *,
    generator: torch.Generator | None = None,
    batch: int = 3,
    rtol: float | None = None,
) -> None:
    """Assert that every form of the operator agrees with a dense matrix computed elsewhere.

    Compares ``shape``, `to_dense`, `to_sparse`, `to_scipy` (matvec, rmatvec, matmat and rmatmat),
    `matvec` and `rmatvec` on one array and on a batch, and all of these for ``op.T``.

    Parameters
    ----------
    op : ConvOperator
    dense : Tensor
        (rows, columns), for example from `naive_dense`.
    generator : torch.Generator, optional
        Source of the arrays; a fresh one with seed 0 if not given, never the global one.
    batch : int
        Number of arrays in a batch.
    rtol : float, optional
        Largest difference in norm, relative to the norm of the matrix times that of the array;
        ``eps ** 0.75`` of the operator's dtype if not given.

    Raises
    ------
    AssertionError
        With the form that differs and by how much.

    Notes
    -----
    Cost: four products with the dense matrix. Memory: a few times the dense matrix. The dense
    side is computed in float64.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
    >>> op = ConvOperator.from_module(conv, (5, 4))
    >>> assert_matches_dense(op, naive_dense(conv, (2, 5, 4)))
    """
    generator = generator or _fresh_generator()
    tolerance = _default_rtol(op.dtype) if rtol is None else rtol
    dense = dense.detach().double()
    with torch.no_grad():
        _compare_forms(op, dense, generator, batch, tolerance, "")
        _compare_forms(op.T, dense.T, generator, batch, tolerance, "T.")


def _compare_forms(
    op: ConvOperator,
    dense: Tensor,
    generator: torch.Generator,
    batch: int,
    rtol: float,
    prefix: str,
) -> None:
    if op.shape != tuple(dense.shape):
        raise AssertionError(
            f"{prefix}shape is {op.shape}, expected {tuple(dense.shape)} for {op!r}"
        )
    scale = _norm(dense)

    def compare(form: str, got: Tensor, expected: Tensor, size: float) -> None:
        if got.shape != expected.shape:
            raise AssertionError(
                f"{prefix}{form} has shape {tuple(got.shape)}, expected {tuple(expected.shape)} "
                f"for {op!r}"
            )
        error = _norm(got.double().cpu() - expected.cpu())
        if not error <= rtol * size:
            raise AssertionError(
                f"{prefix}{form} differs from the dense matrix by {error:.3e} in norm, expected "
                f"at most {rtol:.1e} * {size:.3e} for {op!r}"
            )

    matrix = op.to_dense()
    _assert_like(matrix, matrix.new_empty(op.shape, dtype=op.dtype, device=op.device), "to_dense()")
    compare("to_dense()", matrix, dense, scale)
    compare("to_sparse()", torch.from_numpy(op.to_sparse().toarray()), dense, scale)
    linear = op.to_scipy()
    forms = (
        ("matvec", op.matvec, op.input_shape, op.output_shape, dense),
        ("rmatvec", op.rmatvec, op.output_shape, op.input_shape, dense.T),
    )
    for name, function, shape_in, shape_out, expected_matrix in forms:
        arrays = _random((batch, *shape_in), op.dtype, op.device, generator)
        flat = arrays.flatten(1).double()
        expected, size = flat @ expected_matrix.T, scale * _norm(flat)
        got = function(arrays)
        _assert_like(got, arrays.new_empty(batch, *shape_out), f"{prefix}{name} of a batch")
        compare(f"{name} of a batch", got.flatten(1), expected, size)
        one = function(arrays[0])
        _assert_like(one, arrays.new_empty(shape_out), f"{prefix}{name} of one array")
        compare(f"{name} of one array", one.flatten(), expected[0], size)
        columns = flat.T.cpu().numpy().astype(linear.dtype)
        matmat = linear.matmat if name == "matvec" else linear.rmatmat
        single = linear.matvec if name == "matvec" else linear.rmatvec
        compare(
            f"to_scipy().{matmat.__name__}", torch.from_numpy(matmat(columns)), expected.T, size
        )
        compare(f"to_scipy().{name}", torch.from_numpy(single(columns[:, 0])), expected[0], size)


def _assert_like(got: Tensor, expected: Tensor, name: str) -> None:
    for attribute in ("shape", "dtype", "device"):
        have, want = getattr(got, attribute), getattr(expected, attribute)
        if have != want:
            raise AssertionError(f"{name} has {attribute} {have}, expected {want}")
    if not bool(torch.isfinite(got).all()):
        raise AssertionError(f"{name} has NaN or Inf in it")


def _random(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Tensor:
    """Standard normal entries; drawn in float64 so that all dtypes and devices see the same."""
    drawn = torch.randn(shape, dtype=torch.float64, generator=generator, device=generator.device)
    return drawn.to(device=device, dtype=dtype)


def _fresh_generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _default_rtol(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps ** 0.75)


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.detach().double()))
