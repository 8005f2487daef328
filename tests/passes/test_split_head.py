"""split-head: what is split, what the parts are, what is refused, and that a wrong split is caught."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_chains import Call, warmed
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_manager import PassManager as TorchPassManager

import graphsurgery as gs
import graphsurgery.passes.split_head as split_head
from graphsurgery.affine.certify import LIMIT
from graphsurgery.capture import capture
from graphsurgery.cost import graph_cost, op_name
from graphsurgery.graph import structural_hash
from graphsurgery.passes.split_head import SplitHead
from graphsurgery.restore import restore

PARTS = ("class_features", "residual_features")
IMAGE = (3, 6, 5)


class Net(nn.Module):
    """A small trunk, with statistics that are not trivial, and the head that is given."""

    def __init__(self, head: nn.Module, pooled: bool = True, behind: Callable[[Tensor], Any] | None = None):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 12, 3, padding=1), warmed(nn.BatchNorm2d(12)), head
        self.pooled, self.behind = pooled, behind

    def features(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return x.mean((2, 3)) if self.pooled else x

    def forward(self, x: Tensor) -> Any:
        out = self.head(self.features(x))
        return out if self.behind is None else self.behind(out)


def tied(head: nn.Linear) -> nn.Linear:
    with torch.no_grad():
        head.weight[1], head.weight[2] = head.weight[0], 2 * head.weight[0]
        if head.bias is not None:
            head.bias[1], head.bias[2] = head.bias[0], 2 * head.bias[0]
    return head


def matmul(weight: Tensor) -> nn.Module:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(weight)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w

    return Product()


def seeded(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return build().eval().to(dtype)


def images(batch: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(batch, *IMAGE, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def split(model: nn.Module, item: SplitHead | None = None) -> gs.PassResult:
    """Split, with everything that a pass owes checked."""
    item = item or SplitHead()
    gm = capture(model, (images(2, next(model.parameters()).dtype),))
    before = structural_hash(gm)
    result = item.run(gm)
    assert structural_hash(gm) == before, "the pass changed the graph that it was given"
    if not result.changes:
        assert structural_hash(result.graph_module) == before
        return result
    (change,) = result.changes
    assert change.residual is not None
    assert change.residual <= LIMIT
    spent = graph_cost(result.graph_module) - graph_cost(gm)
    named = change.cost_after - change.cost_before
    assert (spent.macs, spent.params) == (named.macs, named.params)
    again = item.run(result.graph_module)
    assert not again.changes, "a second run found something"
    return result


def ops(gm: fx.GraphModule) -> list[str]:
    return [op_name(node) for node in gm.graph.nodes if node.op == "call_function"]


def last(value: Tensor) -> Tensor:
    """Features along the last axis."""
    return value if value.dim() == 2 else value.movedim(1, -1)


HEADS: dict[str, tuple[Callable[[], nn.Module], bool, int, int]] = {
    # head, whether it reads pooled features, rank, width of the residual part
    "linear": (lambda: nn.Linear(12, 5), True, 5, 8),
    "no-bias": (lambda: nn.Linear(12, 5, bias=False), True, 5, 7),
    "one-class": (lambda: nn.Linear(12, 1), True, 1, 12),
    "more-classes": (lambda: nn.Linear(12, 30), True, 13, 0),
    "as-many-classes": (lambda: nn.Linear(12, 12, bias=False), True, 12, 0),
    "tied": (lambda: tied(nn.Linear(12, 5)), True, 3, 10),
    "tied-more-classes": (lambda: tied(nn.Linear(12, 14)), True, 12, 1),
    "conv1x1": (lambda: nn.Conv2d(12, 5, 1), False, 5, 8),
    "conv1x1-no-bias": (lambda: nn.Conv2d(12, 5, 1, bias=False), False, 5, 7),
    "conv1x1-more-classes": (lambda: nn.Conv2d(12, 30, 1), False, 13, 0),
    "matmul": (lambda: matmul(torch.randn(12, 5)), True, 5, 7),
}


# -- 1. splits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_head", [True, False], ids=["kept", "through-R"])
@pytest.mark.parametrize("name", HEADS)
def test_splits(name: str, keep_head: bool) -> None:
    build, pooled, rank, rest = HEADS[name]
    model = seeded(lambda: Net(build(), pooled))
    result = split(model, SplitHead(keep_head=keep_head))
    gm, module = result.graph_module, restore(result.graph_module)
    assert ops(gm).count("matmul") == (name == "matmul" and keep_head)
    for batch in (1, 3):
        x = images(batch, seed=batch)
        with torch.no_grad():
            found, wanted, features = module(x), model(x), last(model.features(x))
            assert set(gm(x)) == set(found)
        assert set(found) == {"logits", "class_features"} | ({"residual_features"} if rest else set())
        if keep_head:
            assert torch.equal(found["logits"], wanted)
        assert (found["logits"] - wanted).abs().max() <= 1e-13 * wanted.abs().max()
        parts = [last(found[part]) for part in PARTS if part in found]
        assert [part.shape[-1] for part in parts] == [rank, rest][: len(parts)]
        # norms add up, to that of the features and the constant
        bias = getattr(model.head, "bias", None) is not None
        norm = features.square().sum(-1) + bias
        assert (sum(part.square().sum(-1) for part in parts) - norm).abs().max() <= 1e-12 * norm.max()


@pytest.mark.parametrize("name", ["linear", "no-bias", "tied", "conv1x1"])
def test_residual_features_cannot_reach_the_logits(name: str) -> None:
    """Features are moved along the residual directions of the stored layers: the head does not see it."""
    build, pooled, _, rest = HEADS[name]
    model = seeded(lambda: Net(build(), pooled))
    module = restore(split(model).graph_module)
    layer = module.get_submodule("head_residual_features")
    rows = layer.weight.detach().flatten(1)
    bias = layer.bias.detach() if layer.bias is not None else torch.zeros(rest, dtype=rows.dtype)
    # moves that leave the constant as it is
    free = (
        torch.linalg.svd(bias.unsqueeze(0)).Vh[1:]
        if model.head.bias is not None
        else torch.eye(rest).to(rows)
    )
    assert len(free) >= rest - 1
    x = images(3)
    with torch.no_grad():
        features = last(model.features(x))
        mix = torch.randn(*features.shape[:-1], len(free), dtype=rows.dtype)
        moved = features + 10 * mix @ free @ rows
        shape = (lambda f: f) if pooled else (lambda f: f.movedim(-1, 1))
        before, after = model.head(shape(features)), model.head(shape(moved))
        parts = [module.get_submodule(f"head_{part}") for part in PARTS]
        here, there = ([last(part(shape(f))) for part in parts] for f in (features, moved))
    assert (there[1] - here[1]).abs().max() > 1
    assert (moved - features).abs().max() > 1
    assert (after - before).abs().max() <= 1e-13 * moved.abs().max()
    assert (there[0] - here[0]).abs().max() <= 1e-13 * moved.abs().max()
    # and the other way round: a move along the class-specific directions is seen
    rows = parts[0].weight.detach().flatten(1)
    with torch.no_grad():
        seen = model.head(shape(features + torch.randn(*features.shape[:-1], len(rows)).to(rows) @ rows))
    assert (seen - before).abs().max() > 1e-3


def test_change_tells_rank_costs_and_names() -> None:
    (change,) = split(seeded(lambda: Net(nn.Linear(12, 5)))).changes
    assert change.kind == "split-head"
    assert change.parameters == tuple(f"head_{part}.{slot}" for part in PARTS for slot in ("weight", "bias"))
    assert change.cost_before.macs == 12 * 5
    assert change.cost_after.macs == 12 * 5 + 12 * 13
    assert [ref.module for ref in change.before] == ["head"]
    assert "5 class-specific and 8 residual" in change.detail
    assert "bit for bit" in change.detail
    (change,) = split(seeded(lambda: Net(nn.Linear(12, 5))), SplitHead(keep_head=False)).changes
    assert change.cost_after.macs == 12 * 13 + 5 * 5
    assert "head_logits.weight" in change.parameters
    (change,) = split(seeded(lambda: Net(nn.Linear(12, 30)))).changes
    assert "nothing is residual" in change.detail


def test_a_head_by_name_and_the_last_by_itself() -> None:
    model = seeded(lambda: Net(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))))
    by_itself, by_name = split(model), split(model, SplitHead(head="head.2"))
    assert structural_hash(by_itself.graph_module) == structural_hash(by_name.graph_module)
    first = split(model, SplitHead(head="head.0"))
    found = first.graph_module(images(2))
    assert set(found) == {"output", "logits", *PARTS}
    assert found["logits"].shape == (2, 8)
    assert torch.equal(found["output"], model(images(2)))


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(x.mean((2, 3))), self.w, self.b)


def test_bare_and_computed_weights() -> None:
    assert split(seeded(Bare), SplitHead(head="w")).changes

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(x.mean((2, 3))))

    model = seeded(Normed)
    result = split(model, SplitHead(head="head"))
    assert torch.equal(result.graph_module(images(2))["logits"], model(images(2)))


# -- outputs


@pytest.mark.parametrize(
    ("behind", "names"),
    [
        (lambda y: torch.softmax(y, 1), ("output", "logits", *PARTS)),
        (lambda y: {"out": y, "twice": 2 * y}, ("out", "twice", "logits", *PARTS)),
        (lambda y: {"logits": y}, ("logits", *PARTS)),
        (lambda y: {"logits": y / 2, "more": (y + 1, None)}, ("logits", "more_0", "more_1", *PARTS)),
        (lambda y: (y, y.argmax(1)), ("output_0", "output_1", "logits", *PARTS)),
        (lambda y: [y], ("output_0", "logits", *PARTS)),
    ],
    ids=["softmax", "dict", "logits", "logits-of-its-own", "tuple", "list"],
)
@pytest.mark.parametrize("keep_head", [True, False], ids=["kept", "through-R"])
def test_keeps_the_other_outputs(
    behind: Callable[[Tensor], Any], names: tuple[str, ...], keep_head: bool
) -> None:
    model = seeded(lambda: Net(nn.Linear(12, 5), behind=behind))
    result = split(model, SplitHead(keep_head=keep_head))
    x = images(3)
    with torch.no_grad():
        found, wanted = restore(result.graph_module)(x), torch.utils._pytree.tree_leaves(model(x))
    assert tuple(found) == names
    for name, value in zip(names, wanted, strict=False):
        assert (value is None) == (found[name] is None)
        assert value is None or (found[name] - value).abs().max() <= (0 if keep_head else 1e-13)
    if len(names) - len(PARTS) > len(wanted):
        assert (found["logits"] - model.head(model.features(x))).abs().max() <= 1e-13
        leaves = [found[name] for name in names if isinstance(found[name], Tensor)]
        assert len({leaf.data_ptr() for leaf in leaves}) == len(leaves), "two outputs share memory"


def test_the_info_and_signature_follow() -> None:
    result = split(seeded(lambda: Net(nn.Linear(12, 5))))
    info = result.graph_module.meta["graphsurgery"]
    assert info.output_names == ("logits", *PARTS)
    assert info.dynamic_batch


def test_runs_in_managers() -> None:
    model = seeded(lambda: Net(nn.Linear(12, 5)))
    gm = capture(model, (images(2),))
    for inputs in (None, gm.meta["graphsurgery"]):
        result = gs.PassManager([SplitHead()], strict=True)(gm, inputs)
        assert len(result.changes) == 1
        assert not result.refusals
    subspace = result.graph_module.meta[split_head.SUBSPACE_KEY]
    assert (subspace.rank, subspace.width) == (5, 13)
    made = TorchPassManager([SplitHead()])(gm)
    assert "class_features" in made.graph_module(images(2))


# -- 2. leaves alone ------------------------------------------------------------------------------------


def test_does_not_run_by_default_nor_in_optimize() -> None:
    assert SplitHead not in {type(item) for item in gs.passes.default_passes()}
    with pytest.raises(gs.PassError, match="changes inputs or outputs of the model, which optimize keeps"):
        gs.optimize(seeded(lambda: Net(nn.Linear(12, 5))), images(2), passes=["split-head"])


# -- 3. refuses -----------------------------------------------------------------------------------------


def zeroed(head: nn.Linear) -> nn.Linear:
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head


def infinite(head: nn.Linear) -> nn.Linear:
    with torch.no_grad():
        head.weight[0, 0] = torch.inf
    return head


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 5), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + torch.relu(self.b(x))


class Several(nn.Module):
    """Two heads of one trunk, their outputs under the names that are given."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.a, self.b, self.names = nn.Linear(12, 5), nn.Linear(12, 4), names

    def forward(self, x: Tensor) -> Any:
        found = self.a(x), self.b(x)
        return dict(zip(self.names, found, strict=True)) if self.names else found


@pytest.mark.parametrize(("names", "chosen"), [(("aux", "out"), "head.b"), (("logits", "boxes"), "head.a")])
def test_the_main_output_of_several_is_known_by_its_name(names: tuple[str, str], chosen: str) -> None:
    result = split(seeded(lambda: Net(Several(*names))))
    (change,) = result.changes
    assert [ref.module for ref in change.before] == [chosen]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.fc(x)))


@pytest.mark.parametrize(
    ("build", "head", "code", "said"),
    [
        (lambda: Net(nn.Linear(12, 5)), "haed", "no-head", "did you mean 'head'"),
        (lambda: Net(nn.Sequential(nn.Linear(12, 5))), "head", "no-head", "'head.0'"),
        (lambda: Call(torch.relu), None, "no-head", "nothing multiplies"),
        (lambda: Call(lambda x: x.argmax(1)), None, "no-head", "no output of floating-point"),
        (lambda: Net(nn.Conv2d(12, 5, 3), False), None, "not-a-head", r"weight (5, 12, 3, 3)"),
        (lambda: Net(nn.Conv2d(12, 5, 1, stride=2), False), "head", "not-a-head", "of stride 1"),
        (lambda: Net(nn.Conv2d(12, 4, 1, groups=2), False), "head", "grouped", "2 groups"),
        (lambda: Net(Twice()), "head.fc", "several-calls", "2 calls"),
        (lambda: Net(Several()), None, "several-heads", "'head.a', 'head.b'"),
        (lambda: Net(Several("cls", "box")), None, "several-heads", "name one"),
        (lambda: Net(nn.Linear(12, 5)), 0, "no-head", "got 0"),
        (
            lambda: Net(Call(lambda x: torch.addmm(torch.ones(5).to(x), x, torch.ones(12, 5).to(x)))),
            None,
            "not-a-head",
            "(12, 5)",
        ),
        (lambda: Net(Skip()), None, "bypassed", "'head.a'"),
        (lambda: Net(zeroed(nn.Linear(12, 5))), None, "zero-weights", "all zero"),
        (lambda: Net(infinite(nn.Linear(12, 5))), None, "not-finite", "NaN or infinity"),
        (
            lambda: Net(nn.Linear(12, 5), behind=lambda y: {"residual_features": y}),
            None,
            "outputs-taken",
            "'residual_features'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and "-" in value else "",
)
def test_refuses(build: Callable[[], nn.Module], head: str | None, code: str, said: str) -> None:
    model = seeded(build)
    gm = capture(model, (images(2),))
    before = structural_hash(gm)
    result = SplitHead(head=head).run(gm)
    (refusal,) = result.refusals
    assert refusal.code == code
    assert said in refusal.reason
    assert not result.changes
    assert structural_hash(result.graph_module) == before
    with pytest.raises(gs.PassError, match=rf"\({code}\)"):
        gs.split_head(model, images(2), head=head)


def test_a_named_head_may_be_bypassed() -> None:
    result = split(seeded(lambda: Net(Skip())), SplitHead(head="head.b"))
    assert tuple(result.graph_module(images(2))) == ("output", "logits", *PARTS)


# -- 4. dtypes, and the caller's model ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "off"),
    [(torch.float16, 2e-3), (torch.bfloat16, 1e-2), (torch.float32, 5e-7), (torch.float64, 1e-12)],
    ids=["float16", "bfloat16", "float32", "float64"],
)
def test_any_float_dtype(dtype: torch.dtype, off: float) -> None:
    model = seeded(lambda: Net(nn.Linear(12, 5)), dtype)
    found = gs.split_head(model, images(2, dtype))
    assert found.report.verification is not None
    assert found.report.verification.ok
    with torch.no_grad():
        values = found.module(images(3, dtype, seed=5))
        assert torch.equal(values["logits"], model(images(3, dtype, seed=5)))
    assert {value.dtype for value in values.values()} == {dtype}
    layers = [found.module.get_submodule(f"head_{part}") for part in PARTS]
    stored = torch.cat([torch.cat([layer.weight, layer.bias.unsqueeze(1)], 1) for layer in layers]).double()
    gram = stored @ stored.T - torch.eye(13, dtype=torch.float64)
    assert gram.abs().max() <= off
    assert found.subspace.Q.dtype == torch.float64
    if dtype is not torch.float64:
        assert gram.abs().max() > 1e-12, "the figures of the documents are about rounding"


def test_the_callers_model_is_untouched() -> None:
    model = seeded(lambda: Net(nn.Linear(12, 5)))
    state = copy.deepcopy(model.state_dict())
    gs.split_head(model, images(2))
    assert set(model.state_dict()) == set(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# -- 5. a wrong split is caught -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "slot"), [*((part, slot) for part in PARTS for slot in ("weight", "bias")), ("logits", "weight")]
)
@pytest.mark.parametrize("kind", ["linear", "conv1x1"])
def test_detects_one_coefficient_that_is_off(
    kind: str, part: str, slot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = split_head._parts

    def off(*args: Any) -> dict[str, dict[str, Tensor]]:
        parts = real(*args)
        value = parts[part][slot].clone()
        value.view(-1)[value.abs().argmax()] *= 1 + 1e-3
        parts[part][slot] = value
        return parts

    monkeypatch.setattr(split_head, "_parts", off)
    build, pooled, _, _ = HEADS[kind]
    result = split(seeded(lambda: Net(build(), pooled)))
    assert [refusal.code for refusal in result.refusals] == ["certificate"]
    assert not result.changes


def test_detects_a_basis_that_misses_the_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two columns of Q exchanged: still orthonormal, norms still add up, but the wrong ones are residual."""
    real = split_head._parts

    def exchanged(*args: Any) -> dict[str, dict[str, Tensor]]:
        parts = real(*args)
        for slot in ("weight", "bias"):
            first, second = (parts[part][slot].clone() for part in PARTS)
            first[-1], second[0] = second[0].clone(), first[-1].clone()
            parts[PARTS[0]][slot], parts[PARTS[1]][slot] = first, second
        return parts

    monkeypatch.setattr(split_head, "_parts", exchanged)
    result = split(seeded(lambda: Net(nn.Linear(12, 5))))
    assert [refusal.code for refusal in result.refusals] == ["certificate"]


def test_the_oracle_detects_layers_that_are_off_after_the_certificate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = split_head._layer

    def off(scope: Any, head: Any, source: Any, path: str, slots: Any, written: Any) -> fx.Node:
        slots = {name: value.clone() for name, value in slots.items()}
        slots["weight"].view(-1)[0] *= 1 + 1e-3
        return real(scope, head, source, path, slots, written)

    monkeypatch.setattr(split_head, "_layer", off)
    with pytest.raises(gs.VerificationError, match="features"):
        gs.split_head(seeded(lambda: Net(nn.Linear(12, 5)), torch.float32), images(2, torch.float32))
