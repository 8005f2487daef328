"""fold-norm-affine: weight and bias of a norm in the layers behind it, by every path or not at all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from folding import Of, assert_same, codes, ops
from torch import Tensor, nn

import graphsurgery as gs
from graphsurgery.affine import write
from graphsurgery.affine.certify import LIMIT
from graphsurgery.affine.coefficients import Coefficients
from graphsurgery.capture import capture
from graphsurgery.cost import graph_cost, op_name
from graphsurgery.graph import capture_info, structural_hash
from graphsurgery.passes import EliminateIdentity, FoldAffine, FoldNormAffine
from graphsurgery.restore import restore
from graphsurgery.rewrite.contracts import PassResult

Build = Callable[[], nn.Module]

IMAGE = torch.randn(2, 8, 6, 4, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))
ROWS = TOKENS[:, 0]
VOLUME = torch.randn(2, 8, 4, 3, 3, generator=torch.Generator().manual_seed(3))


def seeded(build: Build) -> nn.Module:
    """A model in evaluation mode whose scales, shifts and statistics are not trivial."""
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for module in model.modules():
            if "Norm" in type(module).__name__ and module.weight is not None:
                module.weight.copy_(torch.rand_like(module.weight) + 0.5)
                module.weight[::2] *= -1
                if getattr(module, "bias", None) is not None:
                    module.bias.normal_()
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def fold(build: Build, x: Tensor) -> PassResult:
    """Fold in float64; compare at three batch sizes with the model itself; run again; never dearer."""
    model = seeded(build).double()
    gm = EliminateIdentity().run(capture(model, (x.double(),))).graph_module
    before = structural_hash(gm)
    result = FoldNormAffine().run(gm)
    assert structural_hash(gm) == before, "the pass changed the graph that it was given"
    assert result.changes or structural_hash(result.graph_module) == before
    assert not {"certificate", "internal"} & set(codes(result)), result.refusals
    restored = restore(result.graph_module)
    assert capture_info(gm).dynamic_batch
    for batch in (1, 2, 5):
        generator = torch.Generator().manual_seed(batch)
        y = torch.randn(batch, *x.shape[1:], dtype=torch.float64, generator=generator)
        assert_same(result.graph_module, model, y)
        assert_same(restored, model, y)
    again = FoldNormAffine().run(result.graph_module)
    assert not again.changes, "a second run found something"
    assert structural_hash(again.graph_module) == structural_hash(result.graph_module)
    now, then = graph_cost(result.graph_module), graph_cost(gm)
    assert now.macs <= then.macs
    assert now.flops + now.moved <= then.flops + then.moved
    assert now.nodes <= then.nodes
    assert now.params < then.params or not result.changes
    for change in result.changes:
        assert change.residual is not None
        assert change.residual <= LIMIT
        assert change.cost_after.flops <= change.cost_before.flops
        assert change.cost_after.nodes <= change.cost_before.nodes
    return result


def bare_norms(result: PassResult) -> int:
    """How many norms have neither weight nor bias."""
    norms = [node for node in result.graph_module.graph.nodes if op_name(node).endswith("_norm")]
    return sum(not any(isinstance(arg, torch.fx.Node) for arg in norm.args[1:]) for norm in norms)


def heads(norm: nn.Module, *layers: nn.Module, after: Callable[..., Any] | None = None) -> nn.Module:
    """Layers side by side behind one norm, each with a relu of its own, or what `after` makes of them."""

    def forward(self: Any, x: Tensor) -> Any:
        y = self.norm(x)
        return after(self, y) if after else tuple(torch.relu(layer(y)) for layer in self.heads)

    return Of(forward, norm=norm, heads=nn.ModuleList(layers))


def behind(norm: nn.Module, layer: nn.Module, move: Callable[[Tensor], Tensor]) -> nn.Module:
    """A layer behind a norm and some movement."""
    return Of(lambda self, x: self.layer(move(self.norm(x))), norm=norm, layer=layer)


def sequence(*modules: nn.Module) -> Build:
    return lambda: nn.Sequential(*(copy.deepcopy(module) for module in modules))


# -- 1. folds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.LayerNorm(8),
        lambda: nn.LayerNorm(8, eps=0.1),
        lambda: nn.LayerNorm(8, bias=False),
        lambda: nn.RMSNorm(8),
        lambda: nn.RMSNorm(8, eps=0.1),
    ],
    ids=["layer-norm", "layer-norm-eps", "layer-norm-no-bias", "rms-norm", "rms-norm-eps"],
)
@pytest.mark.parametrize("x", [TOKENS, ROWS], ids=["tokens", "rows"])
def test_folds_into_a_linear(norm: Build, x: Tensor, bias: bool) -> None:
    result = fold(lambda: nn.Sequential(norm(), nn.Linear(8, 6, bias=bias)), x)
    (change,) = result.changes
    assert [ref.module for ref in change.before] == ["0", "1"]
    assert change.kind.endswith("_norm+linear")
    shifted = isinstance(norm(), nn.LayerNorm) and norm().bias is not None
    assert change.parameters == (("1.weight", "1.bias") if shifted or bias else ("1.weight",))
    assert change.cost_after.macs == change.cost_before.macs == 6 * x[0].numel()
    assert bare_norms(result) == 1
    assert len(ops(result)) == 2
    assert not result.refusals


def test_folds_into_queries_keys_and_values() -> None:
    def build() -> nn.Module:
        def attention(self: Any, y: Tensor) -> Tensor:
            q, k, v = (layer(y).unsqueeze(1) for layer in self.heads)
            return F.scaled_dot_product_attention(q, k, v).squeeze(1)

        layers = (nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 4))
        return heads(nn.LayerNorm(8), *layers, after=attention)

    result = fold(build, TOKENS)
    assert [change.parameters[0] for change in result.changes] == [f"heads.{i}.weight" for i in range(3)]
    assert all(change.before[0].module == "norm" for change in result.changes)
    assert bare_norms(result) == 1
    assert ops(result).count("linear") == 3


@pytest.mark.parametrize(
    ("move", "into"),
    [
        (lambda y: y[:, 0], 8),
        (lambda y: y[:, 1:], 8),
        (lambda y: y[:, ::2], 8),
        (lambda y: y.flatten(1), 40),
        (lambda y: y.reshape(-1, 8), 8),
        (lambda y: y.reshape(-1, 5, 2, 4).flatten(2), 8),
        (lambda y: y.unsqueeze(1), 8),
        (lambda y: y.transpose(0, 1), 8),
    ],
    ids=["select", "slice", "stride", "flatten", "merge", "views", "unsqueeze", "transpose"],
)
def test_folds_across_movement(move: Callable[[Tensor], Tensor], into: int) -> None:
    result = fold(lambda: behind(nn.LayerNorm(8), nn.Linear(into, 3), move), TOKENS)
    (change,) = result.changes
    assert change.parameters == ("layer.weight", "layer.bias")
    assert bare_norms(result) == 1
    assert ops(result).count("linear") == 1


def test_folds_over_several_dims() -> None:
    result = fold(sequence(nn.LayerNorm((5, 8)), nn.Flatten(), nn.Linear(40, 6)), TOKENS)
    (change,) = result.changes
    assert change.cost_before.params - change.cost_after.params == 2 * 40
    assert bare_norms(result) == 1


def test_folds_into_a_downsampling_convolution() -> None:
    """Channels last for the norm, first for the layer, as ConvNeXt has it."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.conv(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    result = fold(lambda: Of(forward, norm=nn.LayerNorm(8), conv=nn.Conv2d(8, 6, 2, 2)), IMAGE)
    (change,) = result.changes
    assert change.kind == "layer_norm+permute+conv2d"
    assert ops(result) == ["permute", "layer_norm", "permute", "conv2d"]
    assert bare_norms(result) == 1


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda: nn.Conv2d(8, 6, 1), IMAGE),
        (lambda: nn.Conv2d(8, 6, 3), IMAGE),
        (lambda: nn.Conv2d(8, 6, 3, 2, bias=False), IMAGE),
        (lambda: nn.Conv2d(8, 6, 2, dilation=2), IMAGE),
        (lambda: nn.Conv2d(8, 8, 3, groups=8), IMAGE),
        (lambda: nn.Conv2d(8, 8, 3, groups=2), IMAGE),
        (lambda: nn.Conv1d(8, 6, 3), IMAGE[..., 0]),
        (lambda: nn.Conv3d(8, 6, 2), VOLUME),
        (lambda: nn.Linear(8, 6), ROWS),
    ],
    ids=["1x1", "3x3", "strided", "dilated", "depthwise", "grouped", "1d", "3d", "linear"],
)
def test_folds_a_group_norm(layer: Build, x: Tensor) -> None:
    result = fold(lambda: nn.Sequential(nn.GroupNorm(2, 8), layer()), x)
    (change,) = result.changes
    assert change.parameters == ("1.weight", "1.bias")
    assert bare_norms(result) == 1
    assert len(ops(result)) == 2


def test_folds_a_bare_scale_into_a_padded_convolution() -> None:
    """Zeros stay zeros under a scale; only a shift meets the border."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.conv(F.group_norm(x, 2, weight=self.scale))

    scale = nn.Parameter(torch.linspace(-1, 2, 8))
    result = fold(lambda: Of(forward, scale=scale, conv=nn.Conv2d(8, 6, 3, padding=1)), IMAGE)
    (change,) = result.changes
    assert change.parameters[0] == "conv.weight"
    assert "scale" not in restore(result.graph_module).state_dict()


def test_folds_what_stands_between_with_it() -> None:
    result = fold(sequence(nn.GroupNorm(2, 8), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)), IMAGE)
    (change,) = result.changes
    assert change.kind == "group_norm+batch_norm+conv2d"
    assert change.cost_after.elementwise < change.cost_before.elementwise
    assert ops(result) == ["group_norm", "conv2d"]


def test_folds_a_sum_of_branches_behind_a_norm() -> None:
    """LoRA: the branches become one layer, which takes the norm's weight in too."""

    def lora(self: Any, y: Tensor) -> Tensor:
        w, down, up = self.heads
        return w(y) + 0.5 * up(down(y))

    layers = (nn.Linear(8, 8), nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False))
    result = fold(lambda: heads(nn.LayerNorm(8), *copy.deepcopy(layers), after=lora), TOKENS)
    (change,) = result.changes
    assert change.cost_after.macs < change.cost_before.macs
    assert ops(result) == ["layer_norm", "linear"]


def test_folds_the_layers_before_and_after_each_norm() -> None:
    parts = (nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    result = fold(sequence(*parts), TOKENS)
    assert [change.parameters[0] for change in result.changes] == ["1.weight", "3.weight"]
    assert bare_norms(result) == 2


def test_a_norm_that_stays_reads_what_the_fold_before_it_wrote() -> None:
    """The first norm goes into the sum and the Linear before the second, which is an output and stays."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y + self.layer(y))

    parts = {"first": nn.LayerNorm(8), "layer": nn.Linear(8, 8), "second": nn.LayerNorm(8)}
    result = fold(lambda: Of(forward, **copy.deepcopy(parts)), TOKENS)
    assert len(result.changes) == 1
    assert bare_norms(result) == 1
    assert codes(result) == ["output"]


def test_folds_beside_a_residual_that_passes_the_norm_by() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x + self.mlp(x)

    def build() -> nn.Module:
        mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        return Of(forward, mlp=mlp)

    (change,) = fold(build, TOKENS).changes
    assert change.parameters == ("mlp.1.weight", "mlp.1.bias")


def test_folds_weights_that_are_computed() -> None:
    """Weight and bias may be any constant expression; it leaves the graph."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return F.layer_norm(x, (8,), self.log.exp(), self.shift * 2) @ self.matrix

    parts = {"log": torch.randn(8), "shift": torch.randn(8), "matrix": torch.randn(8, 3)}
    result = fold(lambda: Of(forward, **{k: nn.Parameter(v) for k, v in parts.items()}), TOKENS)
    assert len(result.changes) == 1
    assert ops(result) == ["layer_norm", "linear"]


def test_folds_channels_of_scale_zero() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6)).double().eval()
    with torch.no_grad():
        model[0].weight[2:5] = 0
        model[0].bias.normal_()
    result = FoldNormAffine().run(capture(model, (TOKENS.double(),)))
    assert len(result.changes) == 1
    assert not result.graph_module.get_parameter("1.weight")[:, 2:5].any()
    assert_same(result.graph_module, model, TOKENS.double())


# -- 2. leaves alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "x"),
    [
        (sequence(nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 6)), TOKENS),
        (sequence(nn.RMSNorm(8, elementwise_affine=False), nn.Linear(8, 6)), TOKENS),
        (sequence(nn.GroupNorm(2, 8, affine=False), nn.Conv2d(8, 6, 1)), IMAGE),
        (sequence(nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)), IMAGE),
        (sequence(nn.Linear(8, 8), nn.ReLU()), TOKENS),
    ],
    ids=["layer-norm", "rms-norm", "group-norm", "batch-norm", "none"],
)
def test_noop_on_norms_without_weight(build: Build, x: Tensor) -> None:
    result = fold(build, x)
    assert not result.changes
    assert not result.refusals


def test_noop_on_a_norm_whose_weight_is_an_input() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.layer(F.layer_norm(x, (8,), x.mean((0, 1))))

    model = Of(forward, layer=nn.Linear(8, 3)).double()
    gm = capture(model, (TOKENS.double(),))
    result = FoldNormAffine().run(gm)
    assert not result.changes
    assert not result.refusals
    assert structural_hash(result.graph_module) == structural_hash(gm)


# -- 3. refuses ------------------------------------------------------------------------------------------


def refused(build: Build, x: Tensor) -> str:
    """The one code with which a model's norm is refused; nothing changes."""
    result = fold(build, x)
    assert not result.changes
    (refusal,) = result.refusals
    (node,) = refusal.nodes
    assert node.op.endswith("_norm")
    assert "weight and bias stay" in refusal.reason
    return refusal.code


def test_refuses_a_norm_that_is_an_output() -> None:
    assert refused(sequence(nn.LayerNorm(8)), TOKENS) == "output"
    both = lambda: heads(nn.LayerNorm(8), nn.Linear(8, 3), after=lambda m, y: (m.heads[0](y), y))  # noqa: E731
    assert refused(both, TOKENS) == "output"


def test_refuses_an_output_behind_a_scale() -> None:
    def after(self: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.heads[0](y), (y * 2 + 1) * 3

    assert refused(lambda: heads(nn.LayerNorm(8), nn.Linear(8, 6), after=after), TOKENS) == "output"


@pytest.mark.parametrize(
    "after",
    [
        lambda m, y: m.heads[0](torch.relu(y)),
        lambda m, y: m.heads[0](y) + torch.relu(y).sum(-1, keepdim=True),
        lambda m, y: m.heads[0](y) + torch.relu(y[:, :1] * 2).sum(-1, keepdim=True),
        lambda m, y: m.heads[0](y) * y,
    ],
    ids=["relu", "relu-beside", "relu-behind-views", "gate"],
)
def test_refuses_what_a_call_that_is_not_affine_reads(after: Callable[..., Any]) -> None:
    assert refused(lambda: heads(nn.LayerNorm(8), nn.Linear(8, 8), after=after), TOKENS) == "not-affine"


def test_refuses_one_norm_that_is_called_twice() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.relu(self.f(self.norm(x))) + self.g(self.norm(torch.tanh(x)))

    result = fold(lambda: Of(forward, norm=nn.LayerNorm(8), f=nn.Linear(8, 3), g=nn.Linear(8, 3)), TOKENS)
    assert codes(result) == ["shared-weights", "shared-weights"]
    assert not result.changes


def test_refuses_a_layer_that_reads_something_else_too() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.relu(self.f(self.norm(x))) + self.f(torch.tanh(x))

    assert refused(lambda: Of(forward, norm=nn.LayerNorm(8), f=nn.Linear(8, 8)), TOKENS) == "shared-weights"


def test_refuses_a_layer_with_a_tied_weight() -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
        model[2].weight = model[0].weight
        return model

    assert refused(build, TOKENS) == "shared-weights"


@pytest.mark.parametrize("padding", [1, "same", (0, 1)], ids=str)
def test_refuses_a_shift_that_meets_a_border(padding: Any) -> None:
    assert refused(sequence(nn.GroupNorm(2, 8), nn.Conv2d(8, 6, 3, padding=padding)), IMAGE) == "costs-more"


@pytest.mark.parametrize("beside", [nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 3, 2)], ids=["1x1", "3x3"])
@pytest.mark.parametrize(
    "padded",
    [
        lambda: nn.Conv2d(8, 6, 3, padding=1),
        lambda: nn.Conv2d(8, 6, 3, 2, padding=1),
        lambda: nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, 2, padding=1)),
    ],
    ids=["padded", "strided", "behind-a-norm"],
)
def test_refuses_all_readers_where_one_meets_a_border(padded: Build, beside: nn.Module) -> None:
    """A reader that would take the scale alone, or a shift of its own, leaves the norm as it is for all."""
    assert refused(lambda: heads(nn.GroupNorm(2, 8), copy.deepcopy(beside), padded()), IMAGE) == "costs-more"


def test_refuses_a_scale_per_position_before_one_layer_for_all() -> None:
    assert refused(sequence(nn.LayerNorm((5, 8)), nn.Linear(8, 6)), TOKENS) == "costs-more"
    assert refused(sequence(nn.LayerNorm((8, 6, 4)), nn.Conv2d(8, 6, 1)), IMAGE) == "costs-more"
    across = lambda: behind(nn.LayerNorm(8), nn.Linear(5, 3), lambda y: y.transpose(1, 2))  # noqa: E731
    assert refused(across, TOKENS) == "costs-more"


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", ["norm.weight", "norm.bias", "heads.1.weight"])
def test_refuses_weights_that_are_not_finite(name: str, value: float) -> None:
    """One of three readers cannot take them in: the others must not, or they would scale twice."""
    model = seeded(lambda: heads(nn.LayerNorm(8), *(nn.Linear(8, 4) for _ in range(3)))).double()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    gm = capture(model, (TOKENS.double(),))
    result = FoldNormAffine().run(gm)
    assert codes(result) == ["not-finite"]
    assert not result.changes
    assert structural_hash(result.graph_module) == structural_hash(gm)


def test_refuses_what_does_not_fit_the_dtype() -> None:
    model = seeded(lambda: heads(nn.LayerNorm(8), nn.Linear(8, 4), nn.Linear(8, 4)))
    with torch.no_grad():
        model.norm.weight[1] = 3e3
        model.heads[1].weight[0, 1] = 100.0
    gm = capture(model.half(), (TOKENS.half(),))
    result = FoldNormAffine().run(gm)
    assert codes(result) == ["overflow"]
    assert structural_hash(result.graph_module) == structural_hash(gm)


# -- 4. reports, the way through, dtypes, runtimes --------------------------------------------------------


def vision_block() -> nn.Module:
    """A small network with all three norms."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = torch.relu(self.first(self.groups(x)))
        tokens = y.flatten(2).transpose(1, 2)
        z = self.layer(tokens)
        tokens = tokens + self.v(z) * torch.sigmoid(self.q(z))
        return self.head(self.rms(tokens)[:, 0])

    return Of(
        forward,
        groups=nn.GroupNorm(2, 8),
        first=nn.Conv2d(8, 6, 3),
        layer=nn.LayerNorm(6),
        q=nn.Linear(6, 6),
        v=nn.Linear(6, 6, bias=False),
        rms=nn.RMSNorm(6),
        head=nn.Linear(6, 5),
    )


def test_reports_changes_and_restores_norms_without_weight() -> None:
    model = seeded(vision_block)
    state = copy.deepcopy(model.state_dict())
    result = gs.optimize(model, IMAGE)
    ours = [change for change in result.report.changes if change.pass_name == "fold-norm-affine"]
    assert [change.before[0].module for change in ours] == ["groups", "layer", "layer", "rms"]
    assert [change.parameters[0] for change in ours] == [f"{n}.weight" for n in ("first", "v", "q", "head")]
    assert all(change.after[0] == change.before[0] for change in ours)
    kinds = {name: type(module) for name, module in result.module.named_modules()}
    assert (kinds["groups"], kinds["layer"], kinds["rms"]) == (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    layers = ("first", "q", "v", "head")
    assert set(result.module.state_dict()) <= {f"{n}.{slot}" for n in layers for slot in ("weight", "bias")}
    assert result.report.verification is not None
    assert result.report.verification.ok
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_reaches_a_fixed_point_with_fold_affine() -> None:
    """What one pass leaves, the other does not undo."""
    model = seeded(vision_block).double()
    gm = capture(model, (IMAGE.double(),))
    passes = (EliminateIdentity(), FoldNormAffine(), FoldAffine())
    for _ in range(2):
        for item in passes:
            gm = item.run(gm).graph_module
    settled = structural_hash(gm)
    for item in passes:
        result = item.run(gm)
        assert not result.changes, item
        assert structural_hash(result.graph_module) == settled
    assert_same(gm, model, IMAGE.double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_any_float_dtype(norm: type[nn.Module], dtype: torch.dtype) -> None:
    model = seeded(lambda: heads(norm(8), nn.Linear(8, 6), nn.Linear(8, 3))).to(dtype)
    result = gs.optimize(model, TOKENS.to(dtype), passes=["fold-norm-affine"])
    assert len(result.report.changes) == 2
    assert result.report.verification is not None
    assert result.report.verification.ok
    weight = result.module.state_dict()["heads.0.weight"]
    exact = model.heads[0].weight.double() * model.norm.weight.double()
    assert torch.equal(weight, exact.to(dtype)), "rounded more than once"


def nodes(path: Path | str) -> int:
    """Number of calls in a file, but for views and their sizes, which move nothing."""
    return sum(node.op_type not in ("Reshape", "Constant") for node in onnx.load(path).graph.node)


def nodes_on_onnxruntime(path: Path) -> int:
    """The same of what is left after onnxruntime's own optimisations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return nodes(options.optimized_model_filepath)


@pytest.mark.parametrize(
    ("build", "x"),
    [
        (sequence(nn.LayerNorm(8), nn.Linear(8, 6)), TOKENS),
        (sequence(nn.LayerNorm((5, 8)), nn.Flatten(), nn.Linear(40, 6)), TOKENS),
        (sequence(nn.RMSNorm(8), nn.Linear(8, 6)), TOKENS),
        (sequence(nn.GroupNorm(2, 8), nn.Conv2d(8, 6, 3)), IMAGE),
        (lambda: heads(nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(8, 3)), TOKENS),
        (vision_block, IMAGE),
    ],
    ids=["layer-norm", "several-dims", "rms-norm", "group-norm", "heads", "vision"],
)
def test_onnxruntime_agrees_and_has_no_more_nodes(build: Build, x: Tensor, tmp_path: Path) -> None:
    """A norm without weight must not be exported as one with ones, expanded or computed."""
    counts = []
    for passes in (["eliminate-identity"], ["eliminate-identity", "fold-norm-affine"]):
        result = gs.optimize(seeded(build), x, passes=passes)
        path = tmp_path / f"{len(passes)}.onnx"
        exported = result.export_onnx(path)
        assert exported.verdict is not None
        assert exported.verdict.ok
        counts.append((nodes(path), nodes_on_onnxruntime(path)))
    assert any(change.pass_name == "fold-norm-affine" for change in result.report.changes)
    (raw, optimised), (raw_after, optimised_after) = counts
    assert raw_after <= raw
    assert optimised_after <= optimised


# -- 5. a wrong fold is caught ---------------------------------------------------------------------------


@pytest.mark.parametrize("slot", ["weight", "bias"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_detects_one_coefficient_that_is_off(which: int, slot: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One coefficient of one of three layers off by 1e-3 of itself: none of them is written."""
    right, calls = write.fill, []

    def off(*args: Any) -> Coefficients:
        filled = right(*args)
        calls.append(filled)
        if len(calls) - 1 != which:
            return filled
        value = filled.slots[slot].clone()
        value.view(-1)[value.abs().argmax()] *= 1 + 1e-3
        return Coefficients(filled.form, {**filled.slots, slot: value}, filled.method)

    model = seeded(lambda: heads(nn.LayerNorm(8), *(nn.Linear(8, 4) for _ in range(3))))
    gm = capture(model, (TOKENS,))
    assert len(FoldNormAffine().run(gm).changes) == 3
    monkeypatch.setattr(write, "fill", off)
    result = FoldNormAffine().run(gm)
    assert len(calls) == which + 1
    assert codes(result) == ["certificate"]
    assert not result.changes
    assert structural_hash(result.graph_module) == structural_hash(gm)
