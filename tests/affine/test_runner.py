"""Calls run in float64: adjoints that skip the values are the adjoints of the calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folding import Of, seeded
from one_region import region_of
from torch import Tensor, nn

from graphsurgery.affine.runner import linear_part

BARE = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(5))

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 3), (2, 4, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), (2, 4, 7, 8)),
    "conv2d-left-over": (lambda: nn.Conv2d(4, 4, 3, stride=3, groups=4), (2, 4, 8, 10)),
    "conv2d-same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, stride=2), (2, 2, 5, 4, 6)),
    "options-left-out": (lambda: Of(lambda m, x: F.conv1d(x, m.w), w=nn.Parameter(BARE)), (2, 4, 7)),
    "chain": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(48, 5)),
        (2, 3, 5, 6),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_derivative_is_that_of_the_calls(case: str) -> None:
    make, shape = CASES[case]
    model: Any = seeded(make).double()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    run = region_of(model, x).runner(shape[0])

    def adjoint(of: Callable[[Tensor], Tensor], seed: Tensor) -> Tensor:
        at = torch.zeros_like(x, requires_grad=True)
        (found,) = torch.autograd.grad(of(at), at, seed)
        return found

    seed = torch.randn(model(x).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    # float64 on values about one: kernels may add in another order
    torch.testing.assert_close(adjoint(run, seed), adjoint(model, seed), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        wanted = model(x) - model(torch.zeros_like(x))
        torch.testing.assert_close(run(x), model(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(linear_part(run, x), wanted, rtol=1e-12, atol=1e-12)
