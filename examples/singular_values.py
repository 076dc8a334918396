"""The singular values of a layer as it is applied, and how far the circular answer is off."""

import torch

import convspectra as cs

torch.manual_seed(0)
weight = torch.randn(16, 16, 3, 3) / 12
zero_padded = cs.ConvOperator(weight, (24, 24), padding=1)
print(zero_padded)

largest = cs.svds(zero_padded, 1, "LM")
smallest = cs.svds(zero_padded, 1, "SM")
for name, result in (("sigma_max", largest), ("sigma_min", smallest)):
    print(
        f"{name} = {result.s[0]:.10e} in [{result.lower[0]:.4e}, {result.upper[0]:.4e}] by "
        f"{result.method}, {result.matvecs} applications, residual {result.residuals[0]:.1e}"
    )
wrong = torch.linalg.svdvals(torch.fft.fft2(weight.double(), (24, 24)).permute(2, 3, 0, 1)).min()
print(f"circular sigma_min = {wrong:.4e}: {wrong / smallest.s[0]:.0f} times too large")
print(f"condition number {cs.cond(zero_padded):.3e}, log|det| {cs.logabsdet(zero_padded):.6f}")
