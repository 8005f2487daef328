"""The rounding of ONNX operators that cancel: right files pass by it, wrong ones do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from graphsurgery.verify import Baseline, OnnxRunner
from graphsurgery.verify.operators import OPERATORS_NOTE, add_rounding_of_operators


def network(activation: nn.Module) -> nn.Module:
    """Nothing adds to the input before the activation, so that the case of tiny inputs meets it tiny."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, bias=False), activation).eval()


def written(model: nn.Module, path: Path) -> Path:
    torch.onnx.export(model, (torch.randn(2, 3),), path, dynamo=True, verbose=False)
    return path


@pytest.mark.parametrize("activation", [nn.ELU(), nn.CELU(1.7), nn.SELU(), nn.ELU(0.6)], ids=str)
def test_cancelling_operators_are_no_difference(activation: nn.Module, tmp_path: Path) -> None:
    model = network(activation)
    path = written(model, tmp_path / "m.onnx")
    baseline = Baseline(model, torch.randn(2, 3))
    verdict = baseline.compare(OnnxRunner(path, optimised=False))
    assert verdict.ok, verdict.reason
    assert OPERATORS_NOTE in verdict.notes
    assert verdict.outputs[0].native is not None
    assert verdict.outputs[0].native.best_resolution < 1e-3


@pytest.mark.parametrize("off", [1e-2, 1e-3, 1e-4])
def test_a_wrong_weight_is_not_called_rounding(off: float, tmp_path: Path) -> None:
    model = network(nn.ELU())
    path = written(model, tmp_path / "m.onnx")
    changed = onnx.load(path)
    weight = next(t for t in changed.graph.initializer if t.dims)
    values = numpy_helper.to_array(weight) * np.float32(1 + off)
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(changed, path)
    baseline = Baseline(model, torch.randn(2, 3))
    runner = OnnxRunner(path, optimised=False)
    assert not add_rounding_of_operators(baseline, runner)
    verdict = baseline.compare(runner)
    assert not verdict.ok
    assert OPERATORS_NOTE not in verdict.notes


def test_a_right_file_that_passes_is_not_run_there(tmp_path: Path) -> None:
    model = network(nn.Tanh())
    verdict = Baseline(model, torch.randn(2, 3)).compare(OnnxRunner(written(model, tmp_path / "m.onnx")))
    assert verdict.ok
    assert OPERATORS_NOTE not in verdict.notes


def test_a_torch_candidate_has_no_operators_of_onnx() -> None:
    model = network(nn.ELU())
    assert not add_rounding_of_operators(Baseline(model, torch.randn(2, 3)), model)


def lossy(path: Path, kind: str) -> Path:
    """The file with its activation rounded: to float16, or by a large number that is added and taken off."""
    model = onnx.load(path)
    place = next(i for i, node in enumerate(model.graph.node) if node.op_type in {"Tanh", "Elu"})
    node = model.graph.node[place]
    result, node.output[0] = node.output[0], "activated"
    if kind == "cast":
        steps = [("Cast", ["activated"], {"to": TensorProto.FLOAT16}), ("Cast", ["rounded"], {"to": 1})]
    else:
        model.graph.initializer.append(numpy_helper.from_array(np.array(1e5, np.float32), "large"))
        steps = [("Add", ["activated", "large"], {}), ("Sub", ["rounded", "large"], {})]
    for at, (op_type, inputs, attributes) in enumerate(steps):
        new = helper.make_node(op_type, inputs, [("rounded", result)[at]], **attributes)
        model.graph.node.insert(place + 1 + at, new)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ELU()], ids=str)
@pytest.mark.parametrize("kind", ["cast", "cancel"])
def test_what_else_a_file_rounds_is_no_noise(kind: str, activation: nn.Module, tmp_path: Path) -> None:
    model = network(activation)
    path = lossy(written(model, tmp_path / "m.onnx"), kind)
    verdict = Baseline(model, torch.randn(2, 3)).compare(OnnxRunner(path, optimised=False))
    assert not verdict.ok


def test_the_noise_of_one_file_is_not_that_of_the_next_program(tmp_path: Path) -> None:
    model = network(nn.ELU())
    baseline = Baseline(model, torch.randn(2, 3))
    before = [output.yardstick.draws for output in baseline.outputs if output.yardstick is not None]
    assert (
        OPERATORS_NOTE
        in baseline.compare(OnnxRunner(written(model, tmp_path / "m.onnx"), optimised=False)).notes
    )
    assert OPERATORS_NOTE not in baseline.compare(model).notes
    found = [output.yardstick.draws for output in baseline.outputs if output.yardstick is not None]
    assert found == before
