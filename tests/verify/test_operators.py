"""The rounding of other runtimes' operators: right files pass by it, wrong ones do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from graphsurgery.verify import Baseline, OnnxRunner
from graphsurgery.verify.inputs import Inputs
from graphsurgery.verify.operators import (
    OPERATORS_NOTE,
    AsOtherRuntimes,
    add_rounding_of_operators,
    as_before,
)
from graphsurgery.verify.outputs import Outputs
from graphsurgery.verify.runners import TorchRunner


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


def scaled(path: Path, off: float) -> Path:
    """The file with the first weight times 1 + off."""
    changed = onnx.load(path)
    weight = next(t for t in changed.graph.initializer if len(t.dims) > 1)
    values = numpy_helper.to_array(weight) * np.float32(1 + off)
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(changed, path)
    return path


@pytest.mark.parametrize("off", [1e-2, 1e-3, 1e-4])
def test_a_wrong_weight_is_not_called_rounding(off: float, tmp_path: Path) -> None:
    model = network(nn.ELU())
    path = scaled(written(model, tmp_path / "m.onnx"), off)
    verdict = Baseline(model, torch.randn(2, 3)).compare(OnnxRunner(path, optimised=False))
    assert not verdict.ok
    assert OPERATORS_NOTE in verdict.notes  # what was tried is said


def test_a_right_file_that_passes_is_not_run_there(tmp_path: Path) -> None:
    model = network(nn.Tanh())
    verdict = Baseline(model, torch.randn(2, 3)).compare(OnnxRunner(written(model, tmp_path / "m.onnx")))
    assert verdict.ok
    assert OPERATORS_NOTE not in verdict.notes


def test_a_torch_candidate_has_no_operators_of_onnx() -> None:
    model = network(nn.ELU())
    assert not add_rounding_of_operators(Baseline(model, torch.randn(2, 3)), TorchRunner(model))


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


class Reducing(nn.Module):
    """A reduction of maps of 128 x 128, which have equal values where the picture has."""

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.reduce = nn.Conv2d(3, 8, 3, padding=1), reduce

    def forward(self, picture: Tensor) -> Tensor:
        return self.reduce(torch.relu(self.conv(picture)))


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "pool": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "mean": lambda x: x.mean((2, 3)),
    "sum of all": lambda x: x.sum() + x[:, 0, 0, 0],
    "deviation": lambda x: x.std((2, 3)),
    "group norm": lambda x: F.group_norm(x, 2, *(torch.arange(x.shape[1]).to(x) for _ in range(2))),
    "instance norm": lambda x: F.instance_norm(x),
    "norm": lambda x: x.flatten(1).norm(dim=1),
    "log of a sum": lambda x: x.flatten(1).logsumexp(1),
    "squares": lambda x: F.mse_loss(x, 0 * x) + x[:, 0, 0, 0],
    "running sum": lambda x: x.flatten(2).cumsum(2),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_long_sums_of_a_right_file_are_no_difference(name: str, tmp_path: Path) -> None:
    """onnxruntime adds up in a few lanes, torch pairwise: 1e-4 apart, hundreds of times the noise."""
    model = Reducing(REDUCTIONS[name]).eval()
    picture = torch.randn(1, 3, 128, 128)
    path = tmp_path / "m.onnx"
    torch.onnx.export(model, (picture,), path, dynamo=True, verbose=False)
    baseline = Baseline(model, picture)
    for optimised in (False, True):
        verdict = baseline.compare(OnnxRunner(path, optimised=optimised))
        assert verdict.ok, verdict.reason
        assert OPERATORS_NOTE in verdict.notes
    wrong = baseline.compare(OnnxRunner(scaled(path, 1e-2), optimised=False))
    assert not wrong.ok


@pytest.mark.parametrize("off", [1e-2, 1e-3])
def test_a_wrong_weight_before_a_long_sum_is_seen(off: float, tmp_path: Path) -> None:
    model = Reducing(REDUCTIONS["pool"]).eval()
    picture = torch.randn(1, 3, 128, 128)
    path = tmp_path / "m.onnx"
    torch.onnx.export(model, (picture,), path, dynamo=True, verbose=False)
    assert not Baseline(model, picture).compare(OnnxRunner(scaled(path, off), optimised=False)).ok


def test_a_sigmoid_far_to_the_left_has_the_digits_of_a_runtime(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Sigmoid()).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-9.0, -1, -2]] * 4))
    example = torch.ones(2, 3) + 0.1 * torch.randn(2, 3)
    path = tmp_path / "m.onnx"
    torch.onnx.export(model, (example,), path, dynamo=True, verbose=False)
    verdict = Baseline(model, example).compare(OnnxRunner(path, optimised=False))
    assert verdict.ok, verdict.reason


@pytest.mark.parametrize("lanes", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_operators_computed_otherwise_are_the_same_functions(lanes: int, dtype: torch.dtype) -> None:
    """In float64 they agree with torch's to its rounding: nothing but rounding is taken into the noise."""
    torch.manual_seed(0)
    x = torch.randn(3, 6, 5, 7).to(dtype)
    functions: list[Callable[[Tensor], Tensor]] = [
        *REDUCTIONS.values(),
        *(torch.sum, torch.mean, torch.var, torch.std, torch.sigmoid, F.silu, F.elu, F.selu),
        lambda x: F.celu(x.clone(), 1.7, inplace=True),
        lambda x: F.silu(x.clone(), inplace=True),
        lambda x: x.clone().sigmoid_(),
        lambda x: F.elu(x.clone(), 0.6, inplace=True),
        lambda x: x.mean((1, -1), keepdim=True),
        lambda x: x.sum(-2, dtype=torch.float64),
        lambda x: x.sum(2),
        lambda x: torch.cat([y.flatten() for y in torch.var_mean(x, 1, correction=0)]),
        lambda x: torch.cat([y.flatten() for y in torch.std_mean(x, (0, 2), keepdim=True)]),
        lambda x: F.layer_norm(x, (5, 7)),
        lambda x: x[:, :0].sum(1),
        lambda x: x[:0].sum(1),
        *(lambda x: x[0, 0, 0, 0].cumsum(0), lambda x: x[0, 0, 0, 0].sum(), lambda x: x[0, 0, 0, 0].mean(0)),
        *(F.gelu, lambda x: F.gelu(x, approximate="tanh")),
        *(lambda x: F.glu(x, 1), torch.expm1, lambda x: torch.log1p(x.abs()), lambda x: x.clone().cumsum_(3)),
        lambda x: F.group_norm(x, 3),
    ]
    for function in functions:
        with AsOtherRuntimes(lanes, 1.0) as mode:
            found = function(x)
        assert mode.used
        wanted = function(x)
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        exact = function(x.double())
        # 630 elements at most; a bfloat16 is added up in float32, and rounded once or twice
        units = 4 if dtype == torch.bfloat16 else 64
        bound = units * torch.finfo(dtype).eps * (1 + exact.abs().max()) if exact.numel() else 0.0
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=float(bound))


def test_what_is_no_plain_float_is_left_to_torch() -> None:
    x = torch.randn(3, 4)
    with AsOtherRuntimes(4) as mode:
        for other in (x.to_sparse(), x.to(torch.complex64), x.long(), x > 0):
            torch.sum(other)
        given = torch.empty(3, 4)
        assert torch.sigmoid(x, out=given) is given
        torch.cond(torch.tensor(True), lambda y: y + 1, lambda y: y - 1, (x,))
    assert not mode.used


def test_a_sigmoid_stays_between_zero_and_one() -> None:
    """What is computed of it, a logarithm or a root, is finite where torch's is."""
    x = torch.tensor([-200.0, -20.0, 20.0, 200.0])
    for units in (1.0, -1.0):
        with AsOtherRuntimes(1, units):
            found = torch.sigmoid(x)
        assert found.min() >= 0
        assert found.max() <= 1


class TwoOutputs(nn.Module):
    """A logarithm of a sigmoid far to the left, and a long sum."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.logsigmoid(200 * x[:, :1, :4, :4]), torch.relu(x).mean((2, 3))


@pytest.mark.parametrize("both", [False, True])
def test_an_infinity_is_no_rounding_whatever_else_differs(both: bool, tmp_path: Path) -> None:
    """ONNX has no logarithm of a sigmoid: the file takes that of a 0, far from torch's number."""
    torch.manual_seed(0)
    picture = torch.randn(1, 3, 128, 128)
    model = TwoOutputs().eval() if both else Picked().eval()
    path = tmp_path / "m.onnx"
    torch.onnx.export(model, (picture,), path, dynamo=True, verbose=False)
    verdict = Baseline(model, picture).compare(OnnxRunner(path, optimised=False))
    assert not verdict.ok
    assert "-inf" in verdict.reason


class Picked(TwoOutputs):
    """The first alone."""

    def forward(self, x: Tensor) -> tuple[Tensor]:  # type: ignore[override] # fewer outputs
        return (super().forward(x)[0],)


@pytest.mark.parametrize("lanes", [1, 4, 8, 16])
def test_sums_are_taken_in_so_many_lanes(lanes: int) -> None:
    """One element after the other, each to its lane, every step rounded to float32."""
    x = torch.full((1000,), 0.1) + torch.rand(1000, generator=torch.Generator().manual_seed(0))
    partial = np.zeros(lanes, np.float32)
    for place, value in enumerate(x.numpy()):
        partial[place % lanes] += value
    with AsOtherRuntimes(lanes):
        found = x.sum()
    assert found == torch.from_numpy(partial).sum()


def test_undecided_integers_are_as_before_afterwards() -> None:
    class Highest(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.argmax(1), torch.sigmoid(x)

    baseline = Baseline(Highest().eval(), torch.randn(2, 3))
    first = baseline.outputs[0]
    assert not first.is_float
    known = [mask.clone() for mask in first.undecided]
    with as_before(baseline):
        for mask in first.undecided:
            mask.fill_(True)
    assert all(torch.equal(mask, before) for mask, before in zip(first.undecided, known, strict=True))


class Filtering(nn.Module):
    """Its shape hangs on whether a mean is that of pairwise or of other sums."""

    def __init__(self, otherwise: float) -> None:
        super().__init__()
        self.otherwise = otherwise

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3))
        values = torch.cat([mean, mean + 1, mean - 1])
        return values[(values - self.otherwise).abs() > 1e-6]


class Off:
    """Another runtime, which is wrong by a thousandth."""

    name = "another runtime"

    def __init__(self, model: nn.Module) -> None:
        self.runner = TorchRunner(model)

    def run(self, inputs: Inputs) -> Outputs:
        return {name: value * 1.001 for name, value in self.runner.run(inputs).items()}


def test_a_shape_that_hangs_on_values_gets_no_draws() -> None:
    x = torch.full((1, 1, 256, 256), 0.1)
    with AsOtherRuntimes(1):
        otherwise = float(x.mean())
    assert abs(otherwise - float(x.mean())) > 1e-6
    model = Filtering(otherwise).eval()
    verdict = Baseline(model, x, samples=1).compare(Off(model))
    assert not verdict.ok
    assert OPERATORS_NOTE not in verdict.notes
