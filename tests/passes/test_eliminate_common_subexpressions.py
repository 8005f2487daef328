"""eliminate-common-subexpressions: what is the same to the bit is one; what a caller could notice stays."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folding import Of, assert_same, ops, outputs, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import graphsurgery as gs
from graphsurgery.capture import capture
from graphsurgery.cost import graph_cost, op_name
from graphsurgery.graph import annotate, structural_hash
from graphsurgery.passes import EliminateCommonSubexpressions, EliminateIdentity
from graphsurgery.passes import eliminate_common_subexpressions as file
from graphsurgery.rewrite import PassManager, PassResult
from graphsurgery.rewrite.fingerprint import same_bits

aten = torch.ops.aten


def image(batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, 4, 6, generator=torch.Generator().manual_seed(batch)).to(dtype)


def graph_of(function: Callable[..., Any], **parts: nn.Module) -> fx.GraphModule:
    """The graph of `function(self, x)` for the image, in float64."""
    return capture(seeded(lambda: Of(function, **parts)).double(), (image(),))


def run(gm: fx.GraphModule) -> PassResult:
    """Run the pass, alone and under the manager's checks; a second run finds nothing and declines as much."""
    before = structural_hash(gm)
    result = EliminateCommonSubexpressions().run(gm)
    assert structural_hash(gm) == before, "the pass changed the graph that it was given"
    managed = PassManager([EliminateCommonSubexpressions()], strict=True)(gm)
    assert structural_hash(managed.graph_module) == structural_hash(result.graph_module)
    again = EliminateCommonSubexpressions().run(result.graph_module)
    assert not again.changes
    assert [r.code for r in again.refusals] == [r.code for r in result.refusals]
    return result


def assert_same_bits(got: Callable[[Tensor], Any], wanted: Callable[[Tensor], Any], x: Tensor) -> None:
    """The same bits, the same strides, and no memory shared that was not shared before."""
    with torch.no_grad():
        a, b = outputs(got(x)), outputs(wanted(x))
    for value, expected in zip(a, b, strict=True):
        assert same_bits(value, expected)
        assert value.stride() == expected.stride()
    assert shared_memory(x, a) <= shared_memory(x, b)


def shared_memory(x: Tensor, values: tuple[Tensor, ...]) -> set[tuple[int, int]]:
    memory = [t.untyped_storage().data_ptr() for t in (x, *values)]
    return {(i, j) for i in range(len(memory)) for j in range(i) if memory[i] == memory[j]}


def retargeted(gm: fx.GraphModule, old: str, new: Callable[..., Any]) -> fx.GraphModule:
    """The graph with every call of `old` made one of `new`, for what capture would not let through."""
    for node in gm.graph.nodes:
        if op_name(node) == old:
            node.target = new
    return gm


def computed(result: PassResult) -> str:
    return " ".join(op for op in ops(result) if op != "sym_size")


def linears(function: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, nn.Module]]:
    return function, {"f": nn.Linear(6, 4), "g": nn.Linear(4, 4)}


NORM: dict[str, nn.Module] = {"n": nn.RMSNorm(6, eps=1e-5)}
CONV: dict[str, nn.Module] = {"conv": nn.Conv2d(3, 5, 3, padding=1), "norm": nn.BatchNorm2d(5)}
FOLDS: dict[str, tuple[Callable[..., Any], dict[str, nn.Module], str]] = {
    "linear": (*linears(lambda m, x: m.f(x).sin() * m.f(x).cos()), "linear sin cos mul"),
    "two-linears": (*linears(lambda m, x: m.g(m.f(x)).sin() * m.g(m.f(x))), "linear linear sin mul"),
    "three-times": (*linears(lambda m, x: m.f(x) * m.f(x) / m.f(x)), "linear mul div"),
    "rms-norm": (lambda m, x: m.n(x).sin() * m.n(x), NORM, "rms_norm sin mul"),
    "conv-norm-relu": (
        lambda m, x: (lambda f: f() + f())(lambda: m.norm(m.conv(x)).relu()),
        CONV,
        "conv2d batch_norm relu add",
    ),
    "by-hand": (
        lambda m, x: (
            (x / (x.pow(2).mean(-1, True) + 1e-5).sqrt()).sin() + x / (x.pow(2).mean(-1, True) + 1e-5).sqrt()
        ),
        {},
        "pow mean add sqrt div sin add",
    ),
    "view": (lambda m, x: x.flatten(2).sin() + x.flatten(2).cos(), {}, "reshape sin cos add"),
    "view-by-the-batch": (
        lambda m, x: x.view(x.shape[0], -1).sin() + x.view(x.shape[0], -1).cos(),
        {},
        "reshape sin cos add",
    ),
    "split": (
        lambda m, x: x.sin().split(2, 3)[0] * x.sin().split(2, 3)[1] + x.sin().split(2, 3)[0],
        {},
        "sin split getitem getitem mul add",
    ),
    "max": (lambda m, x: x.max(1)[0] * x.max(1)[1] + x.max(1)[0], {}, "max getitem getitem mul add"),
    "keywords": (
        lambda m, x: (
            torch.std(x, dim=1, keepdim=True, correction=0) * torch.std(x, correction=0, keepdim=True, dim=1)
        ),
        {},
        "std mul",
    ),
    "attention": (
        lambda m, x: F.scaled_dot_product_attention(x, x, x) * F.scaled_dot_product_attention(x, x, x),
        {},
        "scaled_dot_product_attention mul",
    ),
    "dropout-off": (
        lambda m, x: F.dropout(x.sin(), 0.5, False) * F.dropout(x.sin(), 0.5, False),
        {},
        "sin dropout mul",
    ),
    "no-operand": (lambda m, x: x + torch.arange(6.0) * torch.arange(6.0), {}, "arange mul add"),
    "nan": (
        lambda m, x: torch.where(x > 0, x, float("nan")).sin() * torch.where(x > 0, x, float("nan")),
        {},
        "gt where sin mul",
    ),
    "infinite": (lambda m, x: x.clamp(0, torch.inf) / x.clamp(0, torch.inf).exp(), {}, "clamp exp div"),
}


# -- 1. folds


@pytest.mark.parametrize("case", FOLDS)
def test_folds(case: str) -> None:
    function, parts, left = FOLDS[case]
    gm = graph_of(function, **copy.deepcopy(parts))
    result = run(gm)
    assert computed(result) == left
    assert {change.kind for change in result.changes} == {"call"}
    assert not result.refusals
    for batch in (1, 2, 5):
        assert_same_bits(result.graph_module, gm, image(batch))


def test_folds_arguments_named_in_another_order_or_left_out() -> None:
    gm = graph_of(lambda m, x: m.conv(x).sin() * m.conv(x), conv=nn.Conv2d(3, 5, 3))
    _, second = gm.graph.find_nodes(op="call_function", target=aten.conv2d.default)
    x, weight, bias = second.args[:3]
    second.args = (x,)
    second.kwargs = {"groups": 1, "padding": (0, 0), "stride": [1, 1], "bias": bias, "weight": weight}
    gm.recompile()
    result = run(gm)
    assert computed(result) == "conv2d sin mul"
    assert_same_bits(result.graph_module, gm, image())


def test_folds_two_reads_of_one_parameter_and_what_they_feed() -> None:
    gm = graph_of(lambda m, x: m.f(x) * m.f(x), f=nn.Linear(6, 4))
    _, second = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    for old in second.args[1:]:
        with gm.graph.inserting_before(second):
            read = gm.graph.get_attr(old.target)
        annotate(gm, read)
        second.replace_input_with(old, read)
    gm.recompile()
    result = run(gm)
    assert [change.kind for change in result.changes] == ["read", "read", "call"]
    assert sum(node.op == "get_attr" for node in result.graph_module.graph.nodes) == 2
    assert_same_bits(result.graph_module, gm, image())


def tied(**more: nn.Module) -> dict[str, nn.Module]:
    a, b = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
    b.weight = a.weight
    return {"a": a, "b": b, **more}


def test_folds_layers_with_tied_weights_and_drops_the_name_that_nothing_reads() -> None:
    gm = graph_of(lambda m, x: m.a(x).sin() + m.b(x), **tied())
    result = run(gm)
    assert computed(result) == "linear sin add"
    assert [change.parameters for change in result.changes] == [("b.weight",)]
    assert set(result.graph_module.state_dict()) == {"a.weight"}
    assert_same_bits(result.graph_module, gm, image())


def test_keeps_the_name_of_a_tied_weight_that_is_read_elsewhere() -> None:
    gm = graph_of(lambda m, x: m.a(x).sin() + m.b(x) + m.b(x.cos()), **tied())
    result = run(gm)
    assert computed(result) == "linear sin add cos linear add"
    assert [change.parameters for change in result.changes] == [()]
    assert set(result.graph_module.state_dict()) == {"a.weight", "b.weight"}
    assert_same_bits(result.graph_module, gm, image())


@pytest.mark.filterwarnings("ignore:Raw SymInt value")
def test_folds_sizes_that_are_symbols_in_the_arguments() -> None:
    """A symbol itself as an argument, which fx warns of; equal by name, and never asked for its value."""
    gm = graph_of(lambda m, x: x.reshape(x.shape[0], 72).sin() + x.reshape(x.shape[0], 72).cos())
    x = gm.graph.find_nodes(op="placeholder")[0]
    first, second = gm.graph.find_nodes(op="call_function", target=aten.reshape.default)
    batch = x.meta["val"].shape[0]
    for node, size in ((first, batch), (second, batch)):
        node.args = (x, [size, 72])
    assert [c.kind for c in EliminateCommonSubexpressions().run(gm).changes] == ["call"]
    second.args = (x, [batch * 1 + 1, 72])
    assert not EliminateCommonSubexpressions().run(gm).changes


def test_folds_long_chains_and_wide_sums() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        for _ in range(100):
            x = x.sin() + x.sin()
        return torch.cat([x.cos() for _ in range(300)], 1)

    gm = graph_of(function)
    result = run(gm)
    assert len(result.changes) == 100 + 299
    assert computed(result).count("cos") == 1
    assert_same_bits(result.graph_module, gm, image())


# -- 2. no-ops

NOOPS: dict[str, tuple[Callable[..., Any], dict[str, nn.Module]]] = {
    "int-float-bool": (lambda m, x: torch.cat([v.double() for v in values_of_one(x)], 1), {}),
    "signed-zero": (lambda m, x: 1 / (x.relu() * 0.0) * (1 / (x.relu() * -0.0)), {}),
    "other-order": (lambda m, x: (x + x.sin()) * (x.sin() + x), {}),
    "other-axis": (lambda m, x: x.sum(1).sum(1) + x.sum(2).sum(1), {}),
    "other-list": (lambda m, x: x[..., :3, :3].permute(0, 1, 3, 2) * x[..., :3, :3].permute(0, 2, 1, 3), {}),
    "other-piece": (lambda m, x: x.split(3, 3)[0] + x.split(3, 3)[1], {}),
    "other-string": (lambda m, x: rounded(x, "floor") + rounded(x, "trunc"), {}),
    "other-dtype": (lambda m, x: x.to(torch.float32).double() + x.to(torch.float16).double(), {}),
    "other-eps": (lambda m, x: F.rms_norm(x, [6], None, 1e-5) + F.rms_norm(x, [6], None, 1e-6), {}),
    "other-weight": (*linears(lambda m, x: m.g(m.f(x)) + m.f(x)),),
    "other-operand": (lambda m, x: m.n(x) + m.n(x.sin()), NORM),
}  # fmt: skip


def rounded(x: Tensor, mode: str) -> Tensor:
    return torch.div(x, 2, rounding_mode=mode)


def values_of_one(x: Tensor) -> list[Tensor]:
    whole = x.long()
    return [whole * 2, whole * 2.0, whole * 1, whole * True, whole * 1.0]


@pytest.mark.parametrize("case", NOOPS)
def test_noop_on(case: str) -> None:
    function, parts = NOOPS[case]
    gm = EliminateIdentity().run(graph_of(function, **copy.deepcopy(parts))).graph_module
    once = EliminateCommonSubexpressions().run(gm).graph_module  # operands that are equal become one
    alike = [key for key in map(spelled, once.graph.nodes) if key]
    assert len(alike) == len(set(alike)), "the case has nothing that is nearly the same"
    wanted, got = gm(image()), once(image())
    assert torch.equal(wanted, got)
    result = run(once)
    assert not result.changes
    assert structural_hash(result.graph_module) == structural_hash(once)


def spelled(node: fx.Node) -> str:
    """A call as its text, which tells 1 from 1.0 and 0.0 from -0.0."""
    return f"{node.target} {node.args!r} {node.kwargs!r}" if node.op == "call_function" else ""


def test_noop_on_parameters_and_statistics_that_are_equal_but_not_one() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return m.a(x).sin() + m.b(x)

    for kind in (lambda: nn.Linear(6, 6), lambda: nn.LayerNorm(6)):
        first = kind()
        gm = graph_of(function, a=first, b=copy.deepcopy(first))
        assert not run(gm).changes
    gm = capture(Of(function, a=nn.BatchNorm2d(3), b=nn.BatchNorm2d(3)).double().eval(), (image(),))
    assert not run(gm).changes


# -- 3. refusals


@pytest.mark.parametrize(
    "target",
    [aten.bernoulli.default, aten.rand_like.default, aten.empty_like.default],
    ids=["bernoulli", "rand_like", "empty_like"],
)
def test_refuses_random(target: Callable[..., Any]) -> None:
    gm = retargeted(graph_of(lambda m, x: (x.sin() - x.sin()).cos() + x.cos() + x.cos()), "sin", target)
    result = run(gm)
    assert [refusal.code for refusal in result.refusals] == ["random"]
    assert [[ref.op for ref in change.before] for change in result.changes] == [["cos", "cos"]]
    assert computed(result).split().count(target._schema.name.split("::")[1]) == 2


def test_refuses_dropout_that_is_on() -> None:
    gm = graph_of(lambda m, x: F.dropout(x.sin(), 0.5, False) * F.dropout(x.sin(), 0.5, False))
    for node in gm.graph.find_nodes(op="call_function", target=aten.dropout.default):
        node.args = (*node.args[:2], True)
    assert [refusal.code for refusal in run(gm).refusals] == ["random"]


@torch.library.custom_op("graphsurgery_tests::counted", mutates_args=())
def counted(x: Tensor) -> Tensor:
    """An operator of another library, of which torch knows no more than its schema."""
    return x * 2


@counted.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_refuses_side_effects() -> None:
    gm = graph_of(lambda m, x: counted(x.sin()) * counted(x.sin()))
    result = run(gm)
    assert [refusal.code for refusal in result.refusals] == ["side-effects"]
    assert computed(result) == "sin counted counted mul"
    gm = graph_of(lambda m, x: x.sin() * x.sin())
    for node in gm.graph.find_nodes(op="call_function", target=aten.sin.default):
        with gm.graph.inserting_after(node):
            check = gm.graph.call_function(aten._assert_async.msg, (node, "zero"))
        check.meta["val"] = None
    result = EliminateCommonSubexpressions().run(gm)
    assert [refusal.code for refusal in result.refusals] == ["side-effects"]


ALIASES: dict[str, Callable[..., Any]] = {
    "outputs": lambda m, x: (x.sin(), x.sin()),
    "views-of-both": lambda m, x: (x.sin()[:, 0], x.sin()[:, 1]),
    "output-and-view": lambda m, x: (x.sin(), x.sin().permute(0, 2, 1, 3)),
    "third": lambda m, x: (x.sin().cos(), x.sin(), x.sin()),
    "copies": lambda m, x: (x.clone(), x.clone()),
    "one-object": lambda m, x: (x[:, 0], x[:, 0]),
    "view-of-any-rank": lambda m, x: (torch.atleast_1d(x.relu()), x.relu()),
    "views-of-several": lambda m, x: (torch.broadcast_tensors(x[:, :1], x.relu())[1], x.relu()),
    "may-copy": lambda m, x: (x.permute(0, 2, 1, 3).flatten(1), x.permute(0, 2, 1, 3).flatten(1)),
    "same-piece": lambda m, x: (x.max(1)[0], x.max(1)[0], x.max(1)[1]),
    "silent-view": lambda m, x: (torch.einsum("bchw->bhcw", x.sin()), torch.einsum("bchw->bhcw", x.sin())),
}


@pytest.mark.parametrize("case", ALIASES)
def test_refuses_aliases(case: str) -> None:
    gm = graph_of(ALIASES[case])
    result = run(gm)
    assert {refusal.code for refusal in result.refusals} == {"aliases"}
    assert all(len(refusal.nodes) == 2 for refusal in result.refusals)
    assert all("memory" in refusal.reason or "one object" in refusal.reason for refusal in result.refusals)
    for batch in (1, 2, 5):
        assert_same_bits(result.graph_module, gm, image(batch))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (x.sin(), x.sin().cos()),
        lambda m, x: (x.sin().relu() + 1, x.sin().relu() + 2),
        lambda m, x: (x.max(1)[0], x.max(1)[1]),
        lambda m, x: (x[:, 0], x[:, 0].cos()),
        lambda m, x: (x.split(2, 3)[0], x.split(2, 3)[1]),
        lambda m, x: (x.sin().relu(), x.sin().relu().flatten(1).cos()),
    ],
    ids=["one-is-output", "inner", "two-pieces", "views-of-the-input", "pieces-of-the-input", "view-inside"],
)
def test_folds_beside_outputs(function: Callable[..., Any]) -> None:
    gm = graph_of(function)
    result = run(gm)
    assert result.changes
    assert not result.refusals
    calls = [spelled(node) for node in result.graph_module.graph.nodes if node.op == "call_function"]
    assert len(calls) == len(set(calls))
    assert_same_bits(result.graph_module, gm, image())


def test_refuses_sizes_known_by_different_symbols() -> None:
    gm = graph_of(lambda m, x: x.sum() + x.relu().nonzero().sum() + x.relu().nonzero().sum() * 2)
    result = run(gm)
    assert [refusal.code for refusal in result.refusals] == ["symbols"]
    assert [ref.op for ref in result.refusals[0].nodes] == ["nonzero", "nonzero"]
    assert computed(result).count("relu") == 1
    assert_same_bits(result.graph_module, gm, image())


@pytest.mark.parametrize("what", ["in-place", "method", "function"])
def test_refuses_a_graph_that_may_write(what: str) -> None:
    gm = graph_of(lambda m, x: x.sin() * (x.sin() + x.cos()))
    cos = gm.graph.find_nodes(op="call_function", target=aten.cos.default)[0]
    if what == "method":
        with gm.graph.inserting_after(cos):
            method = gm.graph.call_method("cos_", cos.args)
        method.meta = dict(cos.meta)
        cos.replace_all_uses_with(method)
        gm.graph.erase_node(cos)
    else:
        cos.target = aten.cos_.default if what == "in-place" else torch.cos
    gm.recompile()
    result = run(gm)
    assert [refusal.code for refusal in result.refusals] == ["not-functional"]
    assert [ref.name for ref in result.refusals[0].nodes] == ["cos_" if what == "method" else "cos"]
    assert not result.changes


# -- 4. reports


def test_every_change_is_reported_with_its_place_and_cost() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.f(x)
            return y.sin() + self.f(x)

    gm = capture(Twice().double().eval(), (image(),))
    (change,) = run(gm).changes
    assert (change.pass_name, change.kind) == ("eliminate-common-subexpressions", "call")
    assert [ref.name for ref in change.before] == ["linear", "linear_1"]
    assert change.after == change.before[:1]
    assert [ref.module for ref in change.before] == ["f", "f"]
    assert ["y = self.f(x)" in ref.source for ref in change.before] == [True, False]
    assert (change.cost_before.macs, change.cost_after.macs) == (2 * 12 * 24, 12 * 24)
    assert change.residual is None
    kept = next(n for n in run(gm).graph_module.graph.nodes if op_name(n) == "linear")
    old = next(n for n in gm.graph.nodes if op_name(n) == "linear")
    assert kept.meta["stack_trace"] == old.meta["stack_trace"]
    assert kept.meta["val"] is old.meta["val"]


# -- 5. with the passes that follow, in float64 and on onnxruntime


def test_two_calls_of_an_rms_norm_give_its_weight_to_both_layers() -> None:
    parts = {"n": nn.RMSNorm(6, eps=1e-5), "f": nn.Linear(6, 8), "g": nn.Linear(6, 8)}
    with torch.no_grad():
        parts["n"].weight.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
    model = Of(lambda m, x: m.f(m.n(x)).relu() * m.g(m.n(x)), **parts).double().eval()
    result = gs.optimize(model, (image(),))
    names = [op_name(node) for node in result.graph_module.graph.nodes if node.op == "call_function"]
    assert sorted(names) == ["linear", "linear", "mul", "relu", "rms_norm"]
    assert "n.weight" not in result.module.state_dict()
    for batch in (1, 2, 5):
        assert_same(result.module, model, image(batch))


def test_norms_of_one_value_become_one_once_their_weights_are_folded() -> None:
    parts = {"n": nn.LayerNorm(6), "m": nn.LayerNorm(6), "f": nn.Linear(6, 8), "g": nn.Linear(6, 8)}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in "nm":
            parts[name].weight.uniform_(0.5, 2, generator=generator)
            parts[name].bias.normal_(generator=generator)
    model = Of(lambda m, x: m.f(m.n(x)).relu() * m.g(m.m(x)), **parts).double().eval()
    result = gs.optimize(model, (image(),))
    names = [op_name(node) for node in result.graph_module.graph.nodes if node.op == "call_function"]
    assert sorted(names) == ["layer_norm", "linear", "linear", "mul", "relu"]
    for batch in (1, 2, 5):
        assert_same(result.module, model, image(batch))


def test_a_shared_value_is_folded_into_both_readers() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return m.f(m.stem(x)).relu() + m.g(m.stem(x)).tanh()

    parts = {"stem": nn.Linear(6, 64), "f": nn.Linear(64, 4), "g": nn.Linear(64, 4)}
    model = seeded(lambda: Of(function, **parts)).double()
    result = gs.optimize(model, (image(),))
    names = [op_name(node) for node in result.graph_module.graph.nodes if node.op == "call_function"]
    assert sorted(names) == ["add", "linear", "linear", "relu", "tanh"]
    assert graph_cost(result.graph_module).macs == 2 * 12 * 6 * 4
    for batch in (1, 2, 5):
        assert_same(result.module, model, image(batch))


def network() -> nn.Module:
    """A block called twice on one value, and its output pooled in two ways."""
    torch.manual_seed(0)

    def function(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y, z = m.block(x), m.block(x)
        return m.head(y.mean((2, 3))), (z * m.head(z.mean((2, 3))).sum(1)[:, None, None, None]).amax((2, 3))

    block = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU())
    return seeded(lambda: Of(function, block=block, head=nn.Linear(5, 4)))


def test_a_network_keeps_its_outputs_in_float64_and_on_onnxruntime(tmp_path: Path) -> None:
    model, x = network(), image(dtype=torch.float32)
    result = gs.optimize(model, (x,), verify="each-pass", passes=["eliminate-common-subexpressions"])
    assert not result.report.failures
    assert [check.ok for check in result.report.pass_checks]
    assert [op for op in ops(result.graph_module) if op != "sym_size"].count("conv2d") == 1
    assert [op for op in ops(result.graph_module) if op != "sym_size"].count("linear") == 1
    written = result.export_onnx(tmp_path / "net.onnx")
    assert written.verdict.ok, str(written.verdict)
    double = copy.deepcopy(model).double()
    gm = capture(double, (x.double(),))
    for batch in (1, 2, 5):
        assert_same_bits(run(gm).graph_module, gm, image(batch))


# -- programs in which steps are repeated

UNARY: list[Callable[[Any], Any]] = [
    lambda y: y.sin(),
    lambda y: y * 2,
    lambda y: y * 2.0,
    lambda y: y.relu(),
    lambda y: y.transpose(1, 2),
    lambda y: y.flatten(1).unflatten(1, (3, 3)),
    lambda y: y.split([1, 2], 2)[0].expand(-1, 3, 3),
    lambda y: y.max(1, True)[0].expand(-1, 3, 3),
]
BINARY: list[Callable[[Any, Any], Any]] = [lambda a, b: a + b, lambda a, b: torch.maximum(a, b)]


class Repeats(nn.Module):
    """Random steps over a pool of values, half of them made before; one output that reads all, or several."""

    def __init__(self, seed: int, size: int, several: bool) -> None:
        super().__init__()
        self.seed, self.size, self.several = seed, size, several

    def forward(self, x: Tensor) -> Any:
        rng = random.Random(self.seed)
        values: list[Tensor] = [x]
        made: list[tuple[Callable[..., Any], tuple[int, ...]]] = []
        for _ in range(self.size):
            if made and rng.random() < 0.5:
                call, reads = rng.choice(made)
            elif rng.random() < 0.6:
                call, reads = rng.choice(UNARY), (rng.randrange(len(values)),)
            else:
                call, reads = rng.choice(BINARY), (rng.randrange(len(values)), rng.randrange(len(values)))
            made.append((call, reads))
            values.append(call(*(values[i] for i in reads)))
        if self.several:
            return tuple(rng.choices(values[1:], k=3))
        return sum((value.sum((1, 2)) for value in values[1:]), x.sum((1, 2)))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.booleans())
def test_repeated_steps_become_one(seed: int, size: int, several: bool) -> None:
    x = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed % 1000))
    gm = capture(Repeats(seed, size, several).eval(), (x,))
    result = run(gm)
    for batch in (2, 3):
        y = torch.randn(batch, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))
        assert_same_bits(result.graph_module, gm, y)
    calls = [spelled(node) for node in result.graph_module.graph.nodes if node.op == "call_function"]
    if not several:
        assert not result.refusals
    assert len(calls) - len(set(calls)) == len(result.refusals)
    assert bool(result.changes) == (len(calls) < sum(n.op == "call_function" for n in gm.graph.nodes))


# -- 6. a wrong elimination


def test_detects_a_wrong_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = graph_of(lambda m, x: x * 2.0 + (x * 2.002).sin())
    token = file._Merging._token

    def rounded(self: Any, value: Any, schema: bool) -> Any:
        return token(self, round(value) if isinstance(value, float) else value, schema)

    monkeypatch.setattr(file._Merging, "_token", rounded)
    assert EliminateCommonSubexpressions().run(gm).modified
    managed = PassManager([EliminateCommonSubexpressions()])(gm, (image(),))
    assert [failure.code for failure in managed.failures] == ["values"]
