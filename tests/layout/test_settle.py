"""As few permutes as a choice of orders allows, each turned call certified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from swapping import ops, seeded
from torch import Tensor, nn
from torch.nn import functional as F

from graphsurgery.affine.certify import LIMIT
from graphsurgery.capture import capture
from graphsurgery.graph import copy_graph_module, structural_hash
from graphsurgery.layout import norms, rules
from graphsurgery.layout.settle import permutes, settle

IMAGE = torch.randn(2, 4, 7, 6, generator=torch.Generator().manual_seed(1)).double()


class Call(nn.Module):
    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.function = nn.ModuleList(layers), function

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.layers)


def settled(function: Callable[..., Any], *layers: nn.Module, **options: Any) -> tuple[int, int, list[str]]:
    """Permutes before and after, and the calls after; the values are compared."""
    model = seeded(lambda: Call(function, *layers)).double()
    gm = capture(model, (IMAGE,))
    work = copy_graph_module(gm)
    done = settle(work, **options)
    assert done.residual <= LIMIT
    work.graph.lint()
    work.recompile()
    for batch in (1, 3):
        x = torch.randn(batch, *IMAGE.shape[1:], dtype=torch.float64)
        # float64 on values about one; a turned kernel or norm may add in another order
        assert torch.allclose(work(x), gm(x), rtol=1e-12, atol=1e-12)
    assert done.changed is (structural_hash(work) != structural_hash(gm))
    return len(permutes(gm)), len(permutes(work)), ops(work)


def last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: first(torch.relu(last(x))), 0),
        (lambda x: first(last(x) + last(x.tanh())), 0),
        (lambda x: first(last(x).softmax(-1)), 0),
        (lambda x: first(torch.cat([last(x), last(x.exp())], -1)), 0),
        (lambda x: first(F.pad(last(x), (1, 0, 2, 0))), 0),
        (lambda x: last(x).mean((1, 2)), 0),
        (lambda x: last(x).flatten(1, 2).sum(1), 0),
        (lambda x: last(x)[:, 0, 0], 0),
        (lambda x: first(last(x).unflatten(-1, (2, 2)).roll(1, -1).flatten(-2)), 0),
        (lambda x: last(x).flatten(1), 1),
        (lambda x: last(x) @ last(x).transpose(2, 3), 2),
        (lambda x: x[..., :6, :] + x[..., :6, :].transpose(2, 3), 1),
    ],
)
def test_permutes_that_are_left(function: Callable[[Tensor], Tensor], left: int) -> None:
    before, after, _ = settled(function)
    assert after == left <= before


def test_a_layer_norm_between_permutes_by_hand() -> None:
    before, after, calls = settled(lambda x, norm: first(norm(last(x))), nn.LayerNorm(4))
    assert (before, after) == (2, 0)
    assert "layer_norm" not in calls
    kept = settled(lambda x, norm: first(norm(last(x))), nn.LayerNorm(4), norm_prices={})
    assert kept[1] == 2
    dear = settled(lambda x, norm: first(norm(last(x))), nn.LayerNorm(4), norm_prices={"layer_norm": 2.5})
    assert dear[1] == 2


@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_norm_by_hand_is_recognised(affine: bool) -> None:
    norm = nn.LayerNorm(4, eps=1e-3, elementwise_affine=affine)
    gm = capture(seeded(lambda: Call(lambda x, n: first(n(last(x))), norm)).double(), (IMAGE,))
    assert settle(gm).changed
    gm.recompile()
    wanted = gm(IMAGE)
    assert norms.lift(gm, ("layer_norm",)) == 1
    gm.recompile()
    assert [name for name in ops(gm) if name not in ("permute", "transpose")] == ["layer_norm"]
    # a norm by hand and the kernel of torch add in another order, in float64
    assert torch.allclose(gm(IMAGE), wanted, rtol=1e-12, atol=1e-12)


def by_hand(x: Tensor, other: int = 1, rest: float = 0.0) -> Tensor:
    centred = x - x.mean([1], True)
    value = centred * torch.rsqrt((centred * centred).mean([other], True) + 1e-3)
    return value + centred if rest else value


@pytest.mark.parametrize(
    "function",
    [
        lambda x: by_hand(x, other=2),
        lambda x: by_hand(x, rest=1.0),  # a part of it is read elsewhere
        lambda x: (x - x.mean([1], True)) * torch.rsqrt((x * x).mean([1], True) + 1e-3),
    ],
)
def test_what_is_no_norm_is_not_taken_for_one(function: Callable[[Tensor], Tensor]) -> None:
    gm = capture(Call(function), (IMAGE,))
    before, wanted = structural_hash(gm), gm(IMAGE)
    found = norms.lift(gm, ("layer_norm",))
    gm.recompile()
    assert found == 0
    assert structural_hash(gm) == before
    assert torch.equal(gm(IMAGE), wanted)


def test_a_batch_norm_between_permutes() -> None:
    before, after, calls = settled(
        lambda x, a, n, b: first(b(last(n(first(a(last(x))))))),
        *(nn.Linear(4, 4), nn.BatchNorm2d(4)),
        nn.Linear(4, 4),
    )
    assert (before, after) == (4, 2)
    assert calls.count("reshape") == 2


def test_the_number_of_symbols_is_kept() -> None:
    """Fake kernels may take the batch for the example's where it is free."""
    gm = capture(Call(lambda x: first(F.pad(last(x), (1, 0, 2, 0)).log_softmax(-1))), (IMAGE,))
    assert settle(gm).changed
    sizes = {str(n.meta["val"].shape[0]) for n in gm.graph.nodes if n.op == "call_function"}
    assert len(sizes) == 1
    assert not sizes.pop().isdigit()


def test_detects_a_call_that_is_written_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(writer: Any, node: Any, mode: Any, rank: int) -> Any:
        kept = mode.reads.index(2)
        return writer.call(node.target, writer.read(node.args[0], mode.reads), kept, *node.args[2:])

    monkeypatch.setattr(rules, "_with_axes", wrong)
    gm = capture(Call(lambda x: first(last(x).softmax(-1))), (IMAGE,))
    assert settle(gm).residual > 1e-3


def test_detects_one_coefficient_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    real = norms._layer_norm

    def off(writer: Any, node: Any, given: Any, order: Any) -> Any:
        return real(writer, node, {**given, "eps": given["eps"] * (1 + 1e-3)}, order)

    monkeypatch.setattr(norms, "_layer_norm", off)
    gm = capture(
        seeded(lambda: Call(lambda x, n: first(n(last(x))), nn.LayerNorm(4, eps=1e-2))), (IMAGE.float(),)
    )
    assert settle(gm).residual > LIMIT
