"""Capture: the dialect, the free batch, the caller's model left alone, one clear error where it cannot."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.export import Dim, export

from graphsurgery.capture import capture
from graphsurgery.errors import CaptureError
from graphsurgery.graph import capture_info, copy_graph_module, fake_mode, module_path, source_line
from graphsurgery.restore import restore

aten = torch.ops.aten


def warmed(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and affine parameters that matter."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return model.eval()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def targets(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


def assert_same(gm: nn.Module, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Outputs equal in structure, and bit for bit, at this call."""
    with torch.no_grad():
        left, right = model(*copy.deepcopy(args), **kwargs), gm(*copy.deepcopy(args), **kwargs)
    flat_left, spec_left = torch.utils._pytree.tree_flatten(left)
    flat_right, spec_right = torch.utils._pytree.tree_flatten(right)
    assert spec_left == spec_right
    for a, b in zip(flat_left, flat_right, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_dialect(gm: fx.GraphModule) -> None:
    mode = fake_mode(gm)
    for node in gm.graph.nodes:
        assert node.op in ("placeholder", "get_attr", "call_function", "output")
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable, node.target
            assert node.target not in (aten.view.default, aten._unsafe_view.default)
        if node.op in ("get_attr", "call_function"):
            value = node.meta["val"]
            assert not isinstance(value, torch.Tensor) or value.fake_mode is mode
    assert not gm.training
    gm.graph.lint()


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.bn = nn.BatchNorm2d(6, eps=1e-3, momentum=0.2)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(6 * 36, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.bn(self.conv(x)))
        x += 1
        return self.fc(self.drop(torch.flatten(x, 1)))


# -- the graph


def test_captures_a_conv_net_at_any_batch_in_the_dialect() -> None:
    model = warmed(ConvNet())
    gm = capture(model, torch.randn(1, 3, 8, 8))
    for batch in (1, 2, 5):
        assert_same(gm, model, torch.randn(batch, 3, 8, 8))
    assert_dialect(gm)
    norm = next(node for node in gm.graph.nodes if node.target is aten.batch_norm.default)
    assert norm.args[5:] == (False, 0.2, 1e-3, False)
    assert [node.target for node in norm.args[1:5]] == [
        "bn.weight",
        "bn.bias",
        "bn.running_mean",
        "bn.running_var",
    ]
    info = capture_info(gm)
    assert info.dynamic_batch
    assert info.notes == ()
    assert (info.input_names, info.output_names, info.model_name) == (("x",), ("output",), "ConvNet")
    assert info.args[0].shape == (1, 3, 8, 8)
    conv = next(node for node in gm.graph.nodes if node.target is aten.conv2d.default)
    assert module_path(conv) == "conv"
    assert source_line(conv).startswith("test_capture.py:")
    assert isinstance(conv.meta["val"].shape[0], torch.SymInt)


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2.0


class Helped(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._inner(x)

    def _inner(self, x: torch.Tensor) -> torch.Tensor:
        return _doubled(torch.relu(x))


def test_the_source_line_is_the_call_not_the_helper_around_it() -> None:
    gm = capture(Helped(), torch.randn(2, 3))
    lines = [source_line(node) for node in gm.graph.nodes if node.op == "call_function"]
    assert [line.split(", ", 1)[1] for line in lines] == [
        "in _inner: return _doubled(torch.relu(x))",
        "in _doubled: return x * 2.0",
    ]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_example_batch_does_not_matter(batch: int) -> None:
    model = warmed(ConvNet())
    gm = capture(model, (torch.randn(batch, 3, 8, 8),))
    assert capture_info(gm).dynamic_batch
    for other in (1, 2, 3, 7):
        assert_same(gm, model, torch.randn(other, 3, 8, 8))


def test_info_survives_deepcopy() -> None:
    gm = capture(warmed(ConvNet()), torch.randn(2, 3, 8, 8))
    twin = copy.deepcopy(gm)
    assert capture_info(twin).input_names == ("x",)
    assert_same(twin, gm, torch.randn(2, 3, 8, 8))


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.emb.weight
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(
        self, ids: torch.Tensor, *, mask: torch.Tensor | None = None, scale: float = 1.0
    ) -> dict[str, Any]:
        x = self.layer(self.emb(ids))
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        return {"logits": self.head(x) * scale, "hidden": (x, None, 3), "pooled": [x.mean(1)]}


def test_keyword_inputs_and_nested_outputs() -> None:
    model = Structured().double().eval()
    mask = torch.rand(2, 5, dtype=torch.float64)
    gm = capture(model, {"ids": torch.randint(0, 11, (2, 5)), "mask": mask, "scale": 2.0})
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        torch.backends.mha.set_fastpath_enabled(False)  # eagerly, a fused kernel rounds otherwise
        for batch in (1, 2, 5):
            inputs = {
                "ids": torch.randint(0, 11, (batch, 5)),
                "mask": torch.rand(batch, 5).double(),
                "scale": 2.0,
            }
            assert_same(gm, model, **inputs)
        torch.backends.mha.set_fastpath_enabled(True)
    info = capture_info(gm)
    assert info.input_names == ("ids", "mask", "scale")
    assert info.output_names[0] == "logits"
    assert len(set(info.output_names)) == len(info.output_names) == 5
    assert_dialect(gm)


def test_tied_weights_are_one_object_read_under_both_names() -> None:
    gm = capture(Structured().eval(), {"ids": torch.randint(0, 11, (2, 5))})
    assert gm.emb.weight is gm.head.weight
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    assert {"emb.weight", "head.weight"} <= read


class Nested(nn.Module):
    def forward(self, batch: dict[str, torch.Tensor], extra: Any, *more: torch.Tensor, **named: Any) -> Any:
        y = batch["a"] + batch["b"]
        for value in more:
            y = y * value
        return OrderedDict(y=y + named["shift"][0], x=extra)


def test_nested_none_star_and_scalar_inputs() -> None:
    model = Nested()
    a = torch.randn(2, 3)
    gm = capture(_Bound(model), ({"a": a, "b": a}, None, a, a + 1))
    b = torch.randn(5, 3)
    assert_same(gm, _Bound(model), {"a": b, "b": b}, None, b, b + 1)
    assert capture_info(gm).input_names == ("batch_a", "batch_b", "extra", "more_0", "more_1")


class _Bound(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: dict[str, torch.Tensor], extra: Any, *more: torch.Tensor) -> Any:
        return self.inner(batch, extra, *more, shift=(batch["a"].mean(),))


class Unread(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)
        self.table = torch.arange(3.0)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + self.table + torch.tensor([1.0, 2.0, 3.0])


def test_unused_inputs_and_parameters_and_constants() -> None:
    gm = capture(Unread(), (torch.randn(2, 3), torch.randn(2, 4)))
    assert_same(gm, Unread(), torch.randn(3, 3), torch.randn(3, 4))
    assert not hasattr(gm, "unused")
    assert gm.state_dict() == {}
    assert capture_info(gm).input_names == ("x", "y")


def test_a_module_without_operations() -> None:
    gm = capture(nn.Identity(), torch.randn(2, 3))
    assert_same(gm, nn.Identity(), torch.randn(2, 3))


# -- in-place operations and views


def inplace_chain(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.add_(1).mul_(3)
    z = y.relu_()
    return y + z


def inplace_slice(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, 0] = 7.0
    return y


def inplace_nested_slices(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[:, 1:3][:, 0].add_(1)
    y[:1] = 3.0
    z = y[:, -1]
    z.mul_(2)
    return y + z.unsqueeze(1)


def inplace_slice_read_elsewhere(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    other = y[:, :2]
    y[:, 1:3] = 5.0
    return other * y[:, 1:3]


def inplace_mask(x: torch.Tensor) -> torch.Tensor:
    mask = x.new_zeros((4, 4))
    for index, (start, stop) in enumerate(((0, 2), (2, 3), (3, 4))):
        mask[start:stop, start:stop] = index + 1
    return x @ mask


def inplace_through_view(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    flat = y.view(-1)
    flat.add_(1)
    return y


def inplace_with_old_view_read_later(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    old = y[:, 1:]
    y.mul_(5)
    return old + y[:, :-1]


def inplace_behind_an_eval_dropout(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    z = F.dropout(y, 0.5, training=False)
    z.mul_(3)
    return y * z


def inplace_behind_einsum(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    z = torch.einsum("ij->ji", y)
    z.mul_(3)
    return y


def inplace_keeps_dtype(x: torch.Tensor) -> torch.Tensor:
    y = x.half()
    y.add_(x)
    return y


def inplace_shape_change(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    z = y.detach()
    y.unsqueeze_(0)
    return y + z


def inplace_copy_and_fill(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    y.copy_(x)
    z = torch.empty_like(x).fill_(2.0)
    return y * z


def inplace_masked(x: torch.Tensor) -> torch.Tensor:
    y = x * 1
    y.masked_fill_(y > 0, -1.0)
    y[y < -1] = 4.0
    return y


@pytest.mark.parametrize(
    "function",
    [
        inplace_chain,
        inplace_slice,
        inplace_nested_slices,
        inplace_slice_read_elsewhere,
        inplace_mask,
        inplace_through_view,
        inplace_with_old_view_read_later,
        inplace_behind_an_eval_dropout,
        inplace_keeps_dtype,
        inplace_shape_change,
        inplace_copy_and_fill,
        inplace_masked,
    ],
    ids=lambda f: f.__name__,
)
def test_inplace_operations_become_functional(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    gm = capture(Model(), torch.randn(2, 4))
    assert_dialect(gm)
    for batch in (1, 2, 5):
        assert_same(gm, Model(), torch.randn(batch, 4))


def test_an_alias_that_torch_overlooks_is_refused_not_wrong() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return inplace_behind_einsum(x)

    with pytest.raises(CaptureError, match="does not reproduce"):
        capture(Model(), torch.randn(2, 4))


def test_a_write_into_the_input_is_noted_and_left_out() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu_(x) * 2 + x

    x = torch.randn(2, 4)
    kept = x.clone()
    gm = capture(Model(), x)
    assert torch.equal(x, kept)
    assert_same(gm, Model(), x)
    gm(x)
    assert torch.equal(x, kept)
    assert any("'x'" in note for note in capture_info(gm).notes)


def test_views_have_one_spelling() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.view(x.shape[0], 2, 6).unflatten(2, (3, 2)).flatten(1, 2).mT.movedim(2, 1).swapaxes(1, 2)
            return F.pad(torch.concat([y, torch.multiply(y, 2)], 1), (1, 1)).view_as(
                y.repeat(1, 2, 2)[..., :8]
            )

    gm = capture(Model(), torch.randn(3, 12))
    assert_same(gm, Model(), torch.randn(5, 12))
    names = set(targets(gm))
    assert {
        "aten.reshape.default",
        "aten.cat.default",
        "aten.mul.Tensor",
        "aten.constant_pad_nd.default",
    } <= names
    assert not names & {"aten.view.default", "aten.flatten.using_ints", "aten.mT.default", "aten.movedim.int"}


def test_batch_norm_returns_from_the_decomposed_form() -> None:
    model = warmed(ConvNet())
    program = export(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: Dim.AUTO},)).run_decompositions(
        {}
    )
    assert any("_native_batch_norm" in str(node.target) for node in program.graph.nodes)
    gm = capture(program, torch.randn(2, 3, 8, 8))
    assert "aten.batch_norm.default" in targets(gm)
    assert_dialect(gm)
    assert_same(gm, model, torch.randn(5, 3, 8, 8))


# -- what may be captured


def test_exported_program_brings_its_own_inputs() -> None:
    model = warmed(ConvNet())
    program = export(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: Dim.AUTO},))
    before = str(program.graph)
    gm = capture(program)
    assert str(program.graph) == before
    assert_same(gm, model, torch.randn(5, 3, 8, 8))
    assert capture_info(gm).dynamic_batch
    assert capture_info(gm).model_name == "ConvNet"


def test_traced_graph_module() -> None:
    model = warmed(ConvNet())
    gm = capture(fx.symbolic_trace(model), torch.randn(2, 3, 8, 8))
    assert_same(gm, model, torch.randn(5, 3, 8, 8))
    conv = next(node for node in gm.graph.nodes if node.target is aten.conv2d.default)
    assert conv.args[1].target == "conv.weight"


def test_a_captured_graph_can_be_captured_again() -> None:
    gm = capture(warmed(ConvNet()), torch.randn(2, 3, 8, 8))
    again = capture(gm, torch.randn(2, 3, 8, 8))
    assert targets(again) == targets(gm)
    assert_same(again, gm, torch.randn(5, 3, 8, 8))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_wrappers_are_unwrapped(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = warmed(ConvNet())
    gm = capture(wrap(model), torch.randn(2, 3, 8, 8))
    assert hasattr(gm, "conv")
    assert_same(gm, model, torch.randn(2, 3, 8, 8))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.gru = nn.GRU(5, 3, batch_first=True, bidirectional=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gru(self.lstm(x)[0])[0]


@pytest.mark.parametrize("batch", [1, 3])
def test_recurrent_layers_fall_back_to_a_static_batch(batch: int) -> None:
    model = Recurrent().eval()
    gm = capture(model, torch.randn(batch, 7, 4))
    assert_same(gm, model, torch.randn(batch, 7, 4))
    info = capture_info(gm)
    assert info.dynamic_batch or any(f"static batch of {batch}" in note for note in info.notes)


def test_a_model_that_fixes_the_batch_says_where() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] == 2:
                return x + 1
            return x - 1

    for batch in (1, 2):
        gm = capture(Model(), torch.randn(batch, 3))
        assert_same(gm, Model(), torch.randn(batch, 3))
    assert not capture_info(gm).dynamic_batch
    assert "if x.shape[0] == 2" in capture_info(gm).notes[-1]


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("condition", "function"),
    [
        ("even", lambda x: x + 1 if x.shape[0] % 2 == 0 else x - 1),
        ("small", lambda x: x + 1 if x.shape[0] < 4 else x - 1),
        ("one", lambda x: x + 1 if x.shape[0] == 1 else x - 1),
        ("squeeze", lambda x: x.squeeze() * 2),
    ],
)
def test_a_batch_that_decides_the_path_is_right_or_static(condition: str, function: Any, batch: int) -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    gm = capture(Model(), torch.randn(batch, 4))
    info = capture_info(gm)
    assert_same(gm, Model(), torch.randn(batch, 4))
    if info.dynamic_batch:
        single = () if any("not of 1" in note for note in info.notes) else (1,)
        for other in (*single, 2, 3, 4, 5, 8):
            assert_same(gm, Model(), torch.randn(other, 4))
    else:
        assert any(f"static batch of {batch}" in note for note in info.notes)


def test_inputs_that_only_happen_to_have_the_batch_size_stay_fixed() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            return x @ table  # x: (batch, 3), table: (3, 5)

    gm = capture(Model(), (torch.randn(3, 3), torch.randn(3, 5)))
    assert capture_info(gm).dynamic_batch
    assert_same(gm, Model(), torch.randn(7, 3), torch.randn(3, 5))


def test_a_batch_of_one_that_does_not_generalise_is_noted() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.squeeze() * 2 + (1.0 if x.shape[0] > 1 else 0.0)

    gm = capture(Model(), torch.randn(3, 4))
    assert_same(gm, Model(), torch.randn(3, 4))
    info = capture_info(gm)
    assert not info.dynamic_batch or any("not of 1" in note for note in info.notes)


def test_dynamic_shapes_pass_through() -> None:
    model = nn.Conv2d(3, 4, 3, padding=1)
    shapes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    gm = capture(model, torch.randn(2, 3, 8, 9), dynamic_shapes=shapes)
    assert_same(gm, model, torch.randn(4, 3, 5, 12))
    static = capture(model, torch.randn(2, 3, 8, 9), dynamic_shapes=({},))
    assert not capture_info(static).dynamic_batch


def test_parametrizations_hooks_and_gradient_blocks() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
            self.b = nn.Linear(4, 4)
            self.b.register_forward_hook(lambda module, args, output: output * 2)
            self.b.register_forward_pre_hook(lambda module, args: (args[0] + 1,))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                x = self.a(x)
            return self.b(x)

    model = Model()
    gm = capture(model, torch.randn(2, 4))
    assert_same(gm, model, torch.randn(5, 4))
    assert_dialect(gm)
    assert len(model.b._forward_hooks) == 1


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).to(dtype)
    gm = capture(model, torch.randn(2, 4).to(dtype))
    assert_same(gm, model, torch.randn(3, 4).to(dtype))


def test_batch_statistics_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    gm = capture(model, torch.randn(2, 3, 8, 8))
    assert_same(gm, model, torch.randn(5, 3, 8, 8))


# -- the caller's model


def test_a_tensor_that_is_neither_parameter_nor_buffer_is_put_back() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls, self.by_name = nn.Linear(4, 4), torch.zeros(4), {"x": torch.zeros(4)}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.by_name["x"].add_(1)
            return self.layer(x)

    model = Counts()
    with pytest.raises(CaptureError, match="writes 'calls' in forward"):
        capture(model, torch.randn(2, 4))
    assert not model.calls.any()
    assert not model.by_name["x"].any()


def test_the_callers_model_is_untouched() -> None:
    model = warmed(ConvNet()).train()
    model.bn.eval()
    model.fc.weight.requires_grad_(False)
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    calls: list[int] = []
    model.fc.register_forward_hook(lambda *args: calls.append(1))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    versions = {name: value._version for name, value in model.state_dict(keep_vars=True).items()}
    random = torch.random.get_rng_state()
    keys = {name: set(module.__dict__) for name, module in model.named_modules()}
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    torch.random.set_rng_state(random)

    gm = capture(model, x)

    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: value._version for name, value in model.state_dict(keep_vars=True).items()} == versions
    assert [m.training for m in model.modules()] == [True, True, False, True, True, True]
    assert torch.equal(model.conv.weight.grad, torch.ones_like(model.conv.weight))
    assert model.fc.bias.grad is None
    assert x.grad is None
    assert len(model.fc._forward_hooks) == 1
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == keys
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not gm.fc.weight.requires_grad
    assert gm.conv.weight.requires_grad
    assert gm.conv.weight.data_ptr() != model.conv.weight.data_ptr()
    assert any("training mode" in note for note in capture_info(gm).notes)


def test_attributes_that_forward_sets_are_put_back() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.seen: Any = None
            self.cache: dict[str, torch.Tensor] = {}
            self.trace: list[torch.Tensor] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.seen = x * 2
            self.trace.append(x)
            self.cache.setdefault("table", torch.arange(3.0))
            return self.seen + 1

    model = Model()
    gm = capture(model, torch.randn(2, 3))
    assert model.calls == 0
    assert model.seen is None
    assert model.cache == {}
    assert model.trace == []
    assert_same(gm, model, torch.randn(4, 3))


def test_parameters_that_forward_rewrites_are_put_back() -> None:
    class Model(nn.Module):  # a constraint on the weight, as some published models apply it
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.fc.weight.data.clamp_(-0.1, 0.1)
            self.fc.bias.data = self.fc.bias.data * 2
            return self.fc(x)

    model = Model()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(CaptureError):
        capture(model, torch.randn(2, 3))
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers


def test_inference_mode_of_the_caller() -> None:
    model = warmed(ConvNet())
    with torch.inference_mode():
        gm = capture(model, torch.randn(2, 3, 8, 8))
    assert not gm.fc.weight.is_inference()
    assert_same(gm, model, torch.randn(5, 3, 8, 8))


# -- one clear error


class WritesBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state.add_(1)
        return x + self.state


class AssignsBuffer(WritesBuffer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state = self.state + 1
        return x + self.state


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return -x


def _made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(3, 3)


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.fc(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (WritesBuffer, ["'state'", "self.state.add_(1)"]),
        (AssignsBuffer, ["'state'", "forward"]),
        (Branches, ["if x.sum() > 0", "torch.where", "test_capture.py"]),
        (Noisy, ["random", "torch.randn_like(x)"]),
        (Autocast, ["autocast"]),
        (lambda: torch.jit.trace(nn.Linear(3, 3), torch.randn(2, 3)), ["TorchScript"]),
        (lambda: nn.LazyLinear(3), ["not initialised"]),
        (lambda: nn.Linear(3, 3, device="meta"), ["meta device"]),
        (_made_in_inference_mode, ["inference_mode", "load the model outside"]),
        (lambda: nn.Linear(4, 3), ["Linear", "2x3 float32", "cannot be multiplied"]),
        (lambda: nn.Embedding(4, 3), ["Embedding", "pass inputs that the model accepts"]),
        (lambda: nn.Bilinear(3, 3, 2), ["missing 1 required positional argument"]),
    ],
    ids=[
        "buffer",
        "buffer-assigned",
        "branch",
        "noise",
        "autocast",
        "script",
        "lazy",
        "meta",
        "inference",
        "shape",
        "dtype",
        "few",
    ],
)
def test_refuses_with_one_sentence(
    model: Callable[[], nn.Module], words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    built = model()
    state = {name: copy.deepcopy(value) for name, value in built.state_dict().items()}
    with pytest.raises(CaptureError) as caught:
        capture(built, torch.randn(2, 3))
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert len(message) < 600
    assert message.endswith(".")
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""
    if "lazy" not in message and "meta" not in message:
        assert all(torch.equal(value, state[name]) for name, value in built.state_dict().items())


@pytest.mark.parametrize(
    ("inputs", "word"),
    [(None, "no example inputs"), (3, "got int"), ({0: torch.ones(1)}, "key 0"), ((), "missing")],
)
def test_refuses_inputs_that_are_none(inputs: Any, word: str) -> None:
    with pytest.raises(CaptureError, match=word):
        capture(nn.Linear(3, 3), inputs)


def test_refuses_what_is_no_model() -> None:
    with pytest.raises(CaptureError, match="cannot capture a str"):
        capture("resnet50", torch.randn(1, 3))  # type: ignore[arg-type]


def test_refuses_a_program_exported_in_training_mode() -> None:
    program = export(ConvNet().train(), (torch.randn(2, 3, 8, 8),))
    with pytest.raises(CaptureError, match="training mode"):
        capture(program)


def test_refuses_dynamic_shapes_that_the_model_forbids() -> None:
    with pytest.raises(CaptureError, match="cannot be captured"):
        capture(nn.Linear(3, 3), torch.randn(2, 3), dynamic_shapes=({1: Dim.DYNAMIC},))


def test_sparse_parameters_are_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(3).to_sparse())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sparse.mm(self.weight, x.t()).t()

    with pytest.raises(CaptureError, match="'weight' is a sparse tensor"):
        capture(Model(), torch.randn(2, 3))


@pytest.mark.parametrize("exported", [False, True])
def test_inputs_that_hold_nan_are_refused(exported: bool) -> None:
    x = torch.randn(2, 4)
    x[1, 2] = torch.nan
    model: Any = export(nn.Linear(4, 4), (x,)) if exported else nn.Linear(4, 4)
    with pytest.raises(CaptureError, match=r"the example inputs hold NaN \(1 of 8 values of the 2x4 one\)"):
        capture(model, None if exported else (x,))
    capture(nn.Softmax(-1), x.nan_to_num(-torch.inf))


class Switched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, flag: bool = True, scale: float | None = None) -> torch.Tensor:
        z = self.linear(x) * (1 if scale is None else scale)
        return z * 5 if flag else z


@pytest.mark.parametrize("other", [True, 0, None, torch.tensor(False)])
def test_an_argument_that_is_no_tensor_is_fixed(other: Any) -> None:
    model, x = Switched().eval(), torch.randn(3, 4)
    gm = capture(model, (x, False, None))
    assert capture_info(gm).notes == ("the argument 'flag' is fixed at False, as in the example",)
    restored = restore(gm)
    pickled = pickle.loads(pickle.dumps(restored))
    for module in (gm, copy_graph_module(gm), restored, copy.deepcopy(restored), copy.deepcopy(gm), pickled):
        assert_same(module, model, x, False, None)
        with pytest.raises(ValueError, match="'flag' was captured as False"):
            module(x, other, None)
        with pytest.raises(ValueError, match="'scale' was captured as None"):
            module(x, False, 2.0)
    with pytest.raises(ValueError, match="'flag' was captured as False"):
        fx.Interpreter(gm).run(x, other, None)
    for strict in (False, True):
        program = export(restored, (x, False, None), strict=strict)
        assert_same(program.module(), model, x, False, None)


def test_keyword_arguments_that_are_no_tensors_are_fixed() -> None:
    model, x = Switched().eval(), torch.randn(3, 4)
    gm = capture(model, {"x": x, "flag": True, "scale": float("nan")})
    with pytest.raises(ValueError, match="'flag' was captured as True"):
        gm(x=x, flag=False, scale=float("nan"))
    assert gm(x=x, flag=True, scale=float("nan")).isnan().all()


class Caching(nn.Module):
    """As decoders of transformers do by default."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, object]:
        from transformers import DynamicCache

        return x + 1, DynamicCache()


def test_a_cache_beside_the_outputs_is_refused_with_the_way_out() -> None:
    with pytest.raises(CaptureError, match=r"returns a DynamicCache beside its outputs.*use_cache=False"):
        capture(Caching(), torch.randn(2, 3))
