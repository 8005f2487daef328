"""Networks that people have: what is proposed in them, equal layers timed once, the file of the result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from measuring import FakeTimer, by_nodes, measured

import graphsurgery as gs
from graphsurgery.cost import layer_counts

pytestmark = pytest.mark.sweep


def test_the_attentions_of_a_bert_are_one_decision(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    model = BertModel(config, add_pooling_layer=False)  # taken as in evaluation mode
    ids = torch.arange(12).reshape(2, 6)
    timer = FakeTimer(by_nodes)
    result = gs.optimize(
        model, {"input_ids": ids}, cost=measured(timer), passes=["fold-affine", "merge-siblings"]
    )
    found = [entry for entry in result.report.measured if "merge" in entry.pass_name]
    assert [(entry.kept, entry.cached) for entry in found] == [(True, False), (True, True), (True, True)]
    assert layer_counts(result.graph_module)["linear"] == 3 * 4
    done = result.export_onnx(tmp_path / "bert.onnx")
    assert done.verdict is not None
    assert done.verdict.ok


def test_a_training_form_network_has_nothing_left_to_time_but_the_swap() -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("repvgg_a0").eval()
    timer = FakeTimer(by_nodes)
    picture = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    result = gs.optimize(model, picture, cost=measured(timer))
    assert result.report.verification is not None
    assert result.report.verification.ok
    assert {entry.pass_name for entry in result.report.measured} <= {
        "measured-linear-to-conv1x1",
        "measured-conv1x1-to-linear",
        "measured",
    }
