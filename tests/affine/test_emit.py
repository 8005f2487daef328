"""What is written into a graph: each call says of its value what it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from graphsurgery.capture import capture
from graphsurgery.passes.fold_affine import FoldAffine


class Then(nn.Module):
    """A layer, and what a function makes of its value."""

    def __init__(self, layer: nn.Module, what: Any) -> None:
        super().__init__()
        self.layer, self.what = layer, what

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.what(self.layer(torch.tanh(x)))
        return torch.tanh(y)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


MODELS: dict[str, tuple[Any, Tensor]] = {
    "one position": (lambda: Then(nn.Linear(5, 7), lambda y: y[:, 2]), numbers(2, 6, 5)),
    "some positions": (lambda: Then(nn.Linear(5, 7), lambda y: y[:, 1:6:2]), numbers(2, 6, 5)),
    "a crop": (lambda: Then(nn.Conv2d(2, 3, 1), lambda y: y[:, :, 1:-2, 3]), numbers(2, 2, 6, 7)),
    "an uneven pad": (
        lambda: Then(nn.ZeroPad2d((1, 2, 0, 1)), nn.Conv2d(2, 3, 3, stride=2).double()),
        numbers(2, 2, 6, 7),
    ),
    "another layout": (lambda: Then(nn.Linear(5, 7), lambda y: y.transpose(1, 2) * 2), numbers(2, 6, 5)),
    "two axes": (lambda: Then(nn.Linear(5, 6), lambda y: y.unflatten(2, (2, 3)) * 2 + 1), numbers(2, 6, 5)),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_call_that_is_written_tells_the_shape_and_dtype_of_its_value(name: str) -> None:
    build, x = MODELS[name]
    torch.manual_seed(0)
    model = build().double().eval()
    result = FoldAffine().run(capture(model, (x,)))
    assert result.changes
    seen = 0

    class Compare(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            nonlocal seen
            value = super().run_node(n)
            if n.op == "call_function" and isinstance(value, Tensor):
                told = n.meta["val"]
                sizes = [want for want in told.shape if isinstance(want, int)]
                assert len(told.shape) == value.ndim, n
                assert [
                    g for w, g in zip(told.shape, value.shape, strict=True) if isinstance(w, int)
                ] == sizes, n
                assert told.dtype == value.dtype
                seen += 1
            return value

    for batch in (2, 3):
        rows = x[torch.arange(batch) % 2]
        torch.testing.assert_close(
            # float64, where a fold rounds sums of its own
            Compare(result.graph_module).run(rows),
            model(rows),
            rtol=1e-10,
            atol=1e-12,
        )
    assert seen >= 4


def test_a_take_tells_what_it_leaves() -> None:
    """The first two cases above are written with one."""
    for name, ops in (("one position", "select"), ("some positions", "slice")):
        build, x = MODELS[name]
        graph = FoldAffine().run(capture(build().double().eval(), (x,))).graph_module.graph
        assert any(ops in str(node.target) for node in graph.nodes), name
