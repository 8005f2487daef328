"""merge-siblings: what becomes one layer, what stays apart, and why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_chains import Call
from torch import Tensor, fx, nn

import graphsurgery as gs
import graphsurgery.passes.merge_siblings as merge_siblings
from graphsurgery.affine.certify import LIMIT
from graphsurgery.capture import capture
from graphsurgery.cost import Cost, graph_cost, op_name
from graphsurgery.errors import PassError
from graphsurgery.graph import structural_hash
from graphsurgery.passes.merge_siblings import MergeSiblings
from graphsurgery.restore import restore
from graphsurgery.rewrite.contracts import PassResult

IMAGE = torch.randn(2, 4, 7, 6, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))


class Attention(nn.Module):
    """Attention with q, k and v apart; the values may come from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 4)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(memory), self.v(memory)
        return F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)


class Block(nn.Module):
    def __init__(self, cross: bool = False) -> None:
        super().__init__()
        self.attn, self.cross = Attention(), cross

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, torch.tanh(x) if self.cross else x)


class Heads(nn.Module):
    """Layers side by side, their outputs activated and summed over their features, or returned."""

    def __init__(self, *heads: nn.Module, returned: bool = False) -> None:
        super().__init__()
        self.heads, self.returned = nn.ModuleList(heads), returned

    def forward(self, x: Tensor) -> Any:
        x = torch.tanh(x)
        outs = [head(x) for head in self.heads]
        return tuple(outs) if self.returned else sum(torch.relu(out).flatten(1).sum(1) for out in outs)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def merge(model: nn.Module, x: Tensor) -> PassResult:
    """Merge in float64, compare at two batch sizes with the model itself, and run the pass again."""
    model = copy.deepcopy(model).double()
    gm = capture(model, (x.double(),))
    before = structural_hash(gm)
    result = MergeSiblings().run(gm)
    assert structural_hash(gm) == before, "the pass changed the graph that it was given"
    assert result.changes or structural_hash(result.graph_module) == before
    restored = restore(result.graph_module)
    for batch in (1, 3):
        y = torch.randn(
            batch, *x.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(batch)
        )
        with torch.no_grad():
            expected, got, module = model(y), result.graph_module(y), restored(y)
        for a, b, c in zip(
            *(v if isinstance(v, tuple) else (v,) for v in (expected, got, module)), strict=True
        ):
            assert (b - a).abs().max() <= 1e-12 * a.abs().max()
            assert (c - a).abs().max() <= 1e-12 * a.abs().max()
            assert b.stride() == a.stride()
    again = MergeSiblings().run(result.graph_module)
    assert not again.changes, "a second run found something"
    assert structural_hash(again.graph_module) == structural_hash(result.graph_module)
    spent, named = graph_cost(result.graph_module) - graph_cost(gm), Cost()
    for change in result.changes:
        named += change.cost_after - change.cost_before
    assert spent == named, "the changes name what the graph costs more or less"
    for change in result.changes:
        assert change.residual is not None
        assert change.residual <= LIMIT
    return result


def ops(gm: fx.GraphModule) -> list[str]:
    return [op_name(node) for node in gm.graph.nodes if node.op == "call_function"]


def codes(result: PassResult) -> list[str]:
    return [refusal.code for refusal in result.refusals]


# -- 1. merges -------------------------------------------------------------------------------------------


def test_merges_q_k_and_v() -> None:
    result = merge(seeded(Block), TOKENS)
    assert ops(result.graph_module)[:3] == ["linear", "split_with_sizes", "getitem"]
    assert ops(result.graph_module).count("linear") == 1
    (change,) = result.changes
    assert change.kind == "linear+linear+linear"
    assert change.parameters == ("attn.q_k_v.weight", "attn.q_k_v.bias")
    assert [ref.module for ref in change.before] == ["attn.q", "attn.k", "attn.v"]
    assert change.cost_after.macs == change.cost_before.macs == 5 * 8 * 20
    assert change.cost_after.moved == 5 * 20
    assert set(restore(result.graph_module).state_dict()) == {"attn.q_k_v.weight", "attn.q_k_v.bias"}


@dataclass(frozen=True)
class Fewest:
    """Counts nodes, then operations."""

    name: str = "nodes"

    def score(self, cost: Cost) -> tuple[float, ...]:
        return (cost.nodes, cost.flops)


def test_a_cost_model_decides_when_it_is_given() -> None:
    model, x = seeded(Block), TOKENS
    gm = capture(model, (x,))
    by_flops = MergeSiblings(cost="flops").run(gm)
    assert not by_flops.changes
    (refusal,) = by_flops.refusals
    assert refusal.code == "costs-more"
    (change,) = MergeSiblings(cost=Fewest()).run(gm).changes
    assert str(change.cost_before) in refusal.reason
    assert str(change.cost_after) in refusal.reason
    assert change.cost_after.nodes < change.cost_before.nodes
    two = capture(seeded(lambda: Heads(nn.Linear(8, 3), nn.Linear(8, 2))), (x,))
    assert codes(MergeSiblings(cost=Fewest()).run(two)) == ["costs-more"], "a layer and a split are two too"


def test_it_is_a_default_pass_under_a_cost_model_that_may_find_it_cheaper() -> None:
    model, x = seeded(Block), TOKENS
    for options, linears in (({}, 3), ({"cost": "flops"}, 3), ({"cost": Fewest()}, 1)):
        result = gs.optimize(model, x, **options)
        assert ops(result.graph_module).count("linear") == linears, options


@dataclass(frozen=True)
class Broken:
    """Scores by any function."""

    by: Callable[[Cost], Any]
    name: str = "broken"

    def score(self, cost: Cost) -> Any:
        return self.by(cost)


def test_no_cost_model() -> None:
    with pytest.raises(PassError, match="there is no cost model named 'time'"):
        MergeSiblings(cost="time")
    with pytest.raises(PassError, match=r"the name of a cost model or a CostModel, got <class .*Fewest"):
        MergeSiblings(cost=Fewest)
    with pytest.raises(PassError, match=r"gives a tuple of numbers, got 0"):
        MergeSiblings(cost=Broken(lambda cost: cost.nodes))
    with pytest.raises(PassError, match=r"fails on a Cost of nothing: ZeroDivisionError"):
        MergeSiblings(cost=Broken(lambda cost: (cost.macs / cost.nodes,)))
    with pytest.raises(PassError, match="the name of a cost model or a CostModel, got 3"):
        gs.optimize(seeded(Block), TOKENS, cost=3)


@pytest.mark.parametrize(
    ("build", "x"),
    [
        (lambda: Heads(nn.Conv2d(4, 3, 1), nn.Conv2d(4, 5, 1, bias=False)), IMAGE),
        (lambda: Heads(nn.Conv2d(4, 3, 1, bias=False), nn.Conv2d(4, 5, 1, bias=False)), IMAGE),
        (lambda: Heads(nn.Conv2d(4, 3, 3, 2, 1), nn.Conv2d(4, 2, 3, 2, 1), nn.Conv2d(4, 1, 3, 2, 1)), IMAGE),
        (lambda: Heads(nn.Conv2d(4, 3, 3, dilation=2), nn.Conv2d(4, 3, 3, dilation=2)), IMAGE),
        (lambda: Heads(nn.Conv2d(4, 3, 3, padding="same"), nn.Conv2d(4, 2, 3, padding="same")), IMAGE),
        (lambda: Heads(nn.Conv1d(4, 3, 3), nn.Conv1d(4, 2, 3)), IMAGE[..., 0]),
        (
            lambda: Heads(nn.Conv3d(4, 3, 2), nn.Conv3d(4, 2, 2)),
            IMAGE.unsqueeze(-1).expand(-1, -1, -1, -1, 3),
        ),
        (lambda: Heads(nn.Linear(8, 3), nn.Linear(8, 3)), TOKENS[:, 0]),
    ],
    ids=["1x1", "no-bias", "strided", "dilated", "same", "1d", "3d", "linear"],
)
@pytest.mark.parametrize("returned", [False, True], ids=["read", "returned"])
def test_merges_heads(build: Callable[[], Heads], x: Tensor, returned: bool) -> None:
    model = seeded(build)
    model.returned = returned
    result = merge(model, x)
    (change,) = result.changes
    count = len(model.heads)
    assert change.parameters[0] == f"heads.{'_'.join(map(str, range(count)))}.weight"
    layers = [op for op in ops(result.graph_module) if op.startswith(("conv", "linear"))]
    assert len(layers) == 1
    assert ops(result.graph_module).count("clone") == (count if returned else 0)
    assert not result.refusals


def test_merges_bare_and_computed_weights() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2 = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(4, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(F.linear(x, self.w1)).sum(-1) + torch.relu(F.linear(x, self.w2 * 2)).sum(-1)

    (change,) = merge(seeded(Net), TOKENS).changes
    assert change.kind == "linear+linear"


def test_the_name_overwrites_nothing() -> None:
    class Taken(Block):
        def __init__(self) -> None:
            super().__init__()
            self.attn.q_k_v = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn.q_k_v(super().forward(x))

    model = seeded(Taken)
    result = merge(model, TOKENS)
    (change,) = result.changes
    assert change.parameters == ("attn.q_k_v_1.weight", "attn.q_k_v_1.bias")
    kept = restore(result.graph_module).state_dict()["attn.q_k_v.weight"]
    assert torch.equal(kept, model.attn.q_k_v.weight.double())


def test_merges_the_part_that_reads_one_value() -> None:
    result = merge(seeded(lambda: Block(cross=True)), TOKENS)
    (change,) = result.changes
    assert change.parameters[0] == "attn.k_v.weight"


# -- 2. leaves alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "x"),
    [
        (lambda: Heads(nn.Linear(8, 3)), TOKENS),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), TOKENS),
        (lambda: Heads(nn.Linear(8, 3), nn.ReLU()), TOKENS),
        (lambda: Heads(nn.Linear(8, 3), nn.Sequential(nn.Tanh(), nn.Sequential(nn.Linear(8, 8)))), TOKENS),
        (lambda: Heads(nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 1)), IMAGE),
        (lambda: Call(lambda x: x @ x.transpose(1, 2)), TOKENS),
    ],
)
def test_noop_on(build: Callable[[], nn.Module], x: Tensor) -> None:
    result = merge(seeded(build), x)
    assert not result.changes
    assert not result.refusals


def test_does_not_run_by_default() -> None:
    result = gs.optimize(seeded(Block), TOKENS)
    assert "merge-siblings" not in result.report.passes
    assert ops(result.graph_module).count("linear") == 3
    assert MergeSiblings not in {type(item) for item in gs.passes.default_passes()}


# -- 3. refuses ------------------------------------------------------------------------------------------


def test_refuses_tied_weights() -> None:
    model = seeded(lambda: Heads(nn.Linear(8, 3), nn.Linear(8, 3), nn.Linear(8, 3), nn.Linear(8, 3)))
    model.heads[1].weight = model.heads[3].weight
    result = merge(model, TOKENS)
    assert codes(result) == ["shared-weights"]
    assert [ref.module for ref in result.refusals[0].nodes] == ["heads.1", "heads.3"]
    (change,) = result.changes
    assert change.parameters[0] == "heads.0_2.weight"


def test_refuses_weights_that_are_read_elsewhere() -> None:
    class Net(Heads):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.heads[0].weight.sum()

    result = merge(seeded(lambda: Net(nn.Linear(8, 3), nn.Linear(8, 3))), TOKENS[:, 0])
    assert codes(result) == ["shared-weights"]
    assert not result.changes


def test_refuses_a_layer_that_is_called_twice() -> None:
    layer = nn.Linear(8, 3)
    result = merge(seeded(lambda: Heads(layer, layer)), TOKENS)
    assert codes(result) == ["shared-weights"]
    assert not result.changes


def test_refuses_different_inputs() -> None:
    result = merge(seeded(lambda: Block(cross=True)), TOKENS)
    assert "different-inputs" in codes(result)


def test_refuses_different_dtypes() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 3), nn.Linear(8, 3).half()

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.a(x)) + torch.relu(self.b(x.half())).float()

    result = MergeSiblings().run(capture(seeded(Net), (TOKENS,)))
    assert codes(result) == ["dtype"]
    assert not result.changes


@pytest.mark.parametrize(
    "build",
    [
        lambda: Heads(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)),
        lambda: Heads(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=2, dilation=2)),
        lambda: Heads(nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1, groups=2)),
    ],
    ids=["kernel", "dilation", "groups"],
)
def test_refuses_another_geometry(build: Callable[[], nn.Module]) -> None:
    result = merge(seeded(build), IMAGE)
    assert codes(result) == ["geometry"]
    assert not result.changes


def test_refuses_weights_that_are_not_finite() -> None:
    model = seeded(lambda: Heads(nn.Linear(8, 3), nn.Linear(8, 3)))
    with torch.no_grad():
        model.heads[1].weight[0, 0] = torch.inf
    result = MergeSiblings().run(capture(model, (TOKENS,)))
    assert codes(result) == ["not-finite"]
    assert not result.changes


# -- 4. dtypes, the way through, runtimes ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_any_float_dtype(dtype: torch.dtype) -> None:
    model = seeded(Block).to(dtype)
    result = gs.optimize(model, TOKENS.to(dtype), passes=["merge-siblings"])
    assert len(result.report.changes) == 1
    assert result.report.verification is not None
    assert result.report.verification.ok
    weight = result.module.state_dict()["attn.q_k_v.weight"]
    assert torch.equal(weight, torch.cat([model.attn.q.weight, model.attn.k.weight, model.attn.v.weight]))


def test_the_callers_model_is_untouched() -> None:
    model = seeded(Block)
    state = copy.deepcopy(model.state_dict())
    gs.optimize(model, TOKENS, passes=["merge-siblings"])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("build", "x"),
    [(Block, TOKENS), (lambda: Heads(nn.Conv2d(4, 3, 3), nn.Conv2d(4, 5, 3), returned=True), IMAGE)],
    ids=["attention", "heads"],
)
def test_onnxruntime_agrees(build: Callable[[], nn.Module], x: Tensor, tmp_path: Path) -> None:
    passes = [*gs.passes.default_passes(), "merge-siblings"]
    result = gs.optimize(seeded(build), x, passes=passes)
    assert [change.pass_name for change in result.report.changes if "+" in change.kind] == ["merge-siblings"]
    result.export_onnx(tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").is_file()


# -- 5. a wrong merge is caught --------------------------------------------------------------------------


@pytest.mark.parametrize("slot", ["weight", "bias"])
def test_detects_one_coefficient_that_is_off(slot: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = merge_siblings._slots

    def off(scope: Any, members: Any) -> dict[str, Tensor]:
        slots = real(scope, members)
        slots[slot] = slots[slot].clone()
        slots[slot].view(-1)[5] *= 1 + 1e-3
        return slots

    monkeypatch.setattr(merge_siblings, "_slots", off)
    gm = capture(seeded(lambda: Heads(nn.Linear(8, 3), nn.Linear(8, 4))), (TOKENS,))
    result = MergeSiblings().run(gm)
    assert codes(result) == ["certificate"]
    assert not result.changes
    assert structural_hash(result.graph_module) == structural_hash(gm)
