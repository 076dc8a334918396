"""The rank that a layer cannot exceed whatever its weight: what its shape alone takes."""

from __future__ import annotations

from convspectra.auditing._record import LayerAudit


def rank_by_shape(layer: LayerAudit) -> int:
    """An upper bound on the rank of M from sizes, stride, dilation and padding.

    A group's rank is at most its input channels times the points that some tap reads, and its
    output channels times the points that read any. A strided 1 x 1 layer, say, skips inputs: its
    rank is below min(rows, columns), and no weight changes that.

    Returns
    -------
    int
        At most min(rows, columns); equal to it for a linear layer.

    Notes
    -----
    Cost: a byte an input point of each axis, and as many slices as the kernel has taps along it.

    Examples
    --------
    >>> sizes = {"kernel": (1, 1), "stride": (2, 2), "dilation": (1, 1), "padding": ((0, 0),) * 2}
    >>> rank_by_shape(LayerAudit("c", "Conv2d", input_shape=(2, 8, 8), output_shape=(5, 4, 4),
    ...               shape=(80, 128), **sizes))
    32
    """
    full = min(layer.shape)
    if not layer.kernel or len(layer.input_shape) != len(layer.kernel) + 1:
        return full
    inputs, outputs = layer.input_shape, layer.output_shape
    if layer.transposed:  # M is the transpose of the layer from its output to its input
        inputs, outputs = outputs, inputs
    read, reading = inputs[0] // layer.groups, outputs[0] // layer.groups
    for axis in range(len(layer.kernel)):
        points_read, points_reading = _along(layer, axis, inputs[axis + 1], outputs[axis + 1])
        read *= points_read
        reading *= points_reading
    return min(full, layer.groups * min(read, reading))


def _along(layer: LayerAudit, axis: int, size: int, out: int) -> tuple[int, int]:
    """Input points that are read along an axis, and output points that read any."""
    stride, dilation = layer.stride[axis], layer.dilation[axis]
    if layer.padding_mode != "zeros" or not 0 < size < 2**24:  # every output reads an input then
        return size, out
    read, reading = bytearray(size), bytearray(out)
    for tap in range(layer.kernel[axis]):
        start = tap * dilation - layer.padding[axis][0]
        first = max(0, -(start // stride))  # the first output whose tap is not before the input
        last = min(out, (size - 1 - start) // stride + 1)
        if first < last:
            count = last - first
            begin = start + first * stride
            read[begin : begin + (count - 1) * stride + 1 : stride] = b"\1" * count
            reading[first:last] = b"\1" * count
    return sum(read), sum(reading)
