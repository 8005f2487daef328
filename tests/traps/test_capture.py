"""Models that other tools cannot read: captured and right, or one sentence that says what to do.

| case                                     | where                                          |
|------------------------------------------|------------------------------------------------|
| control flow on values, noise, autocast  | test_capture: refuses_with_one_sentence        |
| keyword, nested, star, None, scalars     | test_capture; through optimize, here           |
| LSTM, GRU                                | test_capture: recurrent_layers                 |
| DataParallel, torch.compile              | test_capture: wrappers_are_unwrapped           |
| the caller's model untouched             | test_capture, test_pipeline; here              |
| sparse parameters                        | test_capture: sparse_parameters_are_refused    |
| everything else                          | here                                           |
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from folding import Of, seeded
from torch import Tensor, nn

import graphsurgery as gs
from graphsurgery.errors import CaptureError


class Pair(NamedTuple):
    low: Tensor
    high: Tensor


class Net(nn.Module):
    """Conv + norm under any signature; `way` picks what forward does with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))  # type: ignore[no-any-return]


class Star(Net):
    def forward(self, *parts: Tensor) -> Tensor:
        return self.features(torch.cat(parts, 1))


class KeywordOnly(Net):
    def forward(self, *, image: Tensor, gain: Tensor | None = None) -> Tensor:
        y = self.features(image)
        return y if gain is None else y * gain


class Nested(Net):
    def forward(self, batch: dict[str, Any]) -> OrderedDict[str, Any]:
        y = self.features(batch["images"][0])
        return OrderedDict(pair=Pair(y.relu(), -y), nothing=None, shape=(y.mean((2, 3)), [y.sum((1, 2, 3))]))


class Unused(Net):
    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(7, 7)

    def forward(self, x: Tensor, ignored: Tensor) -> Tensor:
        return self.features(x)


class Shaped(Net):
    """A branch on the shape, which is fixed, and one on the number of dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        if y.shape[-1] > 4:
            y = y[..., :4]
        return y.flatten(1) if y.dim() == 4 else y


IMAGE = (2, 3, 8, 8)
CALLS: dict[str, tuple[type[Net], Callable[[], Any]]] = {
    "star": (Star, lambda: (torch.randn(2, 1, 8, 8), torch.randn(2, 2, 8, 8))),
    "keyword": (KeywordOnly, lambda: {"image": torch.randn(IMAGE)}),
    "optional": (KeywordOnly, lambda: {"image": torch.randn(IMAGE), "gain": torch.tensor(2.0)}),
    "nested": (Nested, lambda: ({"images": [torch.randn(IMAGE)]},)),
    "unused": (Unused, lambda: (torch.randn(IMAGE), torch.randn(2, 9))),
    "shape": (Shaped, lambda: (torch.randn(IMAGE),)),
}


def call(model: Callable[..., Any], inputs: Any) -> Any:
    with torch.no_grad():
        return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def same(got: Any, wanted: Any) -> None:
    leaves, structure = torch.utils._pytree.tree_flatten(got)
    expected, its = torch.utils._pytree.tree_flatten(wanted)
    assert structure == its
    for value, other in zip(leaves, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CALLS)
def test_signatures_are_kept(name: str) -> None:
    """Folded, and called as the model is called: the structure of inputs and outputs is the same."""
    build, inputs_of = CALLS[name]
    model = seeded(build).double()
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    try:
        inputs = inputs_of()
    finally:
        torch.set_default_dtype(torch.float32)
    result = gs.optimize(model, inputs)
    (change,) = result.report.changes
    assert change.kind.startswith("conv2d+batch_norm")
    assert result.report.verification.ok, str(result.report.verification)
    same(call(result.module, inputs), call(model, inputs))


@pytest.mark.parametrize(
    "model",
    [nn.Identity(), nn.Sequential(), nn.ReLU(), Of(lambda m, x: (x, x)), Of(lambda m, x: x.sum(1) * 2.0)],
    ids=["identity", "empty", "relu", "twice", "sum"],
)
def test_modules_without_parameters(model: nn.Module) -> None:
    x = torch.randn(3, 5, dtype=torch.float64)
    result = gs.optimize(model.eval(), x)
    assert result.report.verification.ok, str(result.report.verification)
    same(result.module(x), model(x))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.complex128))
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).to(torch.complex128) @ self.weight


def test_a_complex_layer_stays_and_what_is_real_before_it_folds() -> None:
    torch.manual_seed(0)
    model = Complex().double().eval()
    model.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.complex128))
    x = torch.randn(3, 6, dtype=torch.float64)
    result = gs.optimize(model, x)
    assert result.report.verification.ok, str(result.report.verification)
    assert [change.kind for change in result.report.changes] == ["linear+linear"]
    same(result.module(x), model(x))


def quantised() -> nn.Module:
    """A layer whose weights are packed integers."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            scales = torch.full((4,), 0.1), torch.zeros(4, dtype=torch.int64)
            self.register_buffer(
                "weight", torch.quantize_per_channel(torch.randn(4, 5), *scales, 0, torch.qint8)
            )

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.dequantize())

    return Packed()


@pytest.mark.filterwarnings("ignore:.*deprecated.*")
@pytest.mark.parametrize(
    ("model", "inputs", "said"),
    [
        (lambda: torch.jit.script(nn.Linear(5, 4)), lambda: torch.randn(3, 5), "TorchScript"),
        (quantised, lambda: torch.randn(3, 5), "quanti"),
        (lambda: nn.Linear(5, 4), lambda: torch.randn(3, 5, device="meta"), "meta"),
        (lambda: nn.Linear(5, 4), lambda: torch.randn(3, 5).to_sparse(), "sparse"),
        (lambda: nn.Linear(5, 4), lambda: torch.randn(3, 6), "3x6"),
        (lambda: nn.Linear(5, 4), lambda: "three rows", "str"),
    ],
    ids=["script", "quantised", "device", "sparse", "shape", "text"],
)
def test_what_cannot_be_captured_is_one_sentence(
    model: Callable[[], nn.Module], inputs: Callable[[], Any], said: str
) -> None:
    with pytest.raises(CaptureError, match=said) as caught:
        gs.optimize(model().eval(), inputs())
    assert "\n" not in str(caught.value)


def test_gradients_and_training_state_of_the_caller_are_left_alone() -> None:
    model = seeded(Shaped).train()
    model.conv.requires_grad_(False)
    model.norm.eval()
    x = torch.randn(IMAGE, requires_grad=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(part.training, [p.requires_grad for p in part.parameters()]) for part in model.modules()]
    gs.optimize(model, x)
    assert flags == [
        (part.training, [p.requires_grad for p in part.parameters()]) for part in model.modules()
    ]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())
