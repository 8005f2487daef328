"""What is wrong with `dynamic_shapes` is said in one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from graphsurgery.capture import capture
from graphsurgery.capture.inputs import Inputs
from graphsurgery.capture.program import free_sizes
from graphsurgery.errors import CaptureError

DYNAMIC = Dim.DYNAMIC


class Sum(nn.Module):
    """Fixes the second axis, and its two inputs agree in the first."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = self.linear(x) + y
        return total * 2 if x.shape[0] > 3 else total


FREE = {0: DYNAMIC}


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"x": FREE}, ["the keys ['x']", "all arguments, ['x', 'y']"]),
        ({"x": FREE, "z": FREE}, ["the keys ['x', 'z']", "['x', 'y']"]),
        ({0: DYNAMIC}, ["the keys [0]", "['x', 'y']"]),
        ((FREE,), ["has 1 entries, expected 2", "['x', 'y']"]),
        (3, ["is a int", "a mapping by argument or a tuple"]),
        ((DYNAMIC, None), ["for 'x', expected a mapping from axes to sizes"]),
        (({2: DYNAMIC}, None), ["axis 2 of 'x', which has 2 axes in the example ((4, 6))"]),
        (({-1: DYNAMIC}, None), ["axis -1 of 'x'", "counted from 0"]),
        ((FREE, {"0": DYNAMIC}), ["axis '0' of 'y'"]),
        ((FREE, {0: "b"}), ["has 'b' for axis 0 of 'y', expected a Dim"]),
        ((FREE, {0: 5}), ["fixes axis 0 of 'y' at 5, but it is 4"]),
        ((FREE, {0: Dim("b", min=5)}), ["'b' of at least 5 for axis 0 of 'y', which is 4 in the example"]),
        ((FREE, {0: Dim("b", max=3)}), ["'b' of at most 3 for axis 0 of 'y', which is 4 in the example"]),
        ((FREE, {0: 3 * Dim("b")}), ["has '3*b' for axis 0 of 'y', which is 4 in the example"]),
        ((FREE, {0: 3 * Dim("b") + 2}), ["for axis 0 of 'y', which is 4 in the example"]),
        (
            ({0: (twice := Dim("twice"))}, {0: 2 * twice}),
            ["'twice' to axis 0 of 'x' and to axis 0 of 'y'", "it is 4 by the one and 2 by the other"],
        ),
        (({0: DYNAMIC, 1: DYNAMIC}, FREE), ["the model fixes x.shape[1] at 6", "Dim.AUTO"]),
        (({1: Dim("wide")}, None), ["the model fixes wide at 6"]),
        (({0: Dim("a", min=4)}, {0: Dim("b", min=4)}), ["x.shape[0]", "y.shape[0]", "are the same"]),
        (({0: (small := Dim("small"))}, {0: small}), ["alone where 4 <= x.shape[0];", "Dim('small', min=4)"]),
    ],
    ids=lambda value: None if isinstance(value, list) else repr(value)[:40],
)
def test_refuses_dynamic_shapes_with_one_sentence(shapes: Any, words: list[str]) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Sum(), (torch.randn(4, 6), torch.randn(4, 6)), dynamic_shapes=shapes)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < 300


@pytest.mark.parametrize(
    "shapes",
    [
        (FREE, FREE),
        [FREE, FREE],
        {"x": FREE, "y": FREE},
        ((DYNAMIC, None), (DYNAMIC, 6)),
        ({0: Dim("batch", min=4)},) * 2,
        ({0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO, 1: None}),
    ],
    ids=["tuple", "list", "mapping", "by axis", "named", "automatic"],
)
def test_takes_the_forms_that_torch_takes(shapes: Any) -> None:
    model, x = Sum().double(), torch.randn(5, 6, dtype=torch.float64)
    gm = capture(model, (x, x * 2), dynamic_shapes=shapes)
    other = torch.randn(7, 6, dtype=torch.float64)
    torch.testing.assert_close(gm(other, other), model(other, other))
    with pytest.raises(ValueError, match="size 3 on axis 0, expected at least 4"):
        gm(other[:3], other[:3])


def test_a_hook_that_adds_an_argument_leaves_no_names_to_go_by() -> None:
    model = Sum().double()
    model.register_forward_pre_hook(lambda module, args: (args[0], args[0] * 2))
    x = torch.randn(5, 6, dtype=torch.float64)
    with pytest.raises(CaptureError, match=r"cannot be matched with the arguments of Sum.forward \(missing"):
        capture(model, x, dynamic_shapes=(FREE,))


class PartInPlace(nn.Module):
    """torch.export leaves the batch free, and fixes it when the call is made functional."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = 2 * x
        y.unbind(1)[-1].clamp_(-0.5, 2)
        return y


def test_a_size_that_torch_fixes_afterwards_is_said() -> None:
    x = torch.randn(4, 3, 5)
    info = capture(PartInPlace().eval(), x).meta["graphsurgery"]
    assert not info.dynamic_batch
    (note,) = info.notes
    assert note.startswith("captured with a static batch of 4: torch fixes the size where it writes")
    with pytest.raises(CaptureError, match=r"with these dynamic_shapes: torch fixes .* \(axis 0 of 'x'\)"):
        capture(PartInPlace().eval(), x, dynamic_shapes=({0: DYNAMIC},))
    program = torch.export.export(PartInPlace().eval(), (x,), dynamic_shapes=({0: Dim.AUTO},))
    info = capture(program).meta["graphsurgery"]
    assert not info.dynamic_batch
    assert any(note.startswith("captured with fixed sizes: torch fixes") for note in info.notes)


class PartsInPlace(nn.Module):
    """Of two inputs with free sizes, one bounded; torch fixes that of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor, *, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        y.unbind(1)[-1].clamp_(-0.5, 2)
        return y.sum() + a.sin().sum() + b.sum()


def test_a_program_keeps_the_sizes_that_torch_fixes_for_the_graph() -> None:
    x, a, b = torch.randn(4, 3, 5), torch.randn(6, 2), torch.randn(7)
    shapes = {"x": {0: Dim.AUTO}, "a": {0: Dim.AUTO(min=3, max=50)}, "b": None}
    with torch.no_grad():
        program = torch.export.export(PartsInPlace().eval(), (x,), {"a": a, "b": b}, dynamic_shapes=shapes)
    before, free, code = dict(program.range_constraints), free_sizes(program), str(program)
    gm = capture(program, Inputs((x,), {"b": b, "a": a}))
    assert (program.range_constraints, free_sizes(program), str(program)) == (before, free, code)
    assert free == {("x", 0), ("a", 0)}
    other = {"b": b, "a": torch.randn(50, 2)}
    with torch.no_grad():
        torch.testing.assert_close(gm(x, **other), program.module()(x, **other))
    with pytest.raises(ValueError, match="'a'"):
        gm(x, b=b, a=torch.randn(51, 2))
    with pytest.raises(ValueError, match="'x'"):
        gm(x[:3], b=b, a=a)
    origin = next(node for node in gm.graph.nodes if node.target is torch.ops.aten.linear.default)
    assert [path for path, _ in origin.meta["nn_module_stack"].values()] == ["", "linear"]
