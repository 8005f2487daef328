"""fold-embedding: what goes into a table, what stays, and why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_chains import Call, Constant, MatMul, warmed
from torch import Tensor, fx, nn

import graphsurgery as gs
import graphsurgery.passes.fold_embedding as fold_embedding
from graphsurgery.affine.certify import LIMIT
from graphsurgery.capture import capture
from graphsurgery.cost import graph_cost, op_name
from graphsurgery.graph import annotate, get_attr_value, structural_hash
from graphsurgery.passes.fold_embedding import FoldEmbedding
from graphsurgery.restore import restore
from graphsurgery.rewrite.contracts import PassResult

IDS = torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(0))


def sequence(*layers: nn.Module | Callable[[Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(layer if isinstance(layer, nn.Module) else Call(layer) for layer in layers))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            warmed(module)
    return model.eval()


def fold(model: nn.Module, ids: Tensor = IDS) -> PassResult:
    """Fold in float64, compare on every row of the table and at another batch, and run the pass again."""
    model = copy.deepcopy(model).double()
    gm = capture(model, (ids,))
    before = structural_hash(gm)
    result = FoldEmbedding().run(gm)
    assert structural_hash(gm) == before, "the pass changed the graph that it was given"
    every = torch.arange(11).repeat(3)[: 3 * ids[0].numel()].reshape(3, *ids.shape[1:])
    for given in (ids, every, ids[:1]):
        with torch.no_grad():
            expected, got = model(given), result.graph_module(given)
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()
    again = FoldEmbedding().run(result.graph_module)
    assert not again.changes, "a second run found something"
    assert structural_hash(again.graph_module) == structural_hash(result.graph_module)
    old, new = graph_cost(gm), graph_cost(result.graph_module)
    assert all(a <= b for a, b in zip(new.figures(), old.figures(), strict=True))
    for change in result.changes:
        assert change.residual is not None
        assert change.residual <= LIMIT
    return result


def unchanged(model: nn.Module, ids: Tensor = IDS) -> PassResult:
    result = fold(model, ids)
    assert not result.changes
    assert structural_hash(result.graph_module) == structural_hash(
        capture(copy.deepcopy(model).double(), (ids,))
    )
    return result


def ops(gm: fx.GraphModule) -> list[str]:
    return [op_name(node) for node in gm.graph.nodes if node.op == "call_function"]


def codes(result: PassResult) -> list[str]:
    return [refusal.code for refusal in result.refusals]


# -- 1. folds --------------------------------------------------------------------------------------------

CHAINS: dict[str, Callable[[], list[Any]]] = {
    "linear": lambda: [nn.Linear(8, 4)],
    "linear-no-bias": lambda: [nn.Linear(8, 8, bias=False)],
    "matmul": lambda: [MatMul(8, 4, left=False)],
    "scalar": lambda: [lambda x: x * 8**0.5],
    "scale": lambda: [Constant("mul", torch.rand(8) + 0.5)],
    "scale-of-rank-3": lambda: [Constant("div", torch.rand(1, 1, 8) + 0.5)],
    "shift": lambda: [Constant("rsub", torch.randn(8))],
    "dropout-between": lambda: [
        nn.Dropout(0.2),
        nn.Linear(8, 4),
        nn.Dropout(0.2),
        Constant("add", torch.randn(4)),
    ],
    "wide-inside": lambda: [nn.Linear(8, 32), nn.Linear(32, 6), nn.Linear(6, 8)],
}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("padding_idx", [None, 3], ids=["plain", "padding-idx"])
def test_folds(chain: str, padding_idx: int | None) -> None:
    model = sequence(nn.Embedding(11, 8, padding_idx=padding_idx), *CHAINS[chain](), nn.Tanh())
    result = fold(model)
    assert ops(result.graph_module) == ["embedding", "tanh"]
    (change,) = result.changes
    assert change.parameters == ("0.weight",)
    assert change.kind.startswith("embedding+")
    assert change.after[0].module == "0"


def test_folds_a_norm_over_features() -> None:
    model = sequence(nn.Embedding(11, 8), nn.BatchNorm1d(8), nn.Tanh())
    assert ops(fold(model, IDS[:, 0]).graph_module) == ["embedding", "tanh"]


def test_the_row_of_the_padding_index_is_a_row() -> None:
    model = sequence(nn.Embedding(11, 8, padding_idx=3), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[3] = 0
    result = fold(model)
    table = get_attr_value(result.graph_module, "0.weight")
    assert torch.equal(table[3], model[1].bias.detach().to(table.dtype))  # nothing is added to the bias
    restored = restore(result.graph_module)
    assert restored.get_submodule("0").padding_idx == 3
    assert list(restored.state_dict()) == ["0.weight"]


def test_folds_the_part_that_does_not_widen_the_table() -> None:
    model = sequence(nn.Embedding(11, 8), nn.Linear(8, 6), nn.Linear(6, 9))
    result = fold(model)
    assert ops(result.graph_module) == ["embedding", "linear"]
    assert codes(result) == ["table-grows"]


def test_folds_a_computed_table() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.scale = nn.Parameter(torch.randn(11, 8)), nn.Parameter(torch.rand(11, 1))
            self.fc = nn.Linear(8, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return torch.tanh(self.fc(F.embedding(ids, self.table * self.scale)))

    torch.manual_seed(0)
    result = fold(Net().eval())
    assert ops(result.graph_module) == ["embedding", "tanh"]


def test_a_large_table_is_folded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_embedding, "_CHUNK", 24)
    assert ops(fold(sequence(nn.Embedding(11, 8), nn.Linear(8, 4))).graph_module) == ["embedding"]


def test_a_layer_used_elsewhere_too_is_still_folded() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.fc = nn.Embedding(11, 8), nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return self.fc(torch.relu(self.fc(self.emb(ids))))

    torch.manual_seed(0)
    result = fold(Net().eval())
    assert ops(result.graph_module) == ["embedding", "relu", "linear"]


# -- 2. leaves alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chain",
    [
        lambda: [nn.LayerNorm(8), nn.Linear(8, 4)],
        lambda: [nn.ReLU()],
        lambda: [Constant("add", torch.randn(7, 8))],  # a position has its own row
        lambda: [Constant("mul", torch.rand(7, 1))],
        lambda: [nn.Conv1d(7, 4, 1)],
        lambda: [nn.BatchNorm1d(7)],
        lambda: [lambda x: x.transpose(1, 2), nn.Linear(7, 4)],
        lambda: [lambda x: x * x],
    ],
)
def test_noop_on(chain: Callable[[], list[Any]]) -> None:
    assert not unchanged(sequence(nn.Embedding(11, 8), *chain())).refusals


# -- 3. refuses ------------------------------------------------------------------------------------------


def test_refuses_a_table_that_grows() -> None:
    (refusal,) = unchanged(sequence(nn.Embedding(11, 8), nn.Linear(8, 9))).refusals
    assert refusal.code == "table-grows"
    assert refusal.cost_before is not None
    assert refusal.cost_after is not None
    assert refusal.cost_before.params == 11 * 8 + 81
    assert refusal.cost_after.params == 11 * 9
    assert str(refusal.cost_before) in refusal.reason
    assert str(refusal.cost_after) in refusal.reason


class Tied(nn.Module):
    """A table that is read by something else."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.emb, self.fc = how, nn.Embedding(11, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        if how == "tied":
            self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.fc(self.emb(ids)))
        if self.how == "tied":
            return self.head(x)
        if self.how == "functional":
            return x @ self.emb.weight.T
        if self.how == "twice":
            return x + torch.tanh(self.fc(self.emb(ids + 0)))
        return x.sum() + self.emb.weight[:3].sum()


@pytest.mark.parametrize("how", ["tied", "functional", "twice", "sliced"])
def test_refuses_a_shared_table(how: str) -> None:
    torch.manual_seed(0)
    gm = capture(Tied(how).eval(), (IDS,))
    result = FoldEmbedding().run(gm)
    assert not result.changes
    assert set(codes(result)) == {"shared-table"}
    assert all(refusal.cost_before and refusal.cost_after for refusal in result.refusals)
    assert structural_hash(result.graph_module) == structural_hash(gm)


def test_refuses_several_users() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.q, self.k = nn.Embedding(11, 8), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.emb(ids)
            return self.q(x) * self.k(x)

    torch.manual_seed(0)
    assert codes(unchanged(Net().eval())) == ["several-users"]


def test_refuses_max_norm() -> None:
    """Capture declines a model that writes its table; a traced graph may still hold the op."""
    model = sequence(nn.Embedding(11, 8), nn.Linear(8, 4))
    gm = capture(model, (IDS,))
    (lookup,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)
    table, ids = lookup.args[:2]
    with gm.graph.inserting_before(lookup):
        renorm = gm.graph.call_function(torch.ops.aten.embedding_renorm.default, (table, ids, 1.0, 2.0))
    annotate(gm, renorm)
    lookup.replace_input_with(table, renorm)
    gm.recompile()
    result = FoldEmbedding().run(gm)
    assert codes(result) == ["mutated"]
    assert not result.changes


def test_refuses_what_is_not_finite_or_does_not_fit() -> None:
    for value, code in ((torch.inf, "not-finite"), (6e4, "overflow")):
        model = sequence(nn.Embedding(11, 8), nn.Linear(8, 4)).half()
        with torch.no_grad():
            model[0].weight[5] = 1
            model[1].weight[2] = value
        result = FoldEmbedding().run(capture(model, (IDS,)))
        assert codes(result) == [code]
        assert not result.changes


# -- 4. dtypes, the way through, runtimes ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_any_float_dtype(dtype: torch.dtype) -> None:
    model = sequence(nn.Embedding(11, 8), nn.Linear(8, 4), nn.Tanh()).to(dtype)
    result = gs.optimize(model, IDS, passes=["fold-embedding"])
    assert len(result.report.changes) == 1
    assert result.report.verification is not None
    assert result.report.verification.ok
    assert result.module(IDS).dtype == dtype
    table = result.module.state_dict()["0.weight"]
    with torch.no_grad():
        exact = copy.deepcopy(model).double()[1](model[0].weight.double())
    assert torch.equal(table, exact.to(dtype))  # rounded once


def test_the_callers_model_is_untouched() -> None:
    model = sequence(nn.Embedding(11, 8), nn.Linear(8, 4))
    state = copy.deepcopy(model.state_dict())
    gs.optimize(model, IDS)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_runs_by_default_behind_folding() -> None:
    names = [item.name for item in gs.passes.default_passes()]
    assert names.index("fold-embedding") > names.index("fold-affine")


def test_onnxruntime_agrees(tmp_path: Path) -> None:
    model = sequence(nn.Embedding(11, 8), lambda x: x * 3, nn.Dropout(0.1), nn.Linear(8, 4), nn.GELU())
    result = gs.optimize(model, IDS)
    assert ops(result.graph_module) == ["embedding", "gelu"]
    result.export_onnx(tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").is_file()


# -- 5. a wrong fold is caught ---------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 3, 10])
def test_detects_one_coefficient_that_is_off(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fold_embedding._apply

    def off(scope: Any, found: Any, rows: Tensor) -> Tensor:
        result = real(scope, found, rows).clone()
        if len(rows) == 11:
            result[row, 2] *= 1 + 1e-3
        return result

    monkeypatch.setattr(fold_embedding, "_apply", off)
    gm = capture(sequence(nn.Embedding(11, 8), nn.Linear(8, 4)), (IDS,))
    result = FoldEmbedding().run(gm)
    assert codes(result) == ["certificate"]
    assert not result.changes
    assert structural_hash(result.graph_module) == structural_hash(gm)
