"""Keys that are transposed by one call: fewer nodes, the same numbers."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import graphsurgery as gs
from graphsurgery.export import OnnxSession, exporter, node_counts


class Attention(nn.Module):
    """Attention of two heads, over a key and a value of another length than the query."""

    def __init__(self, *, mask: str = "none") -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.mask = mask

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (
            layer(value).unflatten(-1, (2, 4)).transpose(1, 2)
            for layer, value in ((self.q, x), (self.k, y), (self.v, y))
        )
        hidden: Tensor | None = None
        if self.mask == "bool":
            hidden = (y[:, None, None, :, 0] > -0.5) | (torch.arange(y.shape[1]) == 0)
        elif self.mask == "float":
            hidden = y[:, None, None, :, 0]
        mixed: Tensor = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=hidden, is_causal=self.mask == "causal"
        )
        return mixed.transpose(1, 2).flatten(2)


def inputs() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(3, 5, 8, generator=g), torch.randn(3, 4, 8, generator=g)


@pytest.mark.parametrize("static", [False, True], ids=["free batch", "static"])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
def test_the_file_has_one_transposition_and_computes_the_same(
    mask: str, static: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, given = Attention(mask=mask).eval(), inputs()
    shapes = (None, None) if static else None
    result = gs.optimize(model, given, verify="off", dynamic_shapes=shapes)
    done = result.export_onnx(tmp_path / "short.onnx")
    assert done.verdict is not None
    assert done.verdict.ok
    monkeypatch.setattr(exporter, "transpose_keys", lambda _: 0)
    result.export_onnx(tmp_path / "long.onnx")
    short, long = (node_counts(tmp_path / f"{name}.onnx") for name in ("short", "long"))
    assert short["Reshape"] == long["Reshape"] - 2
    assert short["Transpose"] == long["Transpose"]
    assert sum(short.values()) < sum(long.values())
    graph = onnx.load(tmp_path / "short.onnx").graph
    perms = [list(node.attribute[0].ints) for node in graph.node if node.op_type == "Transpose"]
    assert perms.count([0, 1, 3, 2]) == 1
    session = OnnxSession(tmp_path / "short.onnx")
    (found,) = session.run(dict(zip(session.input_names, given, strict=True))).values()
    torch.testing.assert_close(found, model(*given), rtol=1e-5, atol=1e-6)  # float32 on another runtime


def test_keys_of_the_users_own_are_left_alone(tmp_path: Path) -> None:
    """The same calls, written by hand: what they are for is not known."""

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            flat = x.reshape(-1, x.shape[2], x.shape[3]).relu().transpose(1, 2)
            return flat.reshape(x.shape[0], x.shape[1], x.shape[3], x.shape[2])

    result = gs.optimize(Own(), torch.randn(2, 3, 4, 5))
    result.export_onnx(tmp_path / "own.onnx")
    graph = onnx.load(tmp_path / "own.onnx").graph
    assert [0, 1, 3, 2] not in [list(n.attribute[0].ints) for n in graph.node if n.op_type == "Transpose"]
