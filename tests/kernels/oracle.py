"""Compare with the float64 reference; the bound allows only fp32 rounding and the rounding to the output's dtype."""

from __future__ import annotations

import os

import torch
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # about 10^4 entries per second: small vectors only
SIZES = (1, 1100) if INTERPRET else (1, 127, 513, 65536, 65537, (1 << 20) - 1, (1 << 20) + 1)
LARGE = 1403 if INTERPRET else 300_007
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def vectors(count: int, n: int, dtype=torch.float32, device="cpu", seed=0) -> list[Tensor]:
    """Return similar models: the first is N(0, 1), the others add 0.1 N(0, 1) to it; some entries are zero in all."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, generator=generator)
    models = [base] + [base + 0.1 * torch.randn(n, generator=generator) for _ in range(count - 1)]
    for model in models:
        model[n // 3 : n // 3 + n // 20] = 0
    return [model.to(dtype).to(device) for model in models]


def assert_rounded(actual: Tensor, expected: Tensor, scale: Tensor | float, steps: float = 8.0) -> None:
    """Assert |actual - expected| <= half a unit of the dtype + `steps` fp32 roundings of `scale`; equal NaN and inf."""
    actual, kind = actual.detach().cpu(), torch.finfo(actual.dtype)
    exact = actual.double()
    expected = torch.where(expected.abs() > kind.max * (1 + kind.eps / 4), expected.sign() * torch.inf, expected)
    finite = expected.isfinite()
    assert torch.equal(exact.isnan(), expected.isnan())
    assert torch.equal(exact[expected.isinf()], expected[expected.isinf()])
    scale = torch.as_tensor(scale, dtype=torch.float64).expand_as(expected)[finite]
    units = 1.01 if INTERPRET else 0.505  # Triton's interpreter truncates to bf16, the GPU rounds to nearest
    unit = 0.0 if actual.dtype == torch.float32 else kind.eps * expected[finite].abs()
    bound = units * unit + steps * 2**-24 * scale + kind.smallest_normal * kind.eps
    error = (exact[finite] - expected[finite]).abs()
    assert bool((error <= bound).all()), f"worst error / bound: {(error / bound).max().item():.3g}"


def assert_sums(actual: Tensor, expected: Tensor, absolute: Tensor) -> None:
    """Assert |actual - expected| <= 3e-6 of the sum of absolute terms; normals are good to 1e-6, products to 1e-7."""
    assert actual.dtype == torch.float64
    error = (actual.cpu() - expected).abs()
    assert bool((error <= 3e-6 * absolute + 1e-30).all()), f"error {error.tolist()}, terms {absolute.tolist()}"
