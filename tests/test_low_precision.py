"""Networks below float32, in float64 and of several dtypes: folded in float64, stored in their own."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_chains import warmed
from torch import Tensor, nn
from torch.nn import functional as F

import graphsurgery as gs

# How far the weights of a layer are off. A bfloat16 has a unit of 0.8 %, and storing each folded weight in it
# explains an error of about five units of one layer: 5 % is just below what can be told from rounding there.
WRONG = {torch.float16: 0.05, torch.bfloat16: 0.1, torch.float64: 0.05}


class Block(nn.Module):
    """A transformer block with a layer scale."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        for norm in (self.first, self.second):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        parts = self.qkv(self.first(x)).reshape(rows, tokens, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.scale * self.proj(mixed)
        return x + self.down(F.gelu(self.up(self.second(x))))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(128, 5),
    )


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 40), nn.Linear(40, 10)
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "cnn": (cnn, (2, 3, 6, 6)),
    "block": (Block, (2, 5, 16)),
    "mlp": (mlp, (4, 20)),
}


def network(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    model = build().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            warmed(module)
    return model.to(dtype), torch.randn(shape).to(dtype)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", WRONG, ids=str)
def test_a_right_fold_passes_and_a_wrong_weight_is_caught(name: str, dtype: torch.dtype) -> None:
    model, x = network(name, dtype)
    result = gs.optimize(model, (x,))
    assert result.report.verification.ok, str(result.report.verification)
    assert result.report.failures == ()
    assert len(result.report.changes) >= 2
    assert all((change.residual or 0.0) < 1e-11 for change in result.report.changes)  # certified in float64
    assert {p.dtype for p in result.module.parameters()} == {dtype}
    with torch.no_grad():
        assert result.module(x).dtype == dtype
        parameter = next(
            p for n, p in result.module.named_parameters() if n.endswith("weight") and p.ndim > 1
        )
        parameter *= 1 + WRONG[dtype]
    verdict = gs.verify(model, result.module, (x,))
    assert not verdict.ok
    assert "times the rounding noise" in verdict.reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_folded_weights_are_rounded_once(dtype: torch.dtype) -> None:
    """What is stored is the product in float64, rounded to the dtype: no rounding in between."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 6)).to(dtype).eval()
    result = gs.optimize(model, torch.randn(3, 8).to(dtype))
    (layer,) = result.module.children()
    first, second = (part.double() for part in copy.deepcopy(model))
    weight = second.weight @ first.weight
    bias = second.weight @ first.bias + second.bias
    for got, wanted in ((layer.weight, weight), (layer.bias, bias)):
        assert got.dtype == dtype
        # half a unit in the last place, and what the order of a float64 sum may do at a tie
        unit = torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(wanted.abs())))
        assert bool(((got.double() - wanted).abs() <= 0.5 * unit * (1 + 1e-9)).all())


class Mixed(nn.Module):
    """Half-precision layers around a norm in float32."""

    def __init__(self, low: torch.dtype) -> None:
        super().__init__()
        self.low = low
        self.first, self.second = nn.Linear(12, 16).to(low), nn.Linear(16, 16).to(low)
        self.norm = warmed(nn.BatchNorm1d(16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x.to(self.low)))
        return self.head(self.norm(y.float()))


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_layers_of_several_dtypes_fold_within_their_own(low: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Mixed(low).eval(), torch.randn(3, 12)
    result = gs.optimize(model, x)
    assert result.report.verification.ok, str(result.report.verification)
    found = sorted(
        str(module.weight.dtype) for module in result.module.modules() if isinstance(module, nn.Linear)
    )
    assert found == sorted(["torch.float32", str(low)])
    with torch.no_grad():
        assert result.module(x).dtype == torch.float32
        next(p for p in result.module.parameters() if p.dtype == low and p.ndim > 1).mul_(1 + WRONG[low])
    assert not gs.verify(model, result.module, x).ok


def test_a_product_that_overflows_float16_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half().eval()
    with torch.no_grad():
        model[0].weight.fill_(300.0)
        model[1].weight.fill_(300.0)
    x = torch.full((2, 4), 1e-3).half()
    result = gs.optimize(model, x)
    assert [refusal.code for refusal in result.report.refusals] == ["overflow"]
    assert re.search(r"does not fit torch.float16", result.report.refusals[0].reason)
    assert len(list(result.module.children())) == 2
    assert torch.equal(result.module(x), model(x))


def test_a_float16_file_runs_on_onnxruntime(tmp_path: Path) -> None:
    model, x = network("mlp", torch.float16)
    done = gs.optimize(model, x).export_onnx(tmp_path / "mlp.onnx")
    assert done.verdict is not None
    assert done.verdict.ok
    assert done.verdict.outputs[0].dtype == "float16"


def test_a_bfloat16_file_is_run_node_by_node_and_says_so(tmp_path: Path) -> None:
    model, x = network("mlp", torch.bfloat16)
    done = gs.optimize(model, x, verify="off").export_onnx(tmp_path / "mlp.onnx", external_data=True)
    assert done.external_data
    assert len(list(tmp_path.iterdir())) == 2
    assert done.verdict is not None
    assert done.verdict.ok
    assert done.verdict.outputs[0].dtype == "bfloat16"
    assert done.verdicts == (done.verdict,)  # onnxruntime did not run the file itself
    for notes in (done.notes, done.verdict.notes):
        assert any("file as a whole was not run" in note for note in notes)


def test_a_float64_file_says_that_its_attributes_are_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6, eps=1e-3)).double().eval()
    result = gs.optimize(model, torch.randn(2, 6, dtype=torch.float64))
    with pytest.raises(
        gs.VerificationError, match=r"attributes of an ONNX file .* export the model in float32"
    ):
        result.export_onnx(tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
