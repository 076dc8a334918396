"""sigma_min of 64 -> 64 channels, 3 x 3, zero padding, 32 x 32: ours, the circular answer, one LU.

Prints a table; times are the best of three runs and ratios to one LU factorisation of the border
matrix's order, in one process. Run: ``python -m benchmarks.smallest_singular_value``.
"""

import platform
import time

import torch

import convspectra as cs

CHANNELS, SIZE, THREADS = 64, 32, 2


def best_of_three(function):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return min(times), result


def main():
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    weight = torch.randn(CHANNELS, CHANNELS, 3, 3, dtype=torch.float64) / (3 * CHANNELS**0.5)
    op = cs.ConvOperator(weight, (SIZE, SIZE))
    order = CHANNELS * (2 * SIZE + 1)
    matrix = torch.randn(order, order, dtype=torch.float64)
    lu_time, _ = best_of_three(lambda: torch.linalg.lu_factor(matrix))
    our_time, smallest = best_of_three(lambda: cs.svds(op, 1, "SM"))
    largest_time, largest = best_of_three(lambda: cs.svds(op, 1, "LM", tol=1e-6))
    spectrum = torch.fft.fft2(weight, (SIZE, SIZE)).permute(2, 3, 0, 1)
    circular_time, circular = best_of_three(lambda: torch.linalg.svdvals(spectrum).min())
    low, high = smallest.lower[0], smallest.upper[0]
    print(f"{platform.processor() or platform.machine()}, {THREADS} threads, {op}")
    print(f"one LU of order {order}: {lu_time:.2f} s")
    print(
        f"sigma_min {smallest.s[0]:.10e} in [{low:.3e}, {high:.3e}], residual "
        f"{smallest.residuals[0]:.1e}: {our_time:.2f} s, {our_time / lu_time:.2f} LU"
    )
    print(
        f"circular  {circular:.10e}, {circular / smallest.s[0]:.0f} times too large: "
        f"{circular_time:.2f} s, {circular_time / lu_time:.2f} LU"
    )
    print(
        f"sigma_max {largest.s[0]:.10e} in [{largest.lower[0]:.6f}, {largest.upper[0]:.6f}]: "
        f"{largest_time:.2f} s, {largest.matvecs} applications of M and M'"
    )


if __name__ == "__main__":
    main()
