"""Attributes, copies, hashes, source lines and fake values of captured graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn
from torch.export import Dim, export

from graphsurgery import graph as gsg

aten = torch.ops.aten


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.scale = nn.Parameter(torch.rand(4, 1, 1))
        self.register_buffer("shift", torch.rand(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) * self.scale + self.shift


@pytest.fixture
def gm() -> fx.GraphModule:
    torch.manual_seed(0)
    program = export(Model().eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: Dim.AUTO},))
    return program.module(check_guards=False)


def named(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in gm.graph.nodes if node.name == name)


# -- where a node came from


def test_module_path_and_source_line_name_the_users_code(gm: fx.GraphModule) -> None:
    conv = named(gm, "conv2d")
    assert gsg.module_path(conv) == "block.conv"
    assert gsg.source_line(conv).startswith("test_graph.py:")
    assert gsg.source_line(conv).endswith("in forward: return self.conv(x)")
    assert gsg.module_path(named(gm, "mul")) == ""


@pytest.mark.parametrize(
    ("stack", "path"),
    [
        ({"L__self__l@1": ("l@1", nn.Linear)}, "l"),
        ({"L['self']": ("L['self']", nn.Linear)}, ""),
        ({"a": ("L['self'].blocks@2.fc", nn.Linear)}, "blocks.fc"),
        ({"_empty_nn_module_stack_from_metadata_hook": ("_empty_nn_module_stack_x", "x")}, ""),
        ({}, ""),
    ],
)
def test_module_path_of_repeated_calls_and_roots(stack: dict[str, object], path: str) -> None:
    node = fx.Graph().call_function(aten.relu.default, ())
    node.meta["nn_module_stack"] = stack
    assert gsg.module_path(node) == path


def test_source_line_is_empty_without_a_user_frame() -> None:
    node = fx.Graph().call_function(aten.relu.default, ())
    assert gsg.source_line(node) == ""
    node.meta["stack_trace"] = f'  File "{torch.__file__}", line 3, in forward\n    return x'
    assert gsg.source_line(node) == ""


# -- attributes


def test_set_attr_makes_modules_and_keeps_kind(gm: fx.GraphModule) -> None:
    gsg.set_attr(gm, "a.b.weight", torch.ones(2, requires_grad=True), parameter=True)
    gsg.set_attr(gm, "a.b.table", torch.ones(2), parameter=False, persistent=False)
    assert isinstance(gm.get_parameter("a.b.weight"), nn.Parameter)
    assert gm.get_parameter("a.b.weight").requires_grad
    assert "a.b.table" not in gm.state_dict()
    gsg.set_attr(gm, "a.b.weight", torch.zeros(3), parameter=False)  # a buffer in place of a parameter
    assert "a.b.weight" in dict(gm.named_buffers())
    assert "a.b.weight" not in dict(gm.named_parameters())


def test_set_attr_keeps_a_parameter_object(gm: fx.GraphModule) -> None:
    shared = nn.Parameter(torch.ones(2), requires_grad=False)
    gsg.set_attr(gm, "p.weight", shared, parameter=True)
    gsg.set_attr(gm, "q.weight", shared, parameter=True)
    assert gsg.get_attr_value(gm, "p.weight") is gsg.get_attr_value(gm, "q.weight")


def test_set_attr_refuses_a_tensor_on_the_way(gm: fx.GraphModule) -> None:
    with pytest.raises(ValueError, match="scale"):
        gsg.set_attr(gm, "scale.weight", torch.ones(1), parameter=False)


def test_get_attr_value_names_what_is_missing(gm: fx.GraphModule) -> None:
    with pytest.raises(AttributeError, match=r"block\.nothing\.weight"):
        gsg.get_attr_value(gm, "block.nothing.weight")
    with pytest.raises(TypeError, match="block"):
        gsg.get_attr_value(gm, "block")


def test_fresh_names(gm: fx.GraphModule) -> None:
    assert gsg.fresh_attr(gm, "new.weight") == "new.weight"
    assert gsg.fresh_attr(gm, "block.conv.weight") == "block.conv.weight_1"
    assert gsg.fresh_attr(gm, "scale.weight") == "scale_1.weight"  # `scale` is a tensor


def test_delete_unused_attrs_keeps_what_is_read(gm: fx.GraphModule) -> None:
    assert gsg.delete_unused_attrs(gm) == ()
    gsg.set_attr(gm, "old.norm.weight", torch.ones(2), parameter=True)
    gsg.set_attr(gm, "block.extra", torch.ones(2), parameter=False)
    assert sorted(gsg.delete_unused_attrs(gm)) == ["block.extra", "old.norm.weight"]
    assert not hasattr(gm, "old")
    assert gsg.has_attr(gm, "block.conv.weight")


def test_delete_unused_attrs_keeps_the_counter_of_live_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3)).eval()
    gm = export(model, (torch.randn(2, 3, 4, 4),)).module(check_guards=False)
    gm.graph.eliminate_dead_code()
    assert gsg.delete_unused_attrs(gm) == ()
    assert gsg.has_attr(gm, "0.num_batches_tracked")


# -- copies and hashes


def test_copy_shares_tensors_and_nothing_else(gm: fx.GraphModule) -> None:
    x = torch.randn(3, 3, 8, 8)
    before, expected = gsg.structural_hash(gm), gm(x)
    twin = gsg.copy_graph_module(gm)
    assert torch.equal(twin(x), expected)
    assert gsg.structural_hash(twin) == before
    assert twin.block.conv.weight is gm.block.conv.weight
    assert "shift" in twin._non_persistent_buffers_set
    assert named(twin, "conv2d").meta["val"] is named(gm, "conv2d").meta["val"]
    gsg.set_attr(twin, "block.conv.weight", torch.zeros(4, 3, 3, 3), parameter=True)
    del twin.scale
    for node in list(twin.graph.nodes):
        node.meta["mark"] = True
    twin.meta["mark"] = True
    assert gsg.structural_hash(gm) == before
    assert torch.equal(gm(x), expected)
    assert not any("mark" in node.meta for node in gm.graph.nodes)
    assert "mark" not in gm.meta


def test_hash_ignores_names_and_meta(gm: fx.GraphModule) -> None:
    twin = gsg.copy_graph_module(gm)
    for index, node in enumerate(twin.graph.nodes):
        if node.op == "call_function":
            node.name = f"other_{index}"
            node.meta = {}
    assert gsg.structural_hash(twin) == gsg.structural_hash(gm)
    assert gsg.structural_hash(copy.deepcopy(gm)) == gsg.structural_hash(
        gsg.copy_graph_module(copy.deepcopy(gm))
    )


@pytest.mark.parametrize(
    "what", ["last-bit", "argument", "argument-type", "wiring", "attribute", "dtype", "op"]
)
def test_hash_sees(gm: fx.GraphModule, what: str) -> None:
    before = gsg.structural_hash(gm)
    twin = gsg.copy_graph_module(gm)
    conv, mul, add = named(twin, "conv2d"), named(twin, "mul"), named(twin, "add")
    if what == "last-bit":
        weight = gsg.get_attr_value(gm, "block.conv.weight").detach().clone()
        weight[1, 2, 0, 1] = torch.nextafter(weight[1, 2, 0, 1], torch.tensor(9.0))
        gsg.set_attr(twin, "block.conv.weight", weight.requires_grad_(), parameter=True)
    elif what == "argument":
        conv.args = (*conv.args, [1, 1])
    elif what == "argument-type":
        add.args = (add.args[0], 1)
        before = gsg.structural_hash(twin)
        add.args = (add.args[0], 1.0)
    elif what == "wiring":
        mul.args = (mul.args[1], mul.args[0])
    elif what == "attribute":
        gsg.set_attr(twin, "unread", torch.ones(1), parameter=False)
    elif what == "dtype":
        gsg.set_attr(twin, "scale", twin.scale.detach().double().requires_grad_(), parameter=True)
    elif what == "op":
        mul.target = aten.add.Tensor
    assert gsg.structural_hash(twin) != before


# -- fake values


def test_annotate_gives_symbolic_shapes_without_guards(gm: fx.GraphModule) -> None:
    mul = named(gm, "mul")
    batch = mul.meta["val"].shape[0]
    with gm.graph.inserting_after(mul):
        flat = gm.graph.call_function(aten.reshape.default, (mul, [-1, 4 * 36]))
    gsg.set_attr(gm, "fc.weight", torch.randn(5, 144), parameter=True)
    with gm.graph.inserting_after(flat):
        weight = gm.graph.get_attr("fc.weight")
    with gm.graph.inserting_after(weight):
        linear = gm.graph.call_function(aten.linear.default, (flat, weight))
    for node in (flat, weight, linear):
        gsg.annotate(gm, node)
    assert linear.meta["val"].shape[1] == 5
    assert linear.meta["val"].fake_mode is gsg.fake_mode(gm)
    assert isinstance(batch, torch.SymInt)
    assert isinstance(linear.meta["val"].shape[0], torch.SymInt)
    assert str(linear.meta["val"].shape[0]) == str(batch)
    assert not gsg.fake_mode(gm).shape_env.guards


@pytest.mark.parametrize("size", [4, -3])
def test_annotate_keeps_the_batch_of_a_padded_view_free(size: int) -> None:
    """Of a permuted value: torch's own kernel would take the batch of the example."""

    class Permuted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.permute(0, 3, 1, 2)[..., 1:].relu()

    program = export(Permuted(), (torch.randn(2, 8, 17, 12),), dynamic_shapes=({0: Dim.AUTO},))
    gm = program.module(check_guards=False)
    (relu,) = (node for node in gm.graph.nodes if node.target is aten.relu.default)
    with gm.graph.inserting_after(relu):
        pad = gm.graph.call_function(
            aten.constant_pad_nd.default, (relu.args[0], [0, 0, 0, 0, 0, size, 0, 0])
        )
    gsg.annotate(gm, pad)
    batch, *others = pad.meta["val"].shape
    assert isinstance(batch, torch.SymInt)
    assert others == [12 + size, 8, 16]


def test_annotate_refuses_what_it_cannot_know(gm: fx.GraphModule) -> None:
    placeholder = next(node for node in gm.graph.nodes if node.op == "placeholder")
    with pytest.raises(ValueError, match="placeholder"):
        gsg.annotate(gm, placeholder)
    mul = named(gm, "mul")
    del mul.meta["val"]
    with gm.graph.inserting_after(mul):
        node = gm.graph.call_function(aten.relu.default, (mul,))
    with pytest.raises(ValueError, match="'mul'"):
        gsg.annotate(gm, node)


def test_capture_info_is_required() -> None:
    with pytest.raises(ValueError, match=r"graphsurgery\.capture"):
        gsg.capture_info(fx.symbolic_trace(nn.ReLU()))
