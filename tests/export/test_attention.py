"""Attention over other than four axes, which torch's exporter cannot translate."""

from __future__ import annotations

from math import prod
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import graphsurgery as gs
from graphsurgery.errors import ExportError
from graphsurgery.export import exporter


class Windowed(nn.Module):
    """As in Hiera: heads and windows before the length; or neither."""

    def __init__(self, heads: bool, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.heads:
            parts = self.qkv(x).reshape(x.shape[0], 6, 5, 3, 2, 4).permute(3, 0, 4, 1, 2, 5)
        else:
            parts = self.qkv(x).chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(*parts, is_causal=self.causal)
        if self.heads:
            mixed = mixed.permute(0, 2, 3, 1, 4).flatten(3)
        answer: Tensor = self.out(mixed)
        return answer


@pytest.mark.parametrize(
    ("heads", "causal"), [(True, False), (False, True)], ids=["five axes", "three, causal"]
)
def test_attention_is_exported_with_a_free_batch(heads: bool, causal: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Windowed(heads, causal).eval()
    result = gs.optimize(model, torch.randn(2, 6, 5, 8) if heads else torch.randn(2, 5, 8))
    written = result.export_onnx(tmp_path / "attention.onnx")
    assert written.verdict is not None
    assert written.verdict.ok
    assert {1, 2} < set(written.verdict.batch_sizes)


def test_detects_that_the_exporter_takes_four_axes_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, torch's exporter has learned it, and `on_four_axes` can go."""
    monkeypatch.setattr(exporter, "on_four_axes", lambda _: 0)
    result = gs.optimize(Windowed(heads=True, causal=False).eval(), torch.randn(2, 6, 5, 8), verify="off")
    with pytest.raises(ExportError, match="cannot be translated"):
        result.export_onnx(tmp_path / "attention.onnx")


class Biased(nn.Module):
    """As in T5: a trained bias of the positions on the scores, and the heads joined by a view."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.bias = nn.Embedding(9, 2)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = [linear(x).view(x.shape[0], -1, 2, 4).transpose(1, 2) for linear in self.qkv]
        places = torch.arange(5)
        bias = self.bias(places[None] - places[:, None] + 4).permute(2, 0, 1)[None]
        mixed = nn.functional.scaled_dot_product_attention(*parts, attn_mask=bias)
        answer: Tensor = self.out(mixed.transpose(1, 2).contiguous().view(x.shape[0], -1, 8))
        return answer


def test_attention_with_a_trained_bias_is_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    written = gs.optimize(Biased().eval(), torch.randn(2, 5, 8)).export_onnx(tmp_path / "biased.onnx")
    assert written.verdict is not None
    assert written.verdict.ok
    assert {1, 2} < set(written.verdict.batch_sizes)


class Masked(nn.Module):
    """Attention over three axes or five with a mask of several axes."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(*parts, attn_mask=self.mask)
        answer: Tensor = self.out(mixed)
        return answer


@pytest.mark.parametrize(
    ("axes", "mask"),
    [
        ((5,), (1, 5, 5)),
        ((5,), (1, 1, 5)),
        ((3, 4, 5), (3, 4, 5, 5)),
        ((3, 4, 5), (1, 3, 1, 5, 5)),
        ((3, 4, 5), (4, 5, 5)),
        ((3, 4, 5), (3, 1, 1, 5)),
    ],
)
@pytest.mark.parametrize("boolean", [False, True])
def test_masks_of_several_axes_are_exported(
    axes: tuple[int, ...], mask: tuple[int, ...], boolean: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    scores = torch.randn(mask)
    if boolean:
        scores = scores > 0
        scores[..., 2] = True
    x = torch.randn(2, *axes, 8)
    written = gs.optimize(Masked(scores).eval(), x).export_onnx(tmp_path / "masked.onnx")
    assert written.verdict is not None
    assert written.verdict.ok
    assert {1, 2} < set(written.verdict.batch_sizes)


class Biases(nn.Module):
    """Attention over five axes with a bias made of the input: its batch is free, its windows are one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.places, self.out = nn.Linear(8, 24), nn.Linear(8, 5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.places(x).mean(2, keepdim=True)
        mixed = nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1), attn_mask=bias)
        answer: Tensor = self.out(mixed)
        return answer


def test_a_bias_of_five_axes_keeps_its_free_batch(tmp_path: Path) -> None:
    written = gs.optimize(Biases().eval(), torch.randn(2, 3, 4, 5, 8)).export_onnx(tmp_path / "biases.onnx")
    assert written.verdict is not None
    assert written.verdict.ok
    assert {1, 2} < set(written.verdict.batch_sizes)


class WindowBias(nn.Module):
    """As in SAM: heads within the batch, and a bias that is made of the query."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.places, self.out = nn.Linear(8, 24), nn.Linear(4, 6), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).reshape(x.shape[0], 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
        query, key, value = parts.reshape(3, x.shape[0] * 2, 6, 4).unbind(0)
        bias = self.places(query)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        joined = mixed.view(x.shape[0], 2, 6, 4).transpose(1, 2).reshape(x.shape[0], 6, 8)
        answer: Tensor = self.out(joined)
        return answer


def test_a_bias_made_of_the_query_is_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    written = gs.optimize(WindowBias().eval(), torch.randn(2, 6, 8)).export_onnx(tmp_path / "windows.onnx")
    assert written.verdict is not None
    assert written.verdict.ok
    assert {1, 2} < set(written.verdict.batch_sizes)


class Grouped(nn.Module):
    """Attention whose queries have more heads than its keys."""

    def __init__(self, axes: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.keys, self.axes = nn.Linear(8, 8), nn.Linear(8, 16), axes

    def forward(self, x: Tensor) -> Tensor:
        key, value = self.keys(x[..., : self.axes[0], :, :]).chunk(2, -1)
        query = self.query(x)
        return nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True).tanh()


def test_grouped_heads_over_three_axes_are_exported(tmp_path: Path) -> None:
    x = torch.randn(4, 5, 8)
    written = gs.optimize(Grouped((2,)).eval(), x, dynamic_shapes=(None,)).export_onnx(
        tmp_path / "grouped.onnx"
    )
    assert written.verdict is not None
    assert written.verdict.ok


@pytest.mark.parametrize("name", ["two axes", "free windows", "grouped heads over five axes"])
def test_other_attention_is_refused_with_what_can_be(name: str, tmp_path: Path) -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x).tanh()

    options: dict[str, object] = {}
    model: nn.Module = Plain()
    if name == "two axes":
        x, options = torch.randn(5, 8), {"dynamic_shapes": (None,)}
    elif name == "free windows":
        x, options = torch.randn(2, 3, 4, 5, 8), {"dynamic_shapes": ({2: Dim("windows", min=2, max=9)},)}
    else:
        x, model = torch.randn(2, 3, 4, 5, 8), Grouped((2,))
    result = gs.optimize(model.eval(), x, verify="off", **options)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="three or more, and between batch and length the same fixed sizes"):
        result.export_onnx(tmp_path / "attention.onnx")


def test_a_mask_of_ones_between_is_not_repeated(tmp_path: Path) -> None:
    """(1, 1, 1, L, L): the addition repeats it; written out it would be larger by heads and windows."""
    file = tmp_path / "masked.onnx"
    torch.manual_seed(0)
    gs.optimize(Masked(torch.randn(1, 1, 1, 16, 16)).eval(), torch.randn(2, 8, 32, 16, 8)).export_onnx(file)
    sizes = [prod(value.dims) for value in onnx.load(file).graph.initializer]
    assert max(sizes) == 16 * 16
