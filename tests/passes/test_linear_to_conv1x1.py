"""Linear layers as 1x1 convolutions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from swapping import codes, ops, same_weights, seeded, swap, swapped, there_and_back, work
from torch import Tensor, nn
from torch.nn import functional as F

import graphsurgery as gs
from graphsurgery.capture import capture
from graphsurgery.errors import PassError
from graphsurgery.graph import structural_hash
from graphsurgery.layout import exchange
from graphsurgery.layout.settle import permutes
from graphsurgery.passes.conv1x1_to_linear import Conv1x1ToLinear
from graphsurgery.passes.linear_to_conv1x1 import LinearToConv1x1

TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))


class Mlp(nn.Sequential):
    def __init__(self, bias: bool = True) -> None:
        super().__init__(nn.Linear(8, 12, bias=bias), nn.GELU(), nn.Dropout(0.1), nn.Linear(12, 8, bias=bias))


class Block(nn.Module):
    """Norm, MLP, residual, twice."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm1, self.mlp1, self.norm2, self.mlp2 = norm(8), Mlp(), norm(8), Mlp(bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp1(self.norm1(x))
        return x + self.mlp2(self.norm2(x))


class Call(nn.Module):
    """A function of a Linear and its input."""

    def __init__(self, function: Callable[[nn.Linear, Tensor], Any], features: int = 8) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(features, 6), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer, x)


# -- 1. swaps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "conv", "moves"),
    [
        ((2, 8), "conv1d", 0),
        ((2, 5, 8), "conv1d", 2),
        ((2, 4, 3, 8), "conv2d", 2),
        ((2, 2, 3, 4, 8), "conv3d", 2),
        ((2, 2, 3, 2, 2, 8), "conv1d", 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_swaps_an_mlp(shape: tuple[int, ...], conv: str, moves: int, bias: bool) -> None:
    result = swap(LinearToConv1x1(), seeded(lambda: Mlp(bias)), torch.randn(shape))
    calls = ops(result.graph_module)
    assert calls.count(conv) == 2
    assert "linear" not in calls
    assert len(permutes(result.graph_module)) == moves, "one at each end of the stretch"
    inside = calls[calls.index(conv) : len(calls) - calls[::-1].index(conv)]
    assert not {"permute", "transpose"} & set(inside)
    assert [change.kind for change in result.changes if "->" in change.kind] == [f"linear->{conv}"] * 2


def test_swaps_a_vector_without_batch() -> None:
    result = gs.optimize(seeded(Mlp), torch.randn(8), passes=["linear-to-conv1x1"], dynamic_shapes=(None,))
    assert ops(result.graph_module).count("conv1d") == 2
    assert result.report.verification is not None
    assert result.report.verification.ok


def test_restores_convolutions_under_the_old_names() -> None:
    model = seeded(Block)
    result = gs.optimize(model, TOKENS, passes=["linear-to-conv1x1"])
    assert isinstance(result.module.get_submodule("mlp1.0"), nn.Conv1d)
    assert result.module.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm], ids=["layer", "rms"])
def test_writes_norms_by_hand_where_that_saves_permutes(norm: Callable[[int], nn.Module]) -> None:
    model = seeded(lambda: Block(lambda n: norm(n, eps=1e-5)))  # type: ignore[call-arg]
    result = swap(LinearToConv1x1(), model, TOKENS)
    assert len(permutes(result.graph_module)) == 2
    assert "rsqrt" in ops(result.graph_module)
    kept = swap(LinearToConv1x1(layout="channels-last"), model, TOKENS)
    assert len(permutes(kept.graph_module)) == 4, "one at each end of each MLP"
    assert "rsqrt" not in ops(kept.graph_module)


def test_keeps_a_norm_that_would_save_nothing() -> None:
    model = seeded(lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6)))
    assert "layer_norm" in ops(swap(LinearToConv1x1(), model, TOKENS).graph_module)


def test_keeps_norms_of_half_precision() -> None:
    result = LinearToConv1x1().run(capture(seeded(Block).half(), (TOKENS.half(),)))
    assert ops(result.graph_module).count("layer_norm") == 2


def test_swaps_attention_with_no_more_permutes() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            b, t, c = x.shape
            q, k, v = self.qkv(x).reshape(b, t, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c)
            return self.proj(x)

    result = swap(LinearToConv1x1(), seeded(Attention), TOKENS)
    assert len(permutes(result.graph_module)) == 4, "two at the ends, two of the attention itself"


def test_swaps_over_tokens_and_over_channels() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.channels = nn.Linear(5, 5), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + torch.relu(self.tokens(x.transpose(1, 2))).transpose(1, 2)
            return x + torch.relu(self.channels(x))

    result = swap(LinearToConv1x1(), seeded(Mixer), TOKENS)
    assert len(permutes(result.graph_module)) == 2, "as many as before"


@pytest.mark.parametrize(
    "function",
    [
        lambda f, x: torch.cat([f(x), x.new_zeros(1, 1, 6).expand(len(x), -1, -1)], 1).softmax(-1),
        lambda f, x: torch.roll(f(x), 2, 1).mean(1),
        lambda f, x: F.pad(f(x), (1, 0, 0, 2)).log_softmax(2).amax(2, keepdim=True),
        lambda f, x: torch.cat(f(x).chunk(2, -1)[::-1], -1) * x[..., :6],
        lambda f, x: f(x).flip(1)[:, 1:] / f(x)[:, :1],
        lambda f, x: f(x)[:, 0] + f(x).sum((1,)),
        lambda f, x: f(x).unflatten(2, (2, 3)).flatten(2),
        lambda f, x: (f(x), f(x).transpose(1, 2) @ x),
        lambda f, x: f(x) + f(x).mean(-1, keepdim=True),
        lambda f, x: torch.where(f(x) > 0, f(x), x[..., :6].tanh()),
        lambda f, x: F.glu(f(x), -1).cumsum(1),
    ],
)
def test_swaps_among_calls_along_axes(function: Callable[[nn.Linear, Tensor], Any]) -> None:
    result = swap(LinearToConv1x1(), seeded(lambda: Call(function)), TOKENS)
    assert "linear" not in ops(result.graph_module)


def test_swaps_what_lies_between_constants() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.position, self.scale = nn.Parameter(torch.randn(1, 5, 8)), nn.Parameter(torch.randn(8))
            self.prelu = nn.PReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.prelu(self.a(x) * self.scale + self.position))

    there, back = there_and_back(LinearToConv1x1(), Conv1x1ToLinear(), seeded(Net), TOKENS)
    assert len(permutes(there.graph_module)) == 2
    assert ops(back.graph_module) == ["linear", "mul", "add", "prelu", "linear"]


@pytest.mark.parametrize("gain", [1, 8], ids=["one-gain", "a-gain-for-each"])
@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
def test_swaps_around_norms_that_the_model_writes_by_hand(gain: int, layout: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.gain = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(gain))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.gain)

    result = swap(LinearToConv1x1(layout=layout), seeded(Net), TOKENS)
    assert not codes(result)
    assert len(permutes(result.graph_module)) == 2, "roots of random numbers must not refuse the layout"


def test_swaps_around_a_mask_of_infinity() -> None:
    mask = torch.triu(torch.full((5, 5), -torch.inf), 1)
    function = lambda f, x: (f(x) @ x.mT[:, :6] + mask).softmax(-1) @ f(x).masked_fill(mask[:, :1] < 0, -9)  # noqa: E731
    result = swap(LinearToConv1x1(), seeded(lambda: Call(function)), TOKENS)
    assert not codes(result)


@pytest.mark.parametrize("shape", [(2, 5, 1), (2, 1, 5, 1)], ids=str)
def test_swaps_one_channel_of_free_positions(shape: tuple[int, ...]) -> None:
    model = seeded(
        lambda: nn.Sequential(nn.Linear(1, 8), nn.GELU(), nn.Linear(8, 1), nn.Tanh(), nn.Linear(1, 1))
    )
    free = {axis: torch.export.Dim.AUTO for axis, size in enumerate(shape) if size != 1}
    gm = capture(model.double(), (torch.randn(shape, dtype=torch.float64),), dynamic_shapes=(free,))
    result = LinearToConv1x1().run(gm)
    assert len(swapped(result)) == 3
    x = torch.randn([3 * size if size != 1 else 1 for size in shape], dtype=torch.float64)
    assert (result.graph_module(x) - model(x)).abs().max() < 1e-12


def test_slices_before_a_convolution_of_the_model_stay() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.layer = nn.Conv2d(4, 4, 1), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x[:, :, ::2]).sum() + self.layer(x)

    model, x = seeded(Net).double(), torch.randn(4, 6, 6, dtype=torch.float64)
    gm = capture(model, (x,), dynamic_shapes=None)
    result = LinearToConv1x1().run(gm)
    assert swapped(result) == ("layer",)
    assert (result.graph_module(x) - model(x)).abs().max() < 1e-12, "axis 2 of three is the last one"


def test_swaps_under_a_bias_that_is_computed() -> None:
    model = seeded(lambda: Call(lambda f, x: F.linear(x, f.weight, x[0, 0, :6])))
    assert ops(swap(LinearToConv1x1(), model, TOKENS).graph_module).count("conv1d") == 1


def test_tied_weights_stay_tied() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids))

    model, ids = seeded(Net), torch.randint(0, 11, (2, 5))
    result = gs.optimize(model, ids, passes=["linear-to-conv1x1"])
    assert ops(result.graph_module).count("conv1d") == 1
    assert len({id(value) for value in result.module.parameters()}) == 1
    twice = seeded(lambda: Call(lambda f, x: f(x).tanh() * f(-x)))
    calls = swap(LinearToConv1x1(), twice, TOKENS)
    assert tuple(calls.graph_module.state_dict()["layer.weight"].shape) == (6, 8, 1)


def test_swaps_computed_weights() -> None:
    model = seeded(lambda: Call(lambda f, x: F.linear(x, f.weight * 2, f.bias)))
    assert ops(swap(LinearToConv1x1(), model, TOKENS).graph_module).count("conv1d") == 1


def test_swaps_the_layers_that_are_named() -> None:
    result = swap(LinearToConv1x1(only=("mlp2.*",)), seeded(Block), TOKENS)
    assert swapped(result) == ("mlp2.0", "mlp2.3")
    assert ops(result.graph_module).count("linear") == 2


@pytest.mark.parametrize("build", [Mlp, Block, lambda: nn.Sequential(Block(), nn.Linear(8, 3))])
@pytest.mark.parametrize("shape", [(2, 8), (2, 5, 8), (2, 3, 4, 8)], ids=str)
def test_there_and_back(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model, x = seeded(build), torch.randn(shape)
    _, back = there_and_back(LinearToConv1x1(), Conv1x1ToLinear(), model, x)
    assert ops(back.graph_module) == ops(capture(model, (x,)))


@pytest.mark.parametrize("shape", [(8,), (2, 5, 8), (2, 2, 3, 2, 2, 8)], ids=str)
def test_there_and_back_by_the_marks(shape: tuple[int, ...]) -> None:
    model, x = seeded(Block), torch.randn(shape)
    gm = capture(model, (x,), dynamic_shapes=(None,) if len(shape) == 1 else None)
    there = LinearToConv1x1().run(gm)
    back = Conv1x1ToLinear(only="swapped").run(there.graph_module)
    assert ops(back.graph_module) == ops(gm)
    same_weights(gm.state_dict(), back.graph_module)


def test_only_swapped_finds_layers_by_their_marks_not_their_names() -> None:
    model = seeded(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    gm = capture(model, (TOKENS,))
    there = LinearToConv1x1().run(gm)
    assert "linear" not in ops(there.graph_module)
    back = Conv1x1ToLinear(only="swapped").run(there.graph_module)
    assert work(back.graph_module) == work(gm)
    assert len(permutes(back.graph_module)) <= len(permutes(gm))
    same_weights(gm.state_dict(), back.graph_module)
    none = Conv1x1ToLinear(only="swapped").run(capture(nn.Sequential(nn.Conv1d(5, 5, 1)), (TOKENS,)))
    assert not none.changes


def test_the_way_back_writes_permutes_as_the_model_does() -> None:
    def windows(layer: nn.Linear, x: Tensor) -> Tensor:
        parts = x.reshape(len(x), 2, 2, 2, 2, 8).permute(0, 1, 3, 2, 4, 5)
        parts = layer(parts.reshape(-1, 4, 8)).reshape(len(x), 2, 2, 2, 2, 6)
        return parts.permute(0, 1, 3, 2, 4, 5).reshape(len(x), 4, 4, 6)

    gm = capture(seeded(lambda: Call(windows)), (torch.randn(2, 4, 4, 8),))
    back = Conv1x1ToLinear(only="swapped").run(LinearToConv1x1().run(gm).graph_module)
    assert ops(back.graph_module).count("permute") == ops(gm).count("permute") == 2
    assert "transpose" not in ops(back.graph_module)
    assert len(ops(back.graph_module)) <= len(ops(gm))


# -- 2. leaves alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "x"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), torch.randn(2, 3, 5, 5)),
        (lambda: Call(lambda f, x: F.linear(x, torch.tanh(x[0]))), TOKENS),
        (lambda: Call(lambda f, x: x.transpose(1, 2).relu().transpose(1, 2)), TOKENS),
    ],
)
def test_noop_on(build: Callable[[], nn.Module], x: Tensor) -> None:
    result = swap(LinearToConv1x1(), seeded(build), x)
    assert not result.changes
    assert not result.refusals


def test_does_not_run_by_default() -> None:
    assert LinearToConv1x1 not in {type(item) for item in gs.passes.default_passes()}


# -- 3. refuses ------------------------------------------------------------------------------------------


def test_refuses_weights_that_are_not_finite() -> None:
    model = seeded(Mlp)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.inf  # type: ignore[index, operator]
    result = LinearToConv1x1().run(capture(model, (TOKENS,)))
    assert codes(result) == ["not-finite"]
    assert swapped(result) == ("3",)


def test_refuses_an_empty_value() -> None:
    result = LinearToConv1x1().run(capture(seeded(Mlp), (torch.randn(2, 0, 8),)))
    assert codes(result) == ["empty", "empty"]
    assert not result.changes


def test_refuses_where_memory_is_read() -> None:
    model = seeded(lambda: Call(lambda f, x: f(x).as_strided((2, 3), (3, 1))))
    gm = capture(model, (TOKENS,), dynamic_shapes=(None,))
    result = LinearToConv1x1().run(gm)
    assert codes(result) == ["reads-memory"]
    assert not result.changes


@pytest.mark.parametrize("options", [{"layout": "NCHW"}, {"only": "head"}, {"only": (3,)}])
def test_refuses_options(options: dict[str, Any]) -> None:
    with pytest.raises(PassError, match=r"must be"):
        LinearToConv1x1(**options)


# -- 4. dtypes, runtimes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_any_float_dtype(dtype: torch.dtype) -> None:
    model = seeded(Block).to(dtype)
    result = gs.optimize(model, TOKENS.to(dtype), passes=["linear-to-conv1x1"])
    assert result.report.verification is not None
    assert result.report.verification.ok
    weight = result.module.state_dict()["mlp1.0.weight"]
    assert torch.equal(weight[..., 0], model.mlp1[0].weight)


def test_the_callers_model_is_untouched() -> None:
    model = seeded(Block)
    state = copy.deepcopy(model.state_dict())
    gs.optimize(model, TOKENS, passes=["linear-to-conv1x1"])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
def test_onnxruntime_agrees(layout: Any, tmp_path: Path) -> None:
    result = gs.optimize(seeded(Block), TOKENS, passes=[LinearToConv1x1(layout=layout)])
    result.export_onnx(tmp_path / "model.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert kinds.count("Conv") == 4
    assert not {"MatMul", "Gemm"} & set(kinds)
    assert kinds.count("Transpose") == (2 if layout == "channels-first" else 4)


# -- 5. a wrong swap is caught ---------------------------------------------------------------------------


def test_detects_one_coefficient_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    real = exchange.evaluator

    def off(gm: Any, sizes: Any, known: Any, batch: int = 2) -> Callable[[Any], Any]:
        value = real(gm, sizes, known, batch)

        def changed(node: Any) -> Any:
            result = value(node)
            if "conv1d" in {str(n.target).split(".")[1] for n in known if n.op == "call_function"}:
                result = result.clone()
                result[0, 0, 0] *= 1 + 1e-3
            return result

        return changed

    monkeypatch.setattr(exchange, "evaluator", off)
    gm = capture(seeded(Mlp), (TOKENS,))
    result = LinearToConv1x1().run(gm)
    assert codes(result) == ["certificate", "certificate"]
    assert not result.changes
    assert structural_hash(result.graph_module) == structural_hash(gm)


def test_detects_a_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    real = exchange.Exchange.permute

    def wrong(self: Any, like: Any, value: Any, order: Any) -> Any:
        return real(self, like, value, (0, 2, 3, 1) if order == (0, 3, 1, 2) else order)

    monkeypatch.setattr(exchange.Exchange, "permute", wrong)
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    result = LinearToConv1x1().run(capture(model, (torch.randn(2, 8, 8, 8),)))
    assert codes(result) == ["certificate"]
    assert not result.changes
