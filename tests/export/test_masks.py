"""Attention whose mask hides whole rows: zeros in torch, and zeros in the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphsurgery as gs
from graphsurgery.errors import VerificationError
from graphsurgery.export import OnnxSession, exporter


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
