"""Attention whose mask hides whole rows: zeros in torch, and zeros in the file."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphsurgery as gs
from graphsurgery.errors import VerificationError
from graphsurgery.export import OnnxSession, exporter, node_counts


class Attention(nn.Module):
    """Causal attention over tokens that a mask of the caller's hides, as a decoder has it."""

    def __init__(self, constant: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 3)
        hidden = torch.ones(5, 5, dtype=torch.bool).tril()
        hidden[0] = False
        self.register_buffer("seen", hidden if constant else torch.ones(5, 5, dtype=torch.bool).tril())

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        parts = self.qkv(x).view(x.shape[0], 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        seen = self.seen if mask.ndim == 1 else self.seen & mask[:, None, None, :]
        mixed = nn.functional.scaled_dot_product_attention(*parts, attn_mask=seen)
        answer: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return answer


def case(constant: bool) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    mask = torch.ones(2) if constant else torch.ones(2, 5, dtype=torch.bool)
    if not constant:
        mask[1, :2] = False  # padding on the left: the first rows see nothing
    return Attention(constant).eval(), (torch.randn(2, 5, 8), mask)


@pytest.mark.parametrize("constant", [False, True], ids=["of the caller", "constant"])
def test_rows_that_a_mask_hides_are_zero_in_the_file(constant: bool, tmp_path: Path) -> None:
    model, inputs = case(constant)
    file = tmp_path / "attention.onnx"
    written = gs.optimize(model, inputs).export_onnx(file)
    assert written.verdict is not None
    assert written.verdict.ok
    for optimised in (False, True):
        session = OnnxSession(file, optimised=optimised)
        (found,) = session.run(dict(zip(session.input_names, inputs, strict=False))).values()
        # float32 on another runtime; the exporter's mean in place of zeros is off by tenths
        torch.testing.assert_close(found, model(*inputs), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[1, 0], model.out.bias)  # type: ignore[arg-type, union-attr]


def test_detects_the_mask_of_the_exporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = case(constant=False)
    monkeypatch.setattr(exporter, "hide_rows", lambda _: 0)
    with pytest.raises(VerificationError, match="differs"):
        gs.optimize(model, inputs).export_onnx(tmp_path / "attention.onnx")


def test_leaves_a_mask_of_numbers_alone(tmp_path: Path) -> None:
    class Biased(nn.Module):
        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            bias = torch.where(bias > 0, 0.0, torch.finfo(torch.float32).min)
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=bias)

    torch.manual_seed(0)
    bias = torch.randn(2, 1, 5, 5)
    bias[1, :, 0] = -1  # hidden entirely: the mean, in torch too
    inputs = (torch.randn(2, 2, 5, 4), bias)
    written = gs.optimize(Biased(), inputs).export_onnx(tmp_path / "biased.onnx")
    assert written.verdict is not None
    assert written.verdict.ok


class Numbers(nn.Module):
    """Two layers of attention with one mask of numbers."""

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 24), nn.Linear(4, 12)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mask = mask if self.mask is None else self.mask
        for layer in (self.first, self.second):
            x = layer(x).unflatten(-1, (3, 1, -1)).permute(2, 0, 3, 1, 4)
            x = nn.functional.scaled_dot_product_attention(*x.chunk(2, -1)[0], attn_mask=mask).squeeze(1)
        return x


def minus_infinity(*rows: int) -> Tensor:
    torch.manual_seed(1)
    mask = torch.randn(5, 5)
    mask[:, 3] = -torch.inf  # one column of what is seen
    for row in rows:
        mask[row] = -torch.inf
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("constant", [False, True], ids=["of the caller", "constant"])
def test_rows_of_minus_infinity_are_zero_in_the_file(
    constant: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The mask that is exported hides nothing; those that come later do."""
    x, seen = torch.randn(2, 5, 8, dtype=dtype), torch.zeros(5, 5, dtype=dtype)
    model = Numbers(minus_infinity(0, 4) if constant else None).eval().to(dtype)
    file = tmp_path / "numbers.onnx"
    written = gs.optimize(model, (x, seen)).export_onnx(file)
    assert written.verdict is not None
    assert written.verdict.ok
    exact = copy.deepcopy(model).double()
    for optimised in (False, True):
        session = OnnxSession(file, optimised=optimised)
        for mask in (seen, minus_infinity(0, 4).to(dtype), minus_infinity().to(dtype)):
            given = dict(zip(session.input_names, (x, mask), strict=False))
            (found,) = session.run(given).values()
            expected = exact(x.double(), mask.double())
            loose = 2e-3 if dtype == torch.float16 else 1e-5
            torch.testing.assert_close(found.double(), expected, rtol=loose, atol=loose)
            hidden = (exact.mask if constant else mask).isinf().all(-1)  # type: ignore[union-attr, operator]
            assert not found[:, hidden].any()
            assert found[:, ~hidden].any(-1).all()


def counts(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> dict[str, int]:
    written = gs.optimize(model.eval(), inputs).export_onnx(path)
    assert written.verdict is not None
    assert written.verdict.ok
    return dict(node_counts(path))


def test_one_look_at_a_mask_serves_all_layers(tmp_path: Path) -> None:
    found = counts(Numbers(), (torch.randn(2, 5, 8), torch.zeros(5, 5)), tmp_path / "numbers.onnx")
    assert (found["IsInf"], found["Where"], found["Softmax"]) == (1, 2, 2)


@pytest.mark.parametrize("name", ["finite", "trained", "made of the query", "of truth values"])
def test_masks_that_cannot_hide_are_left_as_they_are(name: str, tmp_path: Path) -> None:
    class Finite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.register_buffer("mask", torch.randn(5, 5))
            self.places, self.line = nn.Embedding(9, 1), nn.Linear(4, 5)

        def forward(self, x: Tensor, seen: Tensor) -> Tensor:
            steps = torch.arange(5)
            masks = {
                "finite": self.mask,
                "trained": self.places(steps[None] - steps[:, None] + 4).permute(2, 0, 1)[None],
                "made of the query": self.line(x) * 2 + 1,
                "of truth values": (1.0 - seen.float()) * -1e4,
            }
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=masks[name])

    seen = torch.randn(5, 5) > 0
    found = counts(Finite(), (torch.randn(2, 1, 5, 4), seen), tmp_path / "finite.onnx")
    assert not found.keys() & {"IsInf", "IsNaN", "Where"}


@pytest.mark.parametrize("name", ["logarithm", "minus infinity"])
def test_masks_that_may_hide_are_looked_at(name: str, tmp_path: Path) -> None:
    class Hiding(nn.Module):
        def forward(self, x: Tensor, seen: Tensor) -> Tensor:
            masks = {"logarithm": seen.float().log(), "minus infinity": torch.where(seen, 0.0, -torch.inf)}
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=masks[name])

    seen = torch.ones(5, 5, dtype=torch.bool)
    seen[2] = False
    x, file = torch.randn(2, 1, 5, 4), tmp_path / "hiding.onnx"
    assert counts(Hiding(), (x, seen), file)["IsInf"] == 1
    session = OnnxSession(file)
    (found,) = session.run(dict(zip(session.input_names, (x, seen), strict=True))).values()
    assert not found[:, :, 2].any()
    assert found[:, :, 1].all()


def test_detects_that_the_exporter_answers_with_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "hide_rows", lambda _: 0)
    model, inputs = Numbers(minus_infinity(0)).eval(), (torch.randn(2, 5, 8), torch.zeros(5, 5))
    with pytest.raises(VerificationError):
        gs.optimize(model, inputs).export_onnx(tmp_path / "numbers.onnx")


@pytest.mark.parametrize("name", ["once", "of two masks", "twice"])
def test_the_lowest_number_is_looked_at_where_it_is_added_up(name: str, tmp_path: Path) -> None:
    class Lowest(nn.Module):
        def forward(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
            lowest = torch.finfo(torch.float32).min
            mask = torch.where(first, 0.0, lowest)
            if name == "of two masks":
                mask = mask + (1.0 - second.float()) * lowest
            elif name == "twice":
                mask = mask.sin() * 0 + mask + mask.transpose(0, 1)
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    file, seen = tmp_path / "lowest.onnx", torch.ones(5, 5, dtype=torch.bool)
    inputs = (torch.randn(2, 1, 5, 4), seen, seen.clone())
    gs.optimize(Lowest(), inputs, verify="off").export_onnx(file, verify=False)
    assert node_counts(file).get("IsInf", 0) == (name != "once")
