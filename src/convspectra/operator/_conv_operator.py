"""A convolutional layer as the matrix M that it is, without forming M.

`ConvOperator` has two methods of its own, `matvec` and `rmatvec`; the dense, sparse and SciPy
views are derived from the same geometry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import overload

import scipy.sparse
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn

from convspectra.operator._checks import check_array, check_groups, check_weight, tensor_of
from convspectra.operator._convolution import convolve, convolve_transpose
from convspectra.operator._explicit import (
    DEFAULT_MAX_BYTES,
    FloatArray,
    dense_matrix,
    index_set,
    scipy_operator,
    sparse_matrix,
)
from convspectra.operator._geometry import (
    ConvGeometry,
    IntArray,
    Padding,
    conv_geometry,
    transposed_geometry,
)
from convspectra.operator._modules import convolution_options, has_own_forward
from convspectra.operator._own_forward import check_own_forward


class ConvOperator:
    """The linear map of a convolutional layer, of shape (h * prod(N_out), g * prod(N_in)).

    M acts on ``x.flatten()`` of an array (g, *spatial); padding, stride, dilation and groups are
    those of the layer as PyTorch applies it. The bias plays no part.

    Parameters
    ----------
    weight : Tensor or NumPy array
        (h, g / groups, *kernel) as in ``nn.ConvNd``, or (g, h / groups, *kernel) if `transposed`,
        as in ``nn.ConvTransposeNd``; (h, g) for a linear layer. Floating, finite. Gradients flow
        to it.
    input_size : int or sequence of int
        Spatial size of the input, one entry per axis (1 to 3 of them, or none for a linear
        layer). An int stands for every axis.
    stride, dilation : int or sequence of int
    padding : int, sequence of int, sequence of (before, after), "same" or "valid"
    groups : int
    padding_mode : {"zeros", "circular", "reflect", "replicate"}
    transposed : bool
        Whether the layer is a transposed convolution.
    output_padding : int or sequence of int
        Points added at the end of each axis, by a transposed convolution only.

    Raises
    ------
    ValueError
        For any option that PyTorch would refuse too, and for a weight that is not floating,
        not finite or empty. The message gives what was expected, what was given and what to do.

    Notes
    -----
    Nothing is computed at construction; memory is that of the weight. The paper's layer with
    kernel K is ``ConvOperator(kernel_to_weight(K), input_size)``: equation (2.1) for one channel,
    (3.1) for several.

    Examples
    --------
    >>> import torch
    >>> op = ConvOperator(torch.tensor([[[1.0, 2.0, 3.0]]]), 4)
    >>> op.shape
    (4, 4)
    >>> op.to_dense()
    tensor([[2., 3., 0., 0.],
            [1., 2., 3., 0.],
            [0., 1., 2., 3.],
            [0., 0., 1., 2.]])
    """

    def __init__(
        self,
        weight: Tensor | FloatArray,
        input_size: int | Sequence[int],
        *,
        stride: int | Sequence[int] = 1,
        padding: Padding = "same",
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        transposed: bool = False,
        output_padding: int | Sequence[int] = 0,
    ) -> None:
        tensor: Tensor = tensor_of("weight", weight)
        check_weight(tensor)
        check_groups(tensor, groups)
        ndim = tensor.ndim - 2
        if not isinstance(input_size, Sequence) and isinstance(input_size, Integral):
            input_size = (input_size,) * max(ndim, 1)
        if isinstance(input_size, Tensor):
            shape = tuple(input_size.shape)
            raise ValueError(
                "expected an input_size that is a tuple of ints, got a tensor of the shape "
                f"{shape}; pass its last {ndim} sizes, {shape[len(shape) - ndim :]}"
            )
        if not isinstance(input_size, Sequence) or len(input_size) != ndim:
            raise ValueError(
                f"expected an input_size of {ndim} integers for a weight of shape "
                f"{tuple(tensor.shape)}, got {input_size!r}"
            )
        if not isinstance(transposed, bool):
            raise ValueError(f"expected transposed to be True or False, got {transposed!r}")
        if ndim == 0 and transposed:
            raise ValueError("expected transposed=False for a linear layer's weight, got True")
        kernel_size = tuple(tensor.shape[2:])
        self._geometry: ConvGeometry
        if transposed:
            self._geometry = transposed_geometry(
                input_size,
                kernel_size,
                stride=stride,
                padding=padding,
                dilation=dilation,
                padding_mode=padding_mode,
                output_padding=output_padding,
            )
        else:
            if output_padding not in (0, (0,) * ndim, [0] * ndim):
                raise ValueError(
                    f"expected output_padding=0 unless transposed=True, got {output_padding!r}"
                )
            self._geometry = conv_geometry(
                input_size,
                kernel_size,
                stride=stride,
                padding=padding,
                dilation=dilation,
                padding_mode=padding_mode,
            )
        self._weight = tensor
        self._groups = int(groups)
        self._transposed = transposed

    @classmethod
    def from_module(cls, module: nn.Module, input_size: int | Sequence[int] = ()) -> ConvOperator:
        """The operator of an ``nn.ConvNd``, ``nn.ConvTransposeNd`` or ``nn.Linear``.

        Parameters
        ----------
        module : nn.Module
            Of a subclass whose own forward pass pads its input or computes its weight, the
            convolution as this pass applies it, padding included; the weight keeps its graph.
        input_size : int or sequence of int
            Spatial size of the module's input; nothing for ``nn.Linear``.

        Raises
        ------
        ValueError
            For any other module, one whose own forward pass does something else or cannot be
            followed, a lazy module that has no weight yet, or a weight on the meta device.

        Examples
        --------
        >>> from torch import nn
        >>> ConvOperator.from_module(nn.Conv2d(3, 8, 3, stride=2, padding=1), (32, 32)).shape
        (2048, 3072)
        """
        weight, options = convolution_options(module, input_size)
        op = cls(weight, input_size, **options)
        if has_own_forward(module):
            check_own_forward(module, op)
        return op

    @property
    def weight(self) -> Tensor:
        """The weight, as given."""
        return self._weight

    @property
    def geometry(self) -> ConvGeometry:
        """Integers of the convolution; for a transposed layer, of the convolution it transposes."""
        return self._geometry

    @property
    def groups(self) -> int:
        """Number of groups: M is block diagonal with that many blocks."""
        return self._groups

    @property
    def transposed(self) -> bool:
        """Whether M is the transpose of the convolution that `geometry` describes."""
        return self._transposed

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weight, and of the arrays the operator takes and gives."""
        return self._weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weight."""
        return self._weight.device

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(g, *spatial)."""
        return self._row_shape if self._transposed else self._column_shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """(h, *spatial)."""
        return self._column_shape if self._transposed else self._row_shape

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of M."""
        return math.prod(self.output_shape), math.prod(self.input_shape)

    @property
    def T(self) -> ConvOperator:
        """The operator of M', sharing the weight."""
        return self._replace(self._weight, not self._transposed)

    def with_weight(self, weight: Tensor, *, check: bool = True) -> ConvOperator:
        """The same layer with another weight of the same shape (any dtype and device).

        Without `check` its entries may be anything: for inner loops that look at their results.
        """
        if check:
            check_weight(weight)
        if weight.shape != self._weight.shape:
            raise ValueError(
                f"expected a weight of shape {tuple(self._weight.shape)}, got {tuple(weight.shape)}"
            )
        return self._replace(weight, self._transposed)

    @overload
    def matvec(self, x: Tensor) -> Tensor: ...
    @overload
    def matvec(self, x: FloatArray) -> FloatArray: ...
    def matvec(self, x: Tensor | FloatArray) -> Tensor | FloatArray:
        """M x for one array, a flat vector or a batch.

        Parameters
        ----------
        x : Tensor or NumPy array
            (*input_shape), (columns,) or (b, *input_shape), finite; of the operator's dtype and
            device, or a real NumPy array that can be cast to that dtype.

        Returns
        -------
        Tensor or NumPy array
            (*output_shape), (rows,) or (b, *output_shape); NumPy for NumPy, detached. Cost: one
            convolution, ``2 * b * h * g / groups * prod(k) * prod(N_out)`` flops.

        Raises
        ------
        ValueError
            For another shape, dtype or device, an empty batch, NaN or Inf.

        Examples
        --------
        >>> import numpy as np, torch
        >>> op = ConvOperator(torch.tensor([[[1.0, 2.0, 3.0]]]), 4)
        >>> op.matvec(torch.ones(1, 4)), op.matvec(np.ones(4))
        (tensor([[5., 6., 6., 3.]]), array([5., 6., 6., 3.], dtype=float32))
        """
        return self._product("x", x, self.input_shape, self.apply)

    @overload
    def rmatvec(self, y: Tensor) -> Tensor: ...
    @overload
    def rmatvec(self, y: FloatArray) -> FloatArray: ...
    def rmatvec(self, y: Tensor | FloatArray) -> Tensor | FloatArray:
        """M' y for one array, a flat vector or a batch: as `matvec`, from outputs to inputs."""
        return self._product("y", y, self.output_shape, self.apply_adjoint)

    def _product(
        self,
        name: str,
        x: Tensor | FloatArray,
        shape: tuple[int, ...],
        function: Callable[[Tensor], Tensor],
    ) -> Tensor | FloatArray:
        """A product with what it is given, in the form in which it is given."""
        given = tensor_of(name, x, like=self._weight)
        flat = isinstance(given, Tensor) and tuple(given.shape) == (math.prod(shape),)
        array = given.reshape(shape) if flat else given
        check_array(name, array, shape, like=self._weight)
        result = function(array)
        result = result.flatten() if flat else result
        if isinstance(x, Tensor):
            return result
        narrow = result.dtype in (torch.float16, torch.bfloat16)
        found: FloatArray = (result.float() if narrow else result).detach().cpu().numpy()
        return found

    def apply(self, x: Tensor) -> Tensor:
        """`matvec` without its checks, for inner loops."""
        return self._without_autocast(convolve_transpose if self._transposed else convolve, x)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        """`rmatvec` without its checks, for inner loops."""
        return self._without_autocast(convolve if self._transposed else convolve_transpose, y)

    def index_set(self, weight_index: Sequence[int]) -> tuple[IntArray, IntArray]:
        """Omega of one kernel entry: where ``weight[weight_index]`` stands in M.

        Parameters
        ----------
        weight_index : sequence of int
            Index into `weight`: two channels, then the tap.

        Returns
        -------
        rows, columns : integer arrays of length |Omega|
            With reflect, replicate or circular padding an entry of M can be the sum of several
            taps; it is then in the index set of each of them.

        Raises
        ------
        ValueError
            For an index outside the weight.

        Notes
        -----
        The paper's Omega_{p,q,z,y} (Section 3) for the weight index (y, z, p, q).

        Examples
        --------
        >>> import torch
        >>> op = ConvOperator(torch.tensor([[[1.0, 2.0, 3.0]]]), 4)
        >>> [i.tolist() for i in op.index_set((0, 0, 2))]
        [[0, 1, 2], [1, 2, 3]]
        """
        rows, columns = index_set(self._weight, self._geometry, self._groups, weight_index)
        return (columns, rows) if self._transposed else (rows, columns)

    def to_dense(self, max_bytes: int = DEFAULT_MAX_BYTES) -> Tensor:
        """M as a dense tensor of shape `shape`; gradients flow to the weight.

        Raises
        ------
        ValueError
            If M takes more than `max_bytes` (2 GiB unless said otherwise).

        Notes
        -----
        Cost: about k_last multiplications per entry of M. Memory: twice M.
        """
        matrix = dense_matrix(self._weight, self._geometry, self._groups, max_bytes)
        return matrix.T if self._transposed else matrix

    def to_sparse(self, max_bytes: int = DEFAULT_MAX_BYTES) -> scipy.sparse.csr_array:
        """M as a SciPy CSR array, detached, on the host.

        float16 and bfloat16 weights become float32, exactly: SciPy has no sparse type for them.

        Raises
        ------
        ValueError
            If M with its indices takes more than `max_bytes` (2 GiB unless said otherwise).

        Notes
        -----
        ``M = sum_p kron(weight[:, :, p], S_p)`` with S_p the 0/1 matrix of the index set of tap p.
        Zeros of the weight are not stored. Memory: 12 to 16 bytes for each stored entry.
        """
        wide = self._wide()
        matrix = sparse_matrix(wide.weight, self._geometry, self._groups, max_bytes)
        return matrix.T.tocsr() if self._transposed else matrix

    def to_scipy(self) -> LinearOperator:
        """M as a `scipy.sparse.linalg.LinearOperator` with matvec, rmatvec, matmat and rmatmat.

        Arrays are those of NumPy on the host, of the weight's dtype (float32 for float16 and
        bfloat16). Detached.
        """
        op = self._wide()
        return scipy_operator(
            op.apply, op.apply_adjoint, op.input_shape, op.output_shape, op.weight
        )

    def __repr__(self) -> str:
        g = self._geometry
        kind = "transposed, " if self._transposed else ""
        return (
            f"ConvOperator({self.input_shape} -> {self.output_shape}, {kind}"
            f"kernel={g.kernel_size}, stride={g.stride}, padding={g.padding}, "
            f"dilation={g.dilation}, groups={self._groups}, padding_mode={g.padding_mode!r}, "
            f"dtype={self.dtype}, device={self.device})"
        )

    @property
    def _row_shape(self) -> tuple[int, ...]:
        return (self._weight.shape[0], *self._geometry.output_size)

    @property
    def _column_shape(self) -> tuple[int, ...]:
        return (self._weight.shape[1] * self._groups, *self._geometry.input_size)

    def _replace(self, weight: Tensor, transposed: bool) -> ConvOperator:
        return derived_operator(weight, self._geometry, self._groups, transposed)

    def _without_autocast(
        self, function: Callable[[Tensor, Tensor, ConvGeometry, int], Tensor], x: Tensor
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return function(x, self._weight, self._geometry, self._groups)

    def _wide(self) -> ConvOperator:
        """The operator in a type that NumPy has: float16 and bfloat16 become float32."""
        weight = self._weight.detach()
        narrow = weight.dtype in (torch.float16, torch.bfloat16)
        return self._replace(weight.float() if narrow else weight, self._transposed)


def derived_operator(
    weight: Tensor, geometry: ConvGeometry, groups: int = 1, transposed: bool = False
) -> ConvOperator:
    """The operator of a weight that is made of a checked one, without another look at its entries.

    Nothing is checked: the weight, (h, g / groups, *kernel), the geometry and the groups must fit
    each other.
    """
    op = object.__new__(ConvOperator)
    op._weight, op._geometry, op._groups, op._transposed = weight, geometry, groups, transposed
    return op


def block_diagonal(ops: Sequence[ConvOperator]) -> ConvOperator:
    """One convolution whose matrix has those of `ops` as diagonal blocks, up to a permutation.

    All must share geometry, weight shape, groups and direction: their weights become the groups of
    one layer, so that what is batched over groups is batched over layers.
    """
    first = ops[0]
    weight = torch.cat([op.weight for op in ops])
    return derived_operator(weight, first.geometry, first.groups * len(ops), first.transposed)
