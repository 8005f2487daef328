"""Keys that are transposed by one call: fewer nodes, the same numbers."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir
import pytest
import torch
from torch import Tensor, nn

import graphsurgery as gs
from graphsurgery.export import OnnxSession, exporter, keys, node_counts


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


@pytest.mark.parametrize("sizes", [(2, 1, 12, 8), (3, 2, 4, 8), (6, 4, 2, 4)], ids=str)
def test_keys_that_the_user_has_viewed_are_not_mistaken(sizes: tuple[int, ...], tmp_path: Path) -> None:
    """The exporter makes one view of the user's and its own, which then reads what are no keys yet."""

    class Viewed(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            viewed = k.relu().reshape(2, 3, 4, 8)
            return nn.functional.scaled_dot_product_attention(q.relu(), viewed, v.relu()).tanh()

    g = torch.Generator().manual_seed(4)
    given = tuple(torch.randn(shape, generator=g) for shape in ((2, 3, 5, 8), sizes, (2, 3, 4, 8)))
    result = gs.optimize(Viewed(), given, verify="off", dynamic_shapes=(None, None, None))
    done = result.export_onnx(tmp_path / "viewed.onnx")
    assert done.verdict is not None
    assert done.verdict.ok
    session = OnnxSession(tmp_path / "viewed.onnx")
    (found,) = session.run(dict(zip(session.input_names, given, strict=True))).values()
    torch.testing.assert_close(found, Viewed()(*given), rtol=1e-5, atol=1e-6)  # as above


def test_the_same_nodes_of_unknown_origin_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written by hand: what it is for is not known."""
    changed: list[int] = []

    def without_origins(model: onnx_ir.Model) -> int:
        for node in model.graph.all_nodes():
            node.metadata_props.clear()
        changed.append(keys.transpose_keys(model))
        return changed[-1]

    monkeypatch.setattr(exporter, "transpose_keys", without_origins)
    gs.optimize(Attention().eval(), inputs(), verify="off").export_onnx(tmp_path / "own.onnx", verify=False)
    assert changed == [0]
