"""Other sizes than the example's, where some are free."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.export import Dim

import graphsurgery as gs
from graphsurgery.verify import TorchRunner, free_axes
from graphsurgery.verify.inputs import as_inputs
from graphsurgery.verify.sizes import merged_axes, size_axes_of, size_runs


def picture(height: int = 12, width: int = 10) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """Pools; `trap` says at which height it goes wrong."""

    def __init__(self, trap: int = -1, multiple: int = 1) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.trap, self.multiple = trap, multiple

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise ValueError(f"sizes must be multiples of {self.multiple}")
        if x.shape[2] == self.trap:
            raise ValueError("cannot")
        y = torch.relu(self.conv(x)).mean((2, 3))
        return y * 1.01 if x.shape[2] > self.trap > 0 else y


FREE = {0: {2: "height", 3: "width"}}


def test_smaller_larger_and_mixed_sizes_are_run_and_named() -> None:
    verdict = gs.verify(Net(), Net(), picture(), free_sizes=FREE)
    assert verdict.ok
    assert verdict.sizes == ("height=7, width=7", "height=15, width=13", "height=15, width=7")
    assert "other sizes: height=7" in str(verdict)
    assert gs.verify(Net(), Net(), picture()).sizes == ()


def test_a_difference_at_other_sizes_alone_is_found() -> None:
    assert gs.verify(Net(), Net(trap=13), picture()).ok
    verdict = gs.verify(Net(), Net(trap=13), picture(), free_sizes=FREE)
    assert not verdict.ok
    assert "height=15" in verdict.reason


def test_a_size_at_which_only_the_candidate_fails_is_a_failure() -> None:
    verdict = gs.verify(Net(), Net(trap=7), picture(), free_sizes=FREE)
    assert not verdict.ok
    assert "height=7" in verdict.reason
    assert "cannot" in verdict.reason


def test_rows_that_are_cases_and_whole_runs_at_other_sizes_are_judged_together() -> None:
    class Map(nn.Module):
        def __init__(self, slope: float) -> None:
            super().__init__()
            self.slope = slope

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x.sum(1) * self.slope)

    for dynamic in (True, False):
        kwargs = {"dynamic_batch": dynamic, "free_sizes": FREE}
        assert gs.verify(Map(0.5), Map(0.5), picture(), **kwargs).ok
        assert not gs.verify(Map(0.5), Map(0.5001), picture(), **kwargs).ok


def test_sizes_that_the_reference_refuses_are_notes_and_others_are_found() -> None:
    verdict = gs.verify(Net(multiple=4), Net(multiple=4), picture(16, 8), free_sizes=FREE)
    assert verdict.ok
    assert verdict.sizes == ("height=8, width=4", "height=32, width=16", "height=32, width=4")
    assert any("declined" in note and "multiples of 4" in note for note in verdict.notes)


def test_tokens_and_mask_keep_one_length() -> None:
    ids, mask = torch.randint(1, 9, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    example = as_inputs({"ids": ids, "mask": mask})
    axes = size_axes_of(example, {"ids": {1: Dim("t")}, "mask": {1: Dim("t")}})
    slots = size_runs(example, axes)
    assert [len(slot) for slot in slots] == [2, 2]
    for slot in slots:
        for batch in slot:
            leaves = batch.inputs.leaves()
            assert leaves[0].shape == leaves[1].shape != ids.shape
            assert leaves[0].dtype == torch.int64
            assert bool(leaves[1].all())


def test_the_sizes_that_are_tried() -> None:
    example = as_inputs(torch.zeros(2, 3, 40, 12))
    axes = size_axes_of(example, {0: {2: "h", 3: "w"}})
    slots = [[batch.cases[0] for batch in slot] for slot in size_runs(example, axes)]
    assert slots == [
        ["h=25, w=7", "h=20, w=6", "h=39, w=12", "h=40, w=11"],
        ["h=51, w=15", "h=80, w=24"],
        ["h=51, w=7", "h=80, w=6", "h=80, w=12"],
    ]
    (small, large) = size_runs(as_inputs(torch.zeros(2, 2)), {"n": [(0, 1, 1, 0)]})
    assert [[b.cases[0] for b in slot] for slot in (small, large)] == [["n=1"], ["n=5", "n=4"]]


def test_sizes_made_of_a_free_one_are_tried_at_its_multiples() -> None:
    example = as_inputs((torch.zeros(2, 3, 8, 13), torch.zeros(2, 3)))
    declared = [("batch", 3, "4*h", "4*w + 1"), ("batch", "w")]
    axes = merged_axes(example, [declared])
    assert axes == {"h": [(0, 2, 4, 0)], "w": [(0, 3, 4, 1), (1, 1, 1, 0)]}
    shapes = [[leaf.shape for leaf in slot[0].inputs.leaves()] for slot in size_runs(example, axes)]
    assert shapes[1] == [(2, 3, 20, 21), (2, 5)]
    # where two programs tell, by the one that takes less
    plain = [("n", 3, "x_dim2", "x_dim3"), ("n", "x_dim3")]
    assert merged_axes(example, [plain, declared])["h"] == [(0, 2, 4, 0)]


def test_ranges_and_multiples_of_the_caller_are_kept_to() -> None:
    shapes = ({2: 4 * Dim("h"), 3: Dim("width", min=9, max=64)},)
    model = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.BatchNorm2d(4)).eval()
    result = gs.optimize(model, picture(), dynamic_shapes=shapes)
    assert result.report.captured.inputs[0].shape == ("2", "3", "4*h", "width")
    assert result.report.captured.outputs[0].shape[2] == "h"
    verdict = result.report.verification
    assert verdict is not None
    assert verdict.sizes == ("h=2, width=10", "h=5, width=13", "h=6, width=10")
    assert not verdict.notes


def test_sizes_that_no_run_holds_for_are_one_note() -> None:
    shapes = ({2: Dim("h", min=12, max=13)},)
    verdict = gs.optimize(nn.ReLU(), picture(), dynamic_shapes=shapes).report.verification
    assert verdict is not None
    assert verdict.sizes == ()
    assert [note for note in verdict.notes if "does not hold" in note] == [
        "not compared on h=7; h=6; h=11: the graph does not hold for these sizes",
        "not compared on h=15; h=24: the graph does not hold for these sizes",
    ]


@pytest.mark.parametrize(
    ("free", "said"),
    [
        ({1: {2: "h"}}, "names the input 1"),
        ({"y": {2: "h"}}, "names the input 'y'"),
        ({0: {4: "h"}}, "axis 4 of input 0"),
        ({0: {2: "h", 3: "h"}}, "equal names are equal sizes"),
    ],
)
def test_free_sizes_that_do_not_fit(free: dict[object, dict[int, str]], said: str) -> None:
    with pytest.raises(gs.VerificationError) as raised:
        gs.verify(Net(), Net(), picture(), free_sizes=free)
    assert said in str(raised.value)


def test_a_size_is_free_where_no_program_fixes_it() -> None:
    example = as_inputs(picture())
    free: list[tuple[int | str | None, ...]] = [("n", 3, "h", "w")]
    assert list(merged_axes(example, [free])) == ["h", "w"]
    assert list(merged_axes(example, [free, [("n", 3, 12, "w")]])) == ["w"]
    assert list(merged_axes(example, [free, [(1, 3)]])) == ["h", "w"]  # of another model
    assert dict(merged_axes(example, [])) == {}
    assert list(merged_axes(as_inputs(picture(10, 10)), [[(None, 3, None, None)]])) == ["size 10"]


def test_graphs_and_files_tell_which_sizes_are_free(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, times: int) -> Tensor:
            return torch.relu(x) * times

    def file(height: int | str) -> Path:
        shape = ["n", 3, height, "w"]
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
        path = tmp_path / f"{height}.onnx"
        onnx.save(helper.make_model(graph, ir_version=10), path)
        return path

    example = as_inputs((picture(), 2))
    shapes = ({0: Dim("b"), 2: Dim("h"), 3: Dim("w")}, None)
    graph = gs.capture(Scaled(), (picture(), 2), dynamic_shapes=shapes)
    both = {"h": [(0, 2, 1, 0)], "w": [(0, 3, 1, 0)]}
    assert free_axes(example, [graph]) == both
    assert free_axes(example, [TorchRunner(graph), Scaled()]) == both
    assert free_axes(example, [Scaled()]) == {}
    assert free_axes(example, [graph, file("h")]) == both
    assert free_axes(as_inputs({"x": picture()}), [file(12)]) == {"w": both["w"]}
    assert free_axes(example, [graph], {0: {3: "wide"}}) == {"wide": both["w"]}


def test_optimize_and_its_onnx_file_are_run_at_the_sizes_that_are_free(tmp_path: Path) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(4)
            self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
            nn.init.uniform_(self.norm.running_mean)
            nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.norm(self.conv(x))).mean((2, 3))

    shapes = ({0: Dim("b"), 2: Dim("h", min=3), 3: Dim("w", min=3)},)
    result = gs.optimize(Pooled().eval(), picture(), dynamic_shapes=shapes)
    assert result.report.verification is not None
    assert result.report.verification.sizes == ("h=7, w=7", "h=15, w=13", "h=15, w=7")
    done = result.export_onnx(tmp_path / "net.onnx")
    assert done.verdict is not None
    assert len(done.verdict.sizes) == 3
    verdict = gs.verify(Pooled().eval(), tmp_path / "net.onnx", picture())
    assert verdict.ok
    assert len(verdict.sizes) == 3


def test_sizes_that_the_graph_does_not_hold_for_are_left_out() -> None:
    class Halved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], x.shape[1] // 2, 2).sum(2) * 2

    example = torch.randn(2, 12, generator=torch.Generator().manual_seed(5))
    result = gs.optimize(Halved(), example, dynamic_shapes=({1: Dim.AUTO},))
    verdict = result.report.verification
    assert verdict is not None
    assert verdict.ok
    assert all(int(text.split("=")[1]) % 2 == 0 for text in verdict.sizes)


@pytest.mark.parametrize(("offset", "rows"), [(0, 4), (1, 5)])
def test_a_batch_that_is_made_of_a_free_size_alone_is_tried_at_its_multiples(offset: int, rows: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    shapes = ({0: 2 * Dim("n") + offset if offset else 2 * Dim("n")},)
    result = gs.optimize(model, torch.randn(rows, 3), dynamic_shapes=shapes)
    assert gs.graph.capture_info(result.graph_module).batch_axes == ((0, 0, 2, offset),)
    verdict = result.report.verification
    assert verdict is not None
    assert verdict.ok
    assert len(verdict.batch_sizes) > 1
    assert all(size % 2 == offset for size in verdict.batch_sizes)
