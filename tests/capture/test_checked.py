"""A captured graph, and what is made of it, refuses inputs that it does not hold for."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import onnx
import pytest
import torch
from torch import fx, nn
from torch.export import Dim, export
from torch.utils import _pytree as pytree

import graphsurgery as gs
from graphsurgery.capture import capture
from graphsurgery.capture.expressions import OPERATORS, compiled, evaluate
from graphsurgery.graph import capture_info, copy_graph_module
from graphsurgery.restore import restore

AUTO, DYNAMIC = Dim.AUTO, Dim.DYNAMIC


class Scaled(nn.Module):
    """Divides by its own width, which tracing bakes in."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor] = lambda x: x / x.shape[2]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.conv(x))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.where(mask, self.linear(x), 0.0) / x.shape[1]


def scaled(**options: Any) -> tuple[Scaled, torch.Tensor]:
    torch.manual_seed(0)
    return Scaled(**options).double().eval(), torch.randn(3, 3, 8, 8, dtype=torch.float64)


def _pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def _saved(module: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


WAYS: dict[str, Callable[[fx.GraphModule], Any]] = {
    "captured": lambda gm: gm,
    "copied": copy_graph_module,
    "restored": restore,
    "deepcopied": copy.deepcopy,
    "deepcopy of restored": lambda gm: copy.deepcopy(restore(gm)),
    "pickled": lambda gm: _pickled(restore(gm)),
    "pickled twice": lambda gm: _pickled(_pickled(restore(gm))),
    "pickled, dead code taken out": lambda gm: _swept(_pickled(restore(gm))),
    "saved": lambda gm: _saved(restore(gm)),
    "interpreted": lambda gm: fx.Interpreter(gm).run,
    "transformed": lambda gm: fx.Transformer(gm).transform(),
    "traced by fx": lambda gm: fx.symbolic_trace(restore(gm)),
    "captured again": lambda gm: capture(restore(gm), torch.randn(3, 3, 8, 8, dtype=torch.float64)),
}


def _swept(gm: fx.GraphModule) -> fx.GraphModule:
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_another_size_is_refused_whatever_is_made_of_the_graph(way: Callable[[fx.GraphModule], Any]) -> None:
    model, x = scaled()
    run = way(capture(model, x))
    for batch in (1, 2, 3, 5):
        wider = torch.randn(batch, 3, 8, 8, dtype=torch.float64)
        torch.testing.assert_close(run(wider), model(wider))
    with pytest.raises(ValueError, match=r"'x' has the size 9 on axis 2, expected 8: .*\(batch, 3, 8, 8\)"):
        run(torch.randn(3, 3, 9, 8, dtype=torch.float64))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            torch.randn(3, 3, 8, 9),
            ["size 9 on axis 3, expected 8", "dynamic_shapes", "axis 3 of 'x' is free"],
        ),
        (torch.randn(3, 8, 8), ["3 axes, (3, 8, 8), expected 4, (batch, 3, 8, 8)"]),
        (torch.ones(3, 3, 8, 8, dtype=torch.long), ["int64", "expected floating-point"]),
        (torch.ones(3, 3, 8, 8, dtype=torch.bool), ["bool", "expected floating-point"]),
        (2.0, ["is a float, expected a floating-point tensor of (batch, 3, 8, 8)"]),
    ],
    ids=["size", "rank", "integer", "boolean", "number"],
)
def test_the_message_names_input_axis_and_what_to_do(other: Any, words: list[str]) -> None:
    module = gs.optimize(*scaled()).module
    with pytest.raises(ValueError, match="'x'") as caught:
        module(other)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert message.endswith(".")
    assert "\n" not in message


def test_a_module_that_is_cast_takes_the_other_precision() -> None:
    model, x = scaled()
    module = gs.optimize(model, x).module.float()
    torch.testing.assert_close(module(x.float()), model.float()(x.float()))


def test_sizes_that_are_one_must_agree() -> None:
    torch.manual_seed(0)
    model = Pair().double().eval()
    x, mask = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 5, 4) > 0
    gm = capture(model, {"mask": mask, "x": x})
    torch.testing.assert_close(gm(mask=mask[:2], x=x[:2]), model(x[:2], mask[:2]))
    with pytest.raises(ValueError, match=r"size 1 on axis 0, expected 3 as 'mask' has on axis 0: .* 'batch'"):
        gm(x=x[:1], mask=mask)
    with pytest.raises(ValueError, match="'mask' is float64, expected boolean"):
        gm(x=x, mask=mask.double())


def test_the_names_and_bounds_of_dim_are_kept() -> None:
    model, x = scaled(function=lambda x: x.mean((2, 3)))
    shapes = ({0: Dim("many"), 2: Dim("height", min=4, max=16), 3: Dim("width")},)
    gm = capture(model, x, dynamic_shapes=shapes)
    other = torch.randn(2, 3, 16, 5, dtype=torch.float64)
    torch.testing.assert_close(gm(other), model(other))
    for height in (3, 17):
        with pytest.raises(ValueError, match=rf"size {height} on axis 2, expected 4 to 16 for 'height'"):
            gm(torch.randn(2, 3, height, 5, dtype=torch.float64))


def test_a_derived_size_must_fit() -> None:
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x.reshape(y.shape[0], 2) + y / 2

    half = Dim("half")
    gm = capture(Halves(), (torch.randn(6), torch.randn(3, 2)), dynamic_shapes=({0: 2 * half}, {0: half}))
    assert gm(torch.randn(10), torch.randn(5, 2)).shape == (5, 2)
    with pytest.raises(ValueError, match=r"only where x.shape\[0\] == 2\*y.shape\[0\], got x of \(9,\)"):
        gm(torch.randn(9), torch.randn(5, 2))


def test_a_multiple_must_divide() -> None:
    class Groups(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(x.shape[0], -1, 3).sum(2)

    shapes = ({0: Dim("n"), 1: 3 * Dim("groups", min=2, max=9)},)
    gm = capture(Groups(), torch.randn(4, 12), dynamic_shapes=shapes)
    assert gm(torch.randn(5, 9)).shape == (5, 3)
    with pytest.raises(ValueError, match=r"only where x.shape\[1\] == 3\*n, got x of \(4, 7\)"):
        gm(torch.randn(4, 7))
    for width in (3, 30):
        with pytest.raises(ValueError, match=r"only where x.shape\[1\] [<>]= "):
            gm(torch.randn(4, width))


@pytest.mark.parametrize(
    ("inputs", "shapes"),
    [
        ((torch.randn(4, 6),), None),
        (({"a": [torch.randn(4, 6)]},), ({"a": [{0: AUTO}]},)),
        ((torch.randn(4, 6), torch.randn(4, 6)), (({0: AUTO}, {0: AUTO}),)),
        ({"x": torch.randn(4, 6)}, {"options": {"x": {0: AUTO}}}),
    ],
    ids=["plain", "nested", "varargs", "keywords"],
)
@pytest.mark.parametrize(
    "way", [lambda gm: gm, lambda gm: _pickled(restore(gm))], ids=["captured", "pickled"]
)
def test_a_condition_met_in_tracing_is_checked(inputs: Any, shapes: Any, way: Any) -> None:
    def even(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.shape[0] % 2 == 0 else x - 1

    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return even(x)

    class Nested(nn.Module):
        def forward(self, x: dict[str, list[torch.Tensor]]) -> torch.Tensor:
            return even(x["a"][0])

    class Varying(nn.Module):
        def forward(self, *x: torch.Tensor) -> torch.Tensor:
            return even(x[0]) + x[1]

    class Keywords(nn.Module):
        def forward(self, **options: torch.Tensor) -> torch.Tensor:
            return even(options["x"])

    keywords = isinstance(inputs, dict)
    nested = not keywords and isinstance(inputs[0], dict)
    model = Keywords() if keywords else Nested() if nested else Varying() if len(inputs) == 2 else Plain()
    gm = way(capture(model, inputs, dynamic_shapes=shapes or ({0: DYNAMIC},)))

    def at(size: int, run: Any) -> Any:
        sized = pytree.tree_map(lambda leaf: torch.full((size, 6), 2.0), inputs)
        return run(**sized) if keywords else run(*sized)

    torch.testing.assert_close(at(8, gm), at(8, model))
    with pytest.raises(ValueError, match=r"holds only where x\w*.shape\[0\] % 2 == 0, got x\w* of \(5, 6\)"):
        at(5, gm)


@pytest.mark.parametrize("named", [False, True])
def test_a_size_of_one_that_does_something_else_is_refused(named: bool) -> None:
    model, x = scaled(function=lambda x: x.mean(3) if x.shape[3] > 1 else x.sum(3) * 5)
    gm = capture(model, x, dynamic_shapes=({0: DYNAMIC, 2: DYNAMIC, 3: Dim("width") if named else DYNAMIC},))
    name = "width" if named else "x_dim3"
    assert any(f"sizes '{name}' of 2 or more, not of 1" in note for note in capture_info(gm).notes)
    flat = torch.randn(1, 3, 1, 2, dtype=torch.float64)
    torch.testing.assert_close(gm(flat), model(flat))
    with pytest.raises(ValueError, match=f"size 1 on axis 3, expected at least 2 for '{name}'"):
        gm(flat[..., :1])


@pytest.mark.parametrize(
    ("function", "shapes", "refused"),
    [
        (lambda x: x.squeeze(0) if x.shape[0] == 1 else x, None, (1,)),
        (lambda x: x + 1 if x.shape[0] % 2 else x, ({0: DYNAMIC},), tuple(range(2, 17, 2))),
        (lambda x: x + 1 if x.shape[0] % 2 == 0 else x, ({0: DYNAMIC},), tuple(range(1, 17, 2))),
        (lambda x: x + 1, ({0: Dim("n", min=3)},), (1, 2)),
        (lambda x: x + 1, ({0: Dim("n", max=4)},), tuple(range(5, 17))),
        (lambda x: x + 1, None, ()),
    ],
    ids=["not one", "odd", "even", "at least 3", "at most 4", "any"],
)
def test_verification_keeps_to_batches_that_are_allowed(function: Any, shapes: Any, refused: Any) -> None:
    model, x = scaled(function=function)
    if 3 in refused:
        x = torch.cat([x, x[:1]])
    result = gs.optimize(model, x, dynamic_shapes=shapes)
    assert result.report.verification is not None
    assert result.report.verification.ok
    assert isinstance(result.module, fx.GraphModule)
    assert capture_info(result.module).refused_batches == refused
    for size in range(1, 17):
        other = torch.randn(size, 3, 8, 8, dtype=torch.float64)
        if size in refused:
            with pytest.raises(ValueError, match=r"'x' has the size|the graph holds only"):
                result.module(other)
        else:
            torch.testing.assert_close(result.module(other), model(other))


def test_a_static_batch_is_refused_elsewhere() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.shape[0] == 2 else x - 1

    gm = capture(Fixed(), torch.randn(2, 3))
    with pytest.raises(ValueError, match="size 3 on axis 0, expected 2"):
        gm(torch.randn(3, 3))


def test_an_exported_program_brings_its_own_conditions() -> None:
    model, x = scaled(function=lambda x: x * 2 if x.shape[3] % 2 == 0 else x)
    program = export(model, (x,), dynamic_shapes=({0: DYNAMIC, 3: DYNAMIC},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    for given in (program, torch.export.load(io.BytesIO(buffer.getvalue()))):
        gm = capture(given)
        torch.testing.assert_close(gm(x[:1, ..., :6]), model(x[:1, ..., :6]))
        with pytest.raises(ValueError, match=r"only where x.shape\[3\] % 2 == 0"):
            gm(x[..., :7])
        with pytest.raises(ValueError, match="size 7 on axis 2, expected 8"):
            gm(x[..., :7, :])


def test_a_number_that_is_free_is_checked_as_a_size() -> None:
    class Times(nn.Module):
        def forward(self, x: torch.Tensor, n: int) -> torch.Tensor:
            return x * n if n % 2 == 0 else x

    gm = capture(Times(), (torch.ones(3, 4), 6), dynamic_shapes=({0: DYNAMIC}, DYNAMIC))
    assert torch.equal(gm(torch.ones(2, 4), 8), torch.full((2, 4), 8.0))
    with pytest.raises(ValueError, match="only where n % 2 == 0"):
        gm(torch.ones(2, 4), 7)


class Total(nn.Module):
    def forward(self, items: list[torch.Tensor], more: dict[str, list[torch.Tensor]]) -> torch.Tensor:
        return torch.stack([*items, *more["a"]]).sum(0)


@pytest.mark.parametrize(
    "way", sorted(WAYS.keys() - {"captured again", "interpreted", "traced by fx", "transformed"})
)
def test_another_number_of_items_is_refused(way: str) -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    run = WAYS[way](capture(Total(), ([x, x + 1], {"a": [x * 2]})))
    torch.testing.assert_close(run([x, x], {"a": [x]}), x * 3)
    with pytest.raises(ValueError, match="'items' has 3 items, expected 2"):
        run([x, x, x], {"a": [x]})
    with pytest.raises(ValueError, match=r"\"more\['a'\]\" has 2 items, expected 1"):
        run([x, x], {"a": [x, x]})
    with pytest.raises(ValueError, match="'more' has 2 items, expected 1"):
        run([x, x], {"a": [x], "b": [x]})
    with pytest.raises(ValueError, match="'items' has 1 items, expected 2"):
        run([x], {"a": [x]})
    with pytest.raises(ValueError, match="'items' has 1 items, expected 2"):
        run([x], {"a": [x, x]})
    with pytest.raises(ValueError, match=r"\"more\['a'\]\" has 0 items, expected 1"):
        run([x, x], {"a": []})
    with pytest.raises(ValueError, match="'more' has 0 items, expected 1"):
        run([x, x], {})
    with pytest.raises(ValueError, match=r"'more' has the keys \['b'\], expected \['a'\]"):
        run([x, x], {"b": [x]})
    with pytest.raises(ValueError, match="'items' is a Tensor, expected a list or tuple of 2 items"):
        run(x, {"a": [x]})
    with pytest.raises(ValueError, match="'more' is a list, expected a mapping of 1 items"):
        run([x, x], [x])


def test_another_number_of_items_is_refused_by_an_interpreter() -> None:
    x = torch.randn(3, 4)
    gm = capture(Total(), ([x, x], {"a": [x]}))
    run = fx.Interpreter(gm).run
    torch.testing.assert_close(run([x, x], {"a": [x]}), 3 * x)
    torch.testing.assert_close(run(x, x, x), 3 * x)
    with pytest.raises(ValueError, match="'items' has 3 items, expected 2"):
        run([x, x, x], {"a": [x]})
    with pytest.raises(ValueError, match="'items' has 1 items, expected 2"):
        run([x], {"a": [x, x]})  # as many in all
    with pytest.raises(ValueError, match="takes 3 inputs, got 4"):
        run(x, x, x, x)


# -- what others make of it


def test_export_of_the_result_has_the_conditions_as_guards() -> None:
    model, x = scaled()
    module = gs.optimize(model, x).module
    for strict in (False, True):
        program = export(module, (x,), dynamic_shapes=({0: DYNAMIC},), strict=strict)
        torch.testing.assert_close(program.module()(x[:2]), model(x[:2]))
        assert {n.op for n in program.graph.nodes if "check" in str(n.target)} == set()
    with pytest.raises(Exception, match="specialized it to be a constant"):
        export(module, (x,), dynamic_shapes=({0: DYNAMIC, 2: DYNAMIC},))


def test_a_saved_archive_checks_by_the_guards_of_torch(tmp_path: Any) -> None:
    model, x = scaled()
    gs.optimize(model, x).save(str(tmp_path / "model.pt2"))
    loaded = torch.export.load(str(tmp_path / "model.pt2")).module()
    torch.testing.assert_close(loaded(x[:2]), model(x[:2]))
    with pytest.raises(AssertionError, match=r"x.size\(\)\[2\] == 8"):
        loaded(torch.randn(2, 3, 9, 8, dtype=torch.float64))


@pytest.mark.parametrize("way", [restore, lambda gm: _pickled(restore(gm))], ids=["restored", "pickled"])
def test_compile_has_no_graph_break(way: Any) -> None:
    model, x = scaled(function=lambda x: x * 2 if x.shape[3] % 2 == 0 else x)
    module = way(capture(model, x, dynamic_shapes=({0: DYNAMIC, 3: DYNAMIC},)))
    torch.compiler.reset()
    compiled: Any = torch.compile(module, backend="eager", fullgraph=True)
    for other in (x, x[:2], x[..., :6], x[:1, ..., :4]):
        torch.testing.assert_close(compiled(other), model(other))
    torch.compiler.reset()
    broken: Any = torch.compile(module, backend="eager")
    with pytest.raises(ValueError, match=r"only where x.shape\[3\] % 2 == 0"):
        broken(x[..., :7])
    with pytest.raises(ValueError, match="size 7 on axis 2, expected 8"):
        broken(x[:, :, :7])
    torch.compiler.reset()


def test_onnx_holds_no_trace(tmp_path: Any) -> None:
    model, x = scaled()
    result = gs.optimize(model.float(), x.float())
    result.export_onnx(str(tmp_path / "model.onnx"))
    kinds = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert kinds <= {"Conv", "Div", "Mul"}


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
def test_jit_trace_has_neither_warning_nor_trace() -> None:
    model, x = scaled()
    module = gs.optimize(model, x).module
    traced = torch.jit.trace(module, (x,))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(traced(x[:2]), model(x[:2]))
    assert "aten::size" not in str(traced.inlined_graph)
    assert "aten::eq" not in str(traced.inlined_graph)


# -- expressions


@pytest.mark.parametrize("word", [*sorted(OPERATORS.keys() - {"neg", "not"}), "max", "min", "math.fmod"])
def test_compiled_conditions_say_the_same_as_evaluated_ones(word: str) -> None:
    values = (torch.empty(6, 4), 3)
    seen = set()
    for left in (("size", 0, 0), ("neg", ("size", 0, 1)), ("value", 1), 0):
        for right in (("size", 0, 1), ("value", 1), 2):
            for limit in (-3, 0, 1, 2, 6):
                less = ("<", (word, left, right), limit)
                condition = ("and", ("or", less, ("==", left, 3)), ("not", ("==", right, 6)))
                expected = evaluate(condition, values)
                assert compiled((("", condition),))(values) is expected
                seen.add(expected)
    assert seen == {True, False}
